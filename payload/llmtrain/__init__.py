"""llmtrain: from raw text to a better model: data, plan, run, gate, publish.

Nothing here ever accesses the internet: libraries that would are switched to offline mode before they are imported.
"""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    DO_NOT_TRACK="1",
)
# A peer that is away would fill the journal with torch's stack frames.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
