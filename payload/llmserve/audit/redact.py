"""Removes known forms of credentials and personal identifiers from a prompt that policy admits to the audit record."""

import re
import sys

from pydantic_core import to_json

LONGEST = 4000  # characters of the redacted text
# Where a token may begin: after anything but a letter or digit of ASCII (Chinese text has no spaces), or after an escape
# sequence, whose last letter belongs to no word: a string may itself hold JSON, a URL or source code.
START = r"(?:(?<![0-9A-Za-z])|(?<=\\[abefnrtv])|(?<=\\u[0-9A-Fa-f]{4})|(?<=\\x[0-9A-Fa-f]{2})|(?<=%[0-9A-Fa-f]{2}))"
NAMES_OF_SECRETS = (
    r"pass(?:word|wd|wort|phrase|code)|kennwort|contraseña|mot de passe|senha|пароль|パスワード|비밀번호|pwd|secret|token"
    r"|(?:api|access|secret)[ _-]?key|密码|密碼|口令|密钥"
)
PATTERNS = (
    ("private key", r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    ("private key", r"PuTTY-User-Key-File-\d.*?(?:Private-MAC: *[0-9A-Fa-f]+|\Z)", re.DOTALL),
    ("key", START + r"(?:AKIA|ASIA)[0-9A-Z]{16}", 0),
    ("key", START + r"(?:AIza[\w-]{30,}|npm_[0-9A-Za-z]{30,})", 0),
    ("credential", r"(?<=://)[^\s/:@]{0,64}:[^\s/@]{1,200}(?=@)", 0),  # of a URL
    ("key", START + r"(?:llmk|sk|pk|rk|ghp|gho|ghs|github_pat|glpat|xox[abprs]|AKIA|hf)[-_][\w-]{16,}", 0),
    # Base64 with something in it that an ordinary word has not: "basic training" stays.
    ("credential", START + r"(?i:basic)\s+(?=[A-Za-z]*[0-9+/=]|[A-Za-z][a-z]*[A-Z])[A-Za-z0-9+/]{6,}={0,2}", 0),
    ("credential", START + r"(?i:bearer)\s+(?!\[)[\w.~+/=-]{8,}", 0),
    ("address", r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}", 0),
    ("account", START + r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?![0-9A-Za-z])", 0),  # IBAN, ISO 13616
    ("account", START + r"[a-z]{2}\d{2}[a-z0-9]{11,30}(?![0-9A-Za-z])", 0),
    ("number", r"\+?\d(?:[\s.()/_‐-―-]?\d){7,}[Xx]?", 0),  # cards, accounts, phones, identity cards
)  # fmt: skip
# Of cards people write and paste much between the digits; such a run needs a valid checksum.
BLANKS = r"\s,.()/_\u200b-\u200d\u2060\ufeff‐-―-"
CARD = re.compile(START + rf"\d(?:[{BLANKS}]{{0,3}}\d){{12,18}}(?!\d)")
COMPILED = tuple((f"[{kind}]", re.compile(pattern, flags)) for kind, pattern, flags in PATTERNS)
# One that has no end is passed as a whole: it may contain the beginnings of thousands.
TOKEN = re.compile(r"eyJ[\w-]{8,}+(\.[\w-]{8,}+(?:\.[\w-]*){1,3})?")
# The name stays, its value goes.
QUOTE = r"\\{0,8}[\"']"
NAMED = re.compile(
    START
    + rf"((?i:{NAMES_OF_SECRETS})(?:{QUOTE})?\s*(?:[:=:]|是|为)\s*)(?!\[)(?:({QUOTE})[^\"'\\]+|[^\s\"'&,;\\]+)"
)

# In a sentence, or after a blank alone: what follows has to look like a secret, since "is wrong" may follow, too.
SAID = re.compile(
    START
    + rf"((?i:{NAMES_OF_SECRETS})(?:\s+(?i:is|ist|est|es|é)\s+|\s+))(?=[^\s,;]*(?:\d|[^\w\s.,;:!?'\"\[\])]))[^\s,;]{{6,}}"
)


def redact(content: object) -> str:
    """A text, or lists and dicts of texts as JSON, at most LONGEST characters, with each secret replaced by its kind in brackets.

    Every string is redacted before it becomes JSON: there a line feed is the two characters `\\n`, after which a number does not
    look like the beginning of one.
    """
    if isinstance(content, str):
        return _cut(_redacted(content[: 2 * LONGEST]))
    return _cut(to_json(_Strings().redacted(content)).decode())


def scrubbed(content: object) -> object:
    """The same text, lists and dicts, whole, with each secret replaced. Takes milliseconds for some 10,000 characters."""
    return _Strings(sys.maxsize).redacted(content)


class _Strings:
    """The strings of a JSON value, as far as they can get into the record."""

    def __init__(self, left: int = 2 * LONGEST) -> None:
        self.left = left  # characters

    def redacted(self, value: object) -> object:
        if isinstance(value, str):
            text, self.left = value[: self.left], max(0, self.left - len(value))
            return _redacted(text)
        if isinstance(value, dict):
            return {
                _redacted(str(name)[:LONGEST]): self.redacted(each)
                for name, each in value.items()
                if self.left
            }
        if isinstance(value, list):
            return [self.redacted(each) for each in value if self.left]
        return value if isinstance(value, bool | None) else _redacted(str(value))


def _redacted(text: str) -> str:
    text = TOKEN.sub(lambda found: "[token]" if found[1] else found[0], text)
    text = CARD.sub(lambda found: "[number]" if is_card(found[0]) else found[0], text)
    for kind, pattern in COMPILED:
        text = pattern.sub(kind, text)
    return SAID.sub(r"\1[secret]", NAMED.sub(r"\1\2[secret]", text))


def is_card(text: str) -> bool:
    """Whether the digits have a valid Luhn checksum (ISO/IEC 7812)."""
    digits = [int(each) for each in reversed(text) if each in "0123456789"]
    doubled = [digit if place % 2 == 0 else sum(divmod(2 * digit, 10)) for place, digit in enumerate(digits)]
    return sum(doubled) % 10 == 0 and len(set(digits)) > 1


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + "[cut]"
