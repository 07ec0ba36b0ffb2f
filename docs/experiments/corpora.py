"""Makes each domain's text, training and held-out, from Python, Debian and rules.

- `general`: Python's language reference and the docstrings of its library.
- `code`: the library's source, without comments and docstrings.
- `legal`: the licences of /usr/share/common-licenses (any Debian or Ubuntu).
- `arithmetic`: generated comparisons such as `37?82=<`.
- `markup`: generated lines such as `user=robin|<user>robin</user>`.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

DOMAINS = ("general", "code", "arithmetic", "markup", "legal")
# The byte before which each line's answer starts; the answer ends with the line.
ANSWER_AFTER = {"arithmetic": "=", "markup": "|"}
LICENCES = Path("/usr/share/common-licenses")
TRAINING_BYTES, HELD_OUT_BYTES = 600_000, 100_000
_KEYS = "id user host port name path size type date zone role lang".split()
_WORDS = """
apple bread chair dusty eagle frost grape house ivory joker knife lemon mango night
ocean pearl queen river stone table uncle vivid wheat yacht zebra amber brick cloud
dream earth field ghost honey image juice koala light mouse nurse olive piano quiet
robin sugar tiger under value water young zonal badge crown delta ember flute globe
""".split()


def modules() -> list[Path]:
    """List the library's modules, ordered by a hash of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for pattern in ("*.py", "asyncio/*.py", "email/*.py", "json/*.py")
        for path in folder.glob(pattern)
    ]
    if not files:
        raise OSError(f"no source of Python's library in {folder}; install it there")
    return sorted(files, key=lambda path: zlib.crc32(path.name.encode()))


def _docstrings(source: str) -> str:
    """Join the docstrings of a module."""
    tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def _without_docstrings(source: str) -> str:
    """Rewrite a module without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [
                line
                for line in body
                if not (
                    isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
                )
            ]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _shipped(domain: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield each document's name and a function that reads it."""
    if domain == "legal":
        files = {path.resolve() for path in LICENCES.glob("*")}
        if not files:
            raise OSError(f"no licences in {LICENCES}; run this on Debian or Ubuntu")
        for path in sorted(files):
            words = path.read_text(encoding="utf-8", errors="replace")
            for paragraph in words.split("\n\n"):
                yield paragraph, partial(str, paragraph)
        return
    if domain == "general":
        from pydoc_data.topics import topics

        for name, words in sorted(topics.items()):
            yield name, partial(str, words)
    taken = _docstrings if domain == "general" else _without_docstrings
    for path in modules():

        def read(path: Path = path) -> str:
            return taken(path.read_text(encoding="utf-8"))

        yield path.name, read


def _line(domain: str, rng: random.Random) -> str:
    if domain == "arithmetic":
        a, b = rng.randrange(100), rng.randrange(100)
        return f"{a:02}?{b:02}={'<' if a < b else '>' if a > b else '='}\n"
    key, word = rng.choice(_KEYS), rng.choice(_WORDS)
    return f"{key}={word}|<{key}>{word}</{key}>\n"


@cache
def text(domain: str, *, held_out: bool = False) -> str:
    """Write a domain's text; it is the same for one version of Python and Debian.

    A checksum puts one in eight documents on the held-out side. A document is a module,
    a paragraph of a licence, or a generated line. For licences and generated text, no
    held-out line is also a training line, except blank lines.

    Args:
        domain: one of `DOMAINS`.
        held_out: text for evaluation instead of text for training.

    Returns:
        ASCII text of at most `TRAINING_BYTES` or `HELD_OUT_BYTES` bytes.

    Raises:
        OSError: the licences, or the source of Python's library, are not installed.
    """

    def is_held_out(name: str) -> bool:
        return zlib.crc32(name.encode()) % 8 == 0

    size = HELD_OUT_BYTES if held_out else TRAINING_BYTES
    parts, length = [], 0
    if domain in ANSWER_AFTER:
        rng = random.Random(f"{domain} {held_out}")
        while length < size:
            line = _line(domain, rng)
            if is_held_out(line) == held_out:
                parts.append(line)
                length += len(line)
        return "".join(parts)[:size]
    seen: set[str] = set()
    if domain == "legal" and held_out:
        seen = {line.strip() for line in text("legal").splitlines()} - {""}
    for name, read in _shipped(domain):
        if is_held_out(name) != held_out:
            continue
        words = read().encode("ascii", "replace").decode()
        if seen.isdisjoint(line.strip() for line in words.splitlines()):
            parts.append(words + "\n\n")
            length += len(parts[-1])
        if length >= size:
            break
    return "".join(parts)[:size]


def fingerprints() -> dict[str, str]:
    """Identify each text by the start of its SHA-256: training text, then held out."""
    return {
        domain: " ".join(
            hashlib.sha256(text(domain, held_out=held_out).encode()).hexdigest()[:12]
            for held_out in (False, True)
        )
        for domain in DOMAINS
    }
