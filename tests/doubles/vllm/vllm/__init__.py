"""A stand-in for vLLM where neither a GPU nor its CPU build is: its command line, its parser, OpenAI's API on a UNIX socket.

It loads no weights, and answers with the words it was asked. `make peers PEER=vllm` installs the real one, which the role's
scenario takes instead.
"""

__version__ = "0 (stand-in)"
