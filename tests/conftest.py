"""What all tests of this tree share."""

pytest_plugins = ["allowed_skips", "ledger"]
