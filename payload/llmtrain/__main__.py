"""`python -m llmtrain` is llm-train."""

import sys

from llmtrain.cli import main

sys.exit(main())
