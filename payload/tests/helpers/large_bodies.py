"""Bodies of a size whose validation could take long: each list of the API filled with each kind of item."""

import random
from collections.abc import Iterator

from llmserve.gateway.parsed_requests import Read, chat, embedding, responses

CHAT = '{"model":"m","messages":[{"role":"user","content":"a"}],'
# Where a list or object begins and ends, by the field in which it is.
PLACES = {
    "messages": ('{"model":"m","messages":[', "]}"),
    "content": ('{"model":"m","messages":[{"role":"user","content":[', "]}]}"),
    "tool_calls": ('{"model":"m","messages":[{"role":"assistant","tool_calls":[', "]}]}"),
    "stop": (CHAT + '"stop":[', "]}"),
    "tools": (CHAT + '"tools":[', "]}"),
    "unknown": (CHAT + '"unknown":[', "]}"),
    "input": ('{"model":"m","input":[', "]}"),
    "items": ('{"model":"m","input":[', "]}"),
    "items' content": ('{"model":"m","input":[{"role":"user","content":[', "]}]}"),
    "items' tools": ('{"model":"m","input":"a","tools":[', "]}"),
}
ITEMS = [
    "1",
    "1.5",
    '"a"',
    '""',
    "null",
    "{}",
    "[]",
    "[[]]",
    '{"type":"text","text":"a"}',
    '{"type":"text","text":1}',
    '{"type":"input_text","text":"a"}',
    '{"type":"function_call","call_id":"a","name":"a","arguments":""}',
    '{"type":"reasoning","content":[]}',
    '{"type":"function","name":"a"}',
]
ITEMS += ["1" * 4299, "1" * 300, "-1.5e-300", '"' + "\\u00e9" * 20 + '"', '"' + "eyJ" * 20 + '"']
ITEMS += [
    '{"role":"user","content":"a"}',
    '{"role":"x","content":"a"}',
    '{"role":"user","content":[1,1,1]}',
    '{"a":1,"b":2}',
]


def reader(name: str) -> Read:
    """The endpoint's parser of the body with this name."""
    return {"input": embedding, "items": responses}.get(name.split()[0].removesuffix("'"), chat)


def filled(head: str, items: list[str], tail: str, size: int) -> bytes:
    """`head`, as many of `items` in turn as `size` bytes hold, and `tail`."""
    room, parts = size - len(head) - len(tail), []
    for number in range(size):
        item = items[number % len(items)]
        room -= len(item) + 1
        if room < 0:
            break
        parts.append(item)
    return (head + ",".join(parts) + tail).encode()


def keys(head: str, tail: str, size: int) -> bytes:
    """An object with as many keys as `size` bytes hold."""
    count = (size - len(head) - len(tail)) // 12
    return (head + ",".join(f'"k{number:06d}":1' for number in range(count)) + tail).encode()


# Texts for which patterns of the redaction begin at many places.
TEXTS = [
    "a",
    "1",
    "1 ",
    "eyJ",
    "a@",
    "a.",
    "sk-",
    "DE89 ",
    "password=",
    "-----BEGIN ",
    "basic ",
    "\\n",
    "\\\\",
    '\\"',
]


def chat_of(text: str, messages: int, size: int) -> bytes:
    """A valid chat of `messages` that repeat `text`."""
    frame = '{"role":"user","content":""}'
    times = (size // messages - len(frame) - 10) // len(text)
    message = frame.replace('""', f'"{text * times}"')
    return ('{"model":"m","messages":[' + ",".join([message] * messages) + "]}").encode()


def large_bodies(size: int) -> Iterator[tuple[str, bytes]]:
    """Each with its name."""
    for place, (head, tail) in PLACES.items():
        for item in ITEMS:
            yield f"{place} of {item}", filled(head, [item], tail, size)
    yield "keys of the body", keys(CHAT, "}", size)
    yield "keys of a message", keys('{"model":"m","messages":[{"role":"user","content":"a",', "}]}", size)
    yield "depth", b'{"model":"m","messages":' + b"[" * (size // 2 - 20) + b"]" * (size // 2 - 20) + b"}"
    yield (
        "escapes",
        b'{"model":"m","messages":[{"role":"user","content":"' + b"\\u00e9" * (size // 6 - 20) + b'"}]}',
    )
    for text in TEXTS:
        for messages in 1, 100, 4096:
            yield f"{messages} messages of {text}", chat_of(text, messages, size)


def random_bodies(size: int, number: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Mixtures of items, for a search."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    for _ in range(number):
        place = chance.choice(list(PLACES))
        items = chance.choices(ITEMS, k=chance.randint(1, 8))
        yield f"{place} of {', '.join(items)}", filled(PLACES[place][0], items, PLACES[place][1], size)
