"""Personal data: e-mail addresses, telephone numbers, public IP addresses, Chinese resident ids and card numbers.

Ids and card numbers need a valid checksum, addresses a valid value. Each kind is replaced by its name in angle brackets, or
its document is dropped, as configured. Names of people are not detected: no rule can do that.
"""

import ipaddress
import re
from collections import Counter
from typing import TYPE_CHECKING

from llmtrain.data.documents import Docs, Rejects, parts, replace_parts

if TYPE_CHECKING:
    from llmtrain.data import settings

EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}(?<![.-])"
)
IPV6 = re.compile(r"(?<![A-Za-z0-9_:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![A-Za-z0-9_:])")
# Candidates for numbers: digits with the separators that people use.
# (The lookbehind follows the first character, as a pattern that begins with a set is searched fast.)
NUMBERS = re.compile(
    r"[0-9+(](?<![A-Za-z0-9_].)[0-9 ().-]{6,41}(?<=[0-9])(?:[Xx](?![A-Za-z0-9]))?(?![A-Za-z0-9_])", re.DOTALL
)
RESIDENT = re.compile(
    r"(?<!\d)[1-9]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\d)"
)
CARD = re.compile(r"(?<!\d)[2-6](?:[ -]?\d){12,18}(?!\d)")
IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)")
PHONE = re.compile(
    r"(?<!\d)(?:"
    r"(?:\+?86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}"  # a Chinese mobile
    r"|\(?0\d{2,3}\)?[ -]?\d{4}[ -]?\d{3,4}"  # a Chinese landline with area code
    r"|\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,6}"  # any, with country code
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4}"  # North American
    r")(?!\d)"
)


def is_resident_id(number: str) -> bool:
    """Whether the check digit is valid: GB 11643, ISO 7064 MOD 11-2."""
    total = sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper()


def is_card(number: str) -> bool:
    """Whether the Luhn checksum is valid (ISO/IEC 7812)."""
    digits = [int(each) for each in reversed(number) if each.isdigit()]
    doubled = [digit if place % 2 == 0 else sum(divmod(2 * digit, 10)) for place, digit in enumerate(digits)]
    return 13 <= len(digits) <= 19 and sum(doubled) % 10 == 0 and len(set(digits)) > 1


def is_public_address(text: str) -> bool:
    """Whether it is a global IP address: not private, local or for documentation."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


class Personal:
    """The step that replaces personal data or drops the document, as configured for each kind."""

    name = "personal"

    def __init__(self, options: "settings.Personal", rejects: Rejects) -> None:
        self.options, self.rejects = options, rejects
        self.action = options.model_dump()

    def text(self, text: str, seen: "Counter[str]") -> str:
        """The text with replacements; `seen` counts the findings by kind."""

        def replaced(kind: str, found: str) -> str:
            if self.action[kind] == "keep":
                return found
            seen[kind] += 1
            return f"<{kind.upper()}>"

        def number(match: "re.Match[str]") -> str:
            run = match[0]
            run = RESIDENT.sub(lambda m: replaced("resident_id", m[0]) if is_resident_id(m[0]) else m[0], run)
            run = CARD.sub(lambda m: replaced("card", m[0]) if is_card(m[0]) else m[0], run)
            run = IPV4.sub(lambda m: replaced("ip", m[0]) if is_public_address(m[0]) else m[0], run)
            return PHONE.sub(lambda m: replaced("phone", m[0]), run)

        if "@" in text:
            text = EMAIL.sub(lambda match: replaced("email", match[0]), text)
        if "::" in text or text.count(":") > 6:
            text = IPV6.sub(lambda m: replaced("ip", m[0]) if is_public_address(m[0]) else m[0], text)
        return NUMBERS.sub(number, text)

    def __call__(self, docs: Docs, rank: int = 0, world_size: int = 1) -> Docs:
        with self.rejects.of(self.name, rank) as reject:
            for document in docs:
                seen: Counter[str] = Counter()
                texts = [self.text(part, seen) for part in parts(document)]
                drops = sorted(kind for kind in seen if self.action[kind] == "drop")
                if drops:
                    reject(document, "personal", f"has {', '.join(drops)}")
                    continue
                if seen:
                    replace_parts(document, texts)
                    document.metadata["personal"] = dict(sorted(seen.items()))
                yield document
