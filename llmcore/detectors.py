"""Known forms of credentials and of personal data, in one table: for the audit record, for ratings and for training data.

The record and ratings lose more than they must, as nothing is lost there by it (`RECORDED`). Training texts lose only what
a checksum or the form itself makes certain (`TRAINED`), or they would lose prose. Names of people and homes are in no form.
"""

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

By = Callable[[str, str], str]  # kind and text of a find: what takes its place
# Where a token may begin: after anything but a letter or digit of ASCII (Chinese text has no spaces), or after an escape
# sequence, whose last letter belongs to no word: a string may itself hold JSON, a URL or source code.
START = r"(?:(?<![0-9A-Za-z])|(?<=\\[abefnrtv])|(?<=\\u[0-9A-Fa-f]{4})|(?<=\\x[0-9A-Fa-f]{2})|(?<=%[0-9A-Fa-f]{2}))"
NAMES_OF_SECRETS = (
    r"pass(?:word|wd|wort|phrase|code)|kennwort|contraseña|mot de passe|senha|пароль|パスワード|비밀번호|pwd|secret|token"
    r"|(?:api|access|secret)[ _-]?key|密码|密碼|口令|密钥"
)
QUOTE = r"\\{0,8}[\"']"
BLANKS = (
    r"\s,.()/_\u200b-\u200d\u2060\ufeff‐-―-"  # between the digits of a card, as people write and paste them
)
PREFIXES = (
    "llmk",
    "sk",
    "pk",
    "rk",
    "ghp",
    "gho",
    "ghs",
    "github_pat",
    "glpat",
    "hf",
    "AKIA",
    *(f"xox{kind}" for kind in "abprs"),
)


def is_card(number: str) -> bool:
    """Whether the digits have a valid Luhn checksum (ISO/IEC 7812)."""
    digits = [int(each) for each in reversed(number) if each in "0123456789"]
    doubled = [digit if place % 2 == 0 else sum(divmod(2 * digit, 10)) for place, digit in enumerate(digits)]
    return 13 <= len(digits) <= 19 and sum(doubled) % 10 == 0 and len(set(digits)) > 1


def is_account(number: str) -> bool:
    """Whether the check digits of an IBAN are valid (ISO 13616, ISO 7064 MOD 97-10)."""
    plain = number.replace(" ", "").upper()
    return int("".join(str(int(each, 36)) for each in plain[4:] + plain[:4])) % 97 == 1


def is_resident_id(number: str) -> bool:
    """Whether the check digit is valid: GB 11643, ISO 7064 MOD 11-2."""
    total = sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper()


def is_public_address(text: str) -> bool:
    """Whether it is a global IP address: not private, local or for documentation."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def is_mixed(key: str) -> bool:
    """Whether it has a digit, or letters of both cases: `sk-learn-contrib-packages` is no key."""
    return any(each.isdigit() for each in key) or not (key.islower() or key.isupper())


def _has_parts(token: str) -> bool:
    return "." in token


@dataclass(frozen=True)
class Detector:
    """One form. Only a `likely` text can have a find. The group `stays` of the pattern, if it has one, stays in the text."""

    kind: str
    pattern: "re.Pattern[str]"
    valid: Callable[[str], bool] | None = None
    likely: Callable[[str], bool] | None = None  # fast

    def replaced(self, text: str, by: By) -> str:
        """The text with each find replaced by what `by` returns."""
        if self.likely and not self.likely(text):
            return text
        stays = "stays" in self.pattern.groupindex

        def each(match: "re.Match[str]") -> str:
            if self.valid and not self.valid(match[0]):
                return match[0]
            return (match["stays"] if stays else "") + by(self.kind, match[0])

        return self.pattern.sub(each, text)


def replaced(text: str, detectors: tuple[Detector, ...], by: By) -> str:
    """The text with the finds of all detectors replaced, one detector after the other."""
    for detector in detectors:
        text = detector.replaced(text, by)
    return text


def _compiled(kind: str, pattern: str, *hints: str, flags: int = 0) -> Detector:
    """One whose finds each have one of the hints, if any are given."""
    likely = (lambda text: any(hint in text for hint in hints)) if hints else None
    return Detector(kind, re.compile(pattern, flags), likely=likely)


# One that has no end is matched as a whole: it may contain the beginnings of thousands.
TOKEN = replace(
    _compiled("token", r"eyJ[\w-]{8,}+(?:\.[\w-]{8,}+(?:\.[\w-]*){1,3})?", "eyJ"), valid=_has_parts
)
PRIVATE_KEYS = (
    _compiled(
        "private key",
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
        "PRIVATE KEY-----",
        flags=re.DOTALL,
    ),
    _compiled(
        "private key",
        r"PuTTY-User-Key-File-\d.*?(?:Private-MAC: *[0-9A-Fa-f]+|\Z)",
        "PuTTY-User-Key-File-",
        flags=re.DOTALL,
    ),
)
KEYS = (
    _compiled("key", START + r"(?:AKIA|ASIA)[0-9A-Z]{16}", "AKIA", "ASIA"),
    _compiled("key", START + r"(?:AIza[\w-]{30,}|npm_[0-9A-Za-z]{30,})", "AIza", "npm_"),
)
URL_CREDENTIAL = _compiled("credential", r"(?P<stays>://)[^\s/:@]{0,64}:[^\s/@]{1,200}(?=@)", "://")
PREFIXED_KEY = _compiled(
    "key",
    START + rf"(?:{'|'.join(PREFIXES)})[-_][\w-]{{16,}}",
    *(prefix + dash for prefix in PREFIXES for dash in "-_"),
)

RECORDED = (
    TOKEN,
    Detector("number", re.compile(START + rf"\d(?:[{BLANKS}]{{0,3}}\d){{12,18}}(?!\d)"), is_card),
    *PRIVATE_KEYS,
    *KEYS,
    URL_CREDENTIAL,
    PREFIXED_KEY,
    # Base64 with something in it that an ordinary word has not: "basic training" stays.
    _compiled("credential", START + r"(?i:basic)\s+(?=[A-Za-z]*[0-9+/=]|[A-Za-z][a-z]*[A-Z])[A-Za-z0-9+/]{6,}={0,2}"),
    _compiled("credential", START + r"(?i:bearer)\s+(?!\[)[\w.~+/=-]{8,}"),
    _compiled("address", r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}", "@"),
    _compiled("account", START + r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?![0-9A-Za-z])"),  # IBAN, ISO 13616
    _compiled("account", START + r"[a-z]{2}\d{2}[a-z0-9]{11,30}(?![0-9A-Za-z])"),
    _compiled("number", r"\+?\d(?:[\s.()/_‐-―-]?\d){7,}[Xx]?"),  # cards, accounts, phones, identity cards
    # The name stays, its value goes.
    _compiled(
        "secret",
        START
        + rf"(?P<stays>(?i:{NAMES_OF_SECRETS})(?:{QUOTE})?\s*(?:[:=\uff1a\uff1d]|是|为)\s*(?!\[)(?P<quote>{QUOTE})?)"
        + r"(?(quote)[^\"'\\]+|[^\s\"'&,;\\]+)",
    ),
    # In a sentence, or after a blank alone: what follows has to look like a secret, since "is wrong" may follow, too.
    _compiled(
        "secret",
        START
        + rf"(?P<stays>(?i:{NAMES_OF_SECRETS})(?:\s+(?i:is|ist|est|es|é)\s+|\s+))"
        + r"(?=[^\s,;]*(?:\d|[^\w\s.,;:!?'\"\[\])]))[^\s,;]{6,}",
    ),
)  # fmt: skip

# A run of digits with the separators that people use; `TRAINED_NUMBERS` are looked for in such runs alone.
# (The lookbehind follows the first character, as a pattern that begins with a set is searched fast.)
NUMBERS = re.compile(
    r"[0-9+(](?<![A-Za-z0-9_].)[0-9 ().-]{6,41}(?<=[0-9])(?:[Xx](?![A-Za-z0-9]))?(?![A-Za-z0-9_])", re.DOTALL
)
TRAINED_NUMBERS = (
    Detector(
        "resident_id",
        re.compile(r"(?<!\d)[1-9]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\d)"),
        is_resident_id,
    ),
    Detector("card", re.compile(r"(?<!\d)[2-6](?:[ -]?\d){12,18}(?!\d)"), is_card),
    Detector("ip", re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)"), is_public_address),
    _compiled(
        "phone",
        r"(?<!\d)(?:"
        r"(?:\+?86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}"  # a Chinese mobile
        r"|\(?0\d{2,3}\)?[ -]?\d{4}[ -]?\d{3,4}"  # a Chinese landline with area code
        r"|\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,6}"  # any, with country code
        r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4}"  # North American
        r")(?!\d)",
    ),
)  # fmt: skip
TRAINED = (
    *(replace(each, kind="credential") for each in (TOKEN, *PRIVATE_KEYS, *KEYS, URL_CREDENTIAL)),
    replace(PREFIXED_KEY, kind="credential", valid=is_mixed),
    _compiled(
        "email",
        r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}(?<![.-])",
        "@",
    ),
    Detector(
        "account",
        re.compile(
            r"[A-Z](?<![0-9A-Za-z].)[A-Z]\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![0-9A-Za-z])"
        ),
        is_account,
    ),
    Detector(
        "ip",
        re.compile(r"(?<![A-Za-z0-9_:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![A-Za-z0-9_:])"),
        is_public_address,
        lambda text: "::" in text or text.count(":") > 6,
    ),
)
