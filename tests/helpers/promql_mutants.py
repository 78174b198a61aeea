"""Small changes of a PromQL expression that a test of its rule has to notice."""

import re
from collections.abc import Iterator
from itertools import pairwise

OPPOSITE = {
    ">": "<=",
    "<": ">=",
    ">=": "<",
    "<=": ">",
    "==": "!=",
    "!=": "==",
    "/": "*",
    "*": "/",
    "%": "*",
    "-": "+",
    "+": "-",
}
OPERAND = re.compile(r"^(?:and|or|unless)\b.*$", re.MULTILINE)
TOKEN = re.compile(
    r"""(?P<braces>\{[^{}]*\})|(?P<window>\[\d+[smhd]\])|(?P<sign>(?<=\s)(?:>=|<=|==|!=|[><*/%+-])(?=\s))"""
    r"""|(?P<number>(?<![\w.])\d+(?:\.\d+)?(?![\w.]))"""
)


def mutants(expr: str) -> Iterator[str]:
    """The expression with one operand removed, or one sign, number, window or label matcher altered.

    Operands are on lines of their own, joined by lines that begin with `and`, `or` or `unless`.
    """
    yield from without_an_operand(expr)
    for token in TOKEN.finditer(expr):
        for altered in alternatives(token):
            yield expr[: token.start()] + altered + expr[token.end() :]


def without_an_operand(expr: str) -> Iterator[str]:
    joints = list(OPERAND.finditer(expr))
    starts = [0, *(joint.start() for joint in joints), len(expr)]
    parts = [expr[start:end] for start, end in pairwise(starts)]
    for gone in range(len(parts) if joints else 0):
        left = "".join(part for number, part in enumerate(parts) if number != gone)
        yield OPERAND.sub("", left, count=1) if gone == 0 else left


def alternatives(token: re.Match[str]) -> Iterator[str]:
    text = token.group()
    if token["braces"]:
        matchers = re.findall(r'\w+(?:=~|!~|!=|=)"[^"]*"', text)
        if any(matcher.startswith("objective=") for matcher in matchers):  # the name of a series of ours
            return
        for gone in matchers:
            yield "{" + ",".join(matcher for matcher in matchers if matcher != gone) + "}"
    elif token["window"]:
        yield f"[{4 * int(text[1:-2])}{text[-2]}]"
    elif token["sign"]:
        yield OPPOSITE[text]
    elif float(text) == 0:
        yield "1000000"
    else:
        yield f"{float(text) * 2:.10g}"
        yield f"{float(text) / 2:.10g}"
