"""python -m llmweb"""

import sys

from llmweb.cli import main

if __name__ == "__main__":
    sys.exit(main())
