"""An experiment as its file declares it; tests change what they are about."""

from typing import Any

EXPERIMENT: dict[str, Any] = {
    "experiment": "support-12",
    "model": "support",
    "control": "support-7",
    "candidate": "support-8",
    "unit": "subject",
    "tenants": ["research"],
    "ladder": [5, 25, 50, 100],
    "days": 14,
    "minimum": 50,
    "metrics": [
        {"name": "thumb", "better": "higher", "difference": 0.1},
        {"name": "corrected", "better": "lower", "difference": 0.02},
    ],
    "expects": {"subjects": 2000, "conversations": 900, "requests": 6000, "ratings": 400, "alike": 0.2},
}
