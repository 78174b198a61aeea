"""`python -m llmkeep`."""

import sys

from llmkeep.cli import main

sys.exit(main())
