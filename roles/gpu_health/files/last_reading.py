"""last_reading.py PORT SECONDS: exit 1 unless llm-gpu's metrics on 127.0.0.1 are of a reading that is at most SECONDS old."""

import re
import sys
import urllib.error
import urllib.request


def trouble(port: str, seconds: float) -> str:
    """What is wrong; an empty text if nothing is."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read(500).decode(errors='replace').strip()}"
    except OSError as error:
        return f"nothing answers on 127.0.0.1:{port}: {error}"
    match = re.search(r"^llm_gpu_last_success_age_seconds (\S+)$", text, re.MULTILINE)
    if match is None:
        return f"127.0.0.1:{port} has no llm_gpu_last_success_age_seconds: another program listens there"
    age = float(match[1])
    return "" if age <= seconds else f"the last reading is {age:.0f} s old"


if __name__ == "__main__":
    wrong = trouble(sys.argv[1], float(sys.argv[2]))
    sys.exit(wrong or 0)
