"""Generates the demo's text, domain by domain, for training and for evaluation."""

from __future__ import annotations

import random
import zlib

_WORDS = """
A: The, Every, One, Another, My, Her, Some, That
the: the, every, one, another, my, her, this, no
old: old, quiet, bright, narrow, gentle, foreign, hungry, golden, broken, tired, curious
sailor: farmer, sailor, teacher, child, doctor, painter, stranger, uncle, judge, captain
horse: horse, owl, spider, crowd, baker, singer, king, dog, thief, river
letter: garden, kitchen, market, window, letter, mountain, village, bridge, candle
saw: watched, carried, followed, painted, repaired, crossed, visited, noticed, ignored
knew: knew, loved, feared, forgot, answered, believed, missed, blamed
there: behind the mill, near the harbour, across the valley, at night, on the stairs
and: and, but, because, while, although
Then: In the morning, Last winter, After supper, Long ago, By chance
host: db, web, auth, mail
status: INFO 200, INFO 201, WARN 404, ERROR 503
get: GET, POST, PUT
path: users, orders, items
f: find, load, count, parse, merge, split
xs: values, rows, keys, items, words
key: total, index, path, config, limit
x: a, b, c, i, j, k, n, x
"""
_CHOICES = {
    slot: words.split(", ")
    for slot, words in (line.split(": ") for line in _WORDS.strip().splitlines())
}
_TEMPLATES = {
    "general": (
        "{A} {sailor} {saw} {the} {letter}. ",
        "{A} {old} {horse} {saw} {the} {letter} {there}. ",
        "{Then} {the} {sailor} {knew} {the} {old} {horse}. ",
        "{A} {sailor} {saw} {the} {letter}, {and} {the} {old} {horse} {knew} him. ",
        "{Then}, who {knew} {the} {sailor}, {and} who {saw} {the} {letter} {there}? ",
    ),
    "arithmetic": (
        "{n} + {o} = {sum}\n",
        "{o} - {n} = {difference}\n",
        "{m} * {o} = {product}\n",
        "{n} + {o} = {sum}; {sum} - {m} = {rest}\n",
    ),
    "logs": (
        "[{o}.{n}] {status} {host}-{m} | {get} /{path}/{sum}\n",
        "[{o}.{n}] {status} {host}-{m} | bytes={product}\n",
    ),
    "code": (
        "def {f}_{xs}({xs}, {key}={n}):\n    return [{x} + {key} for {x} in {xs}]\n\n",
        "def {f}_{key}({xs}):\n    if {n} in {xs}:\n        return {xs}[{m}:]\n\n",
        "for {x} in {f}_{xs}({o}):\n    if {x} > {n}:\n        {key} += {x}\n\n",
        "while {key} < {o}:\n    {key} = {f}_{xs}({key}, {x}={m})\n\n",
    ),
}


def _sample(domain: str, rng: random.Random) -> str:
    words = {slot: rng.choice(choices) for slot, choices in _CHOICES.items()}
    n, m, o = rng.randrange(100), rng.randrange(2, 100), rng.randrange(10, 1000)
    numbers = {"n": n, "m": m, "o": o, "sum": n + o, "rest": n + o - m}
    numbers |= {"difference": o - n, "product": m * o}
    return rng.choice(_TEMPLATES[domain]).format(**words, **numbers)


def text(domain: str, size: int, *, held_out: bool = False) -> str:
    """Generate at least `size` bytes of ASCII text of a domain, the same every time.

    A checksum holds out one sentence, line or snippet in eight, so that none is both
    trained on and evaluated.

    Args:
        domain: `general`, `arithmetic`, `logs` or `code`.
        size: bytes; the text ends with the sample that reaches them.
        held_out: generate text for evaluation, not for training.

    Returns:
        the text.
    """
    rng = random.Random(f"{domain} {'held out' if held_out else 'training'}")
    samples, length = [], 0
    while length < size:
        sample = _sample(domain, rng)
        if (zlib.crc32(sample.encode()) % 8 == 0) == held_out:
            samples.append(sample)
            length += len(sample)
    return "".join(samples)
