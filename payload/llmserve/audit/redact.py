"""What is taken out of a prompt before policy lets it into the audit record: what identifies or opens something."""

import re

LONGEST = 4000  # characters that are kept
PATTERNS = (
    ("private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)),
    ("token", re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*")),
    ("key", re.compile(r"\b(?:llmk|sk|pk|ghp|gho|glpat|xox[abprs]|AKIA|hf)[-_][\w-]{16,}|\bAKIA[0-9A-Z]{16}\b")),
    ("address", re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")),
    ("number", re.compile(r"(?<!\w)\+?\d(?:[ .()/-]?\d){7,22}[Xx]?(?!\w)")),  # cards, accounts, phones, identity cards
)  # fmt: skip


def redact(text: str) -> str:
    """`text` with each such thing replaced by its kind in brackets, cut after LONGEST characters."""
    text = text[: 2 * LONGEST]
    for kind, pattern in PATTERNS:
        text = pattern.sub(f"[{kind}]", text)
    return text if len(text) <= LONGEST else text[:LONGEST] + "[cut]"
