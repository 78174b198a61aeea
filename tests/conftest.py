"""What all tests of this tree share."""

pytest_plugins = ["ledger"]
