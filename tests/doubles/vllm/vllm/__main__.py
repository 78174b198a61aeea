"""`vllm serve --config FILE`."""

import sys

from vllm.entrypoints.cli import serve  # type: ignore[import-not-found, unused-ignore]

module_parser = serve.FlexibleArgumentParser(prog="vllm")
(command,) = serve.cmd_init()
command.subparser_init(module_parser.add_subparsers())
sys.exit(command.cmd(module_parser.parse_args(sys.argv[1:])))
