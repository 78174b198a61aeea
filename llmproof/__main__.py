"""`python -m llmproof` is `llm-audit`."""

import sys

from llmproof.cli import main

sys.exit(main())
