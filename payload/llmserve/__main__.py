"""`python -m llmserve` is `llm-serve`."""

import sys

from llmserve.cli import main

sys.exit(main())
