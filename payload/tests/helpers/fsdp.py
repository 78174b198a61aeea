"""The mark of tests that need FSDP2 on a CPU."""

import pytest
import torch

FSDP = pytest.mark.skipif(
    torch.__version__ < "2.7",  # compared as versions, not as texts
    reason=f"FSDP2 does not run on a CPU in torch {torch.__version__}: it takes 2.7 or later",
)
