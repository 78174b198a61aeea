"""A double of systemd-creds, which needs a host of its own: here sealed data is marked, so that unsealed data shows."""

from types import ModuleType

import pytest


def use(monkeypatch: pytest.MonkeyPatch, sealer: ModuleType, opener: ModuleType) -> None:
    """For what SEALER seals and OPENER opens again."""
    monkeypatch.setattr(sealer, "seal", lambda secret, name: f"sealed {name}:".encode() + secret)
    monkeypatch.setattr(
        opener, "unseal", lambda sealed, name: sealed.removeprefix(f"sealed {name}:".encode())
    )
