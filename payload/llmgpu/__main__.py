"""python -m llmgpu."""

import sys

from llmgpu.cli import main

sys.exit(main())
