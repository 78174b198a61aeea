"""`python3.13 -m lab` is the same as `.venv/bin/lab`."""

from lab.cli import main

raise SystemExit(main())
