"""`python -m auditlog` is `llm-audit`."""

import sys

from auditlog.cli import main

sys.exit(main())
