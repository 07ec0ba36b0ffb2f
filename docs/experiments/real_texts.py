"""Makes the texts of the real model's specialists, training and held-out.

- `code` and `legal` are those of corpora.py.
- `worked`: generated sums with worked answers.
- `german`: the German manual pages of Debian's package `manpages-de`.
- `chat`: questions and answers in turns, from the docstrings of Python's library.
"""

from __future__ import annotations

import ast
import gzip
import inspect
import random
import re
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import corpora

DOMAINS = ("code", "worked", "german", "chat", "legal")
TRAINING_CHARACTERS, HELD_OUT_CHARACTERS = 600_000, 100_000
_QUESTIONS = (
    "What does `{0}` do?",
    "Explain `{0}` from Python's standard library.",
    "How is `{0}` used in Python?",
    "Describe `{0}`, please.",
)
_NAMES = "Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas".split()
_THINGS = "apples books stamps marbles cards shells coins pens".split()


def fetch_manual_pages(folder: Path) -> None:
    """Unpack Debian's package `manpages-de` below `folder`, without installing it."""
    if folder.exists():
        return
    download = folder.with_name("deb")
    download.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", "manpages-de"], cwd=download, check=True)
    (package,) = download.glob("manpages-de_*.deb")
    subprocess.run(["dpkg", "-x", package, folder], check=True)


def _plain(page: str) -> str:
    """Take the words of a manual page out of its markup."""
    lines = []
    for line in page.splitlines():
        if line.startswith(".SH"):
            if "ÜBERSETZUNG" in line:
                break
            lines.append("\n" + line[3:].strip(' "'))
        elif re.match(r"\.(B|I|BR|IR|BI|IB|RB|RI) ", line):
            lines.append(line.split(" ", 1)[1].replace('"', ""))
        elif re.match(r"\.(PP|P|TP|IP)\b", line):
            lines.append("")
        elif not line.startswith((".", "'")):
            lines.append(line)
    words = re.sub(r"\\f\(..|\\f.|\\&|\\\||\\/", "", "\n".join(lines))
    words = words.replace(r"\-", "-").replace(r"\(bu", "-").replace(r"\e", "\\")
    words = re.sub(r"\\\(..|\\\*\(..|\\[a-z]", "", words)
    return re.sub(r"\n{3,}", "\n\n", words).strip()


def _german(folder: Path) -> Iterator[tuple[str, str]]:
    pages = [page for page in folder.rglob("*.gz") if "/man/de/" in str(page)]
    if not pages:
        raise OSError(f"no German manual pages below {folder}; run `prepare` first")
    for page in sorted(pages, key=lambda page: zlib.crc32(page.name.encode())):
        words = _plain(gzip.decompress(page.read_bytes()).decode("utf-8", "replace"))
        if len(words) > 400:
            yield page.name, words + "\n\n"


def _turn(spoken: tuple[str, str]) -> str:
    who, words = spoken
    return f"<start_of_turn>{who}\n{words}<end_of_turn>\n"


def _chat() -> Iterator[tuple[str, str]]:
    for path in corpora.modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = [(path.stem, tree)]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.append((f"{path.stem}.{node.name}", node))  # type: ignore[arg-type]
            if isinstance(node, ast.ClassDef):
                found += [
                    (f"{path.stem}.{node.name}.{inner.name}", inner)  # type: ignore[misc]
                    for inner in node.body
                    if isinstance(inner, ast.FunctionDef)
                ]
        for name, node in found:
            answer = inspect.cleandoc(ast.get_docstring(node) or "")[:900].strip()
            if len(answer) > 20:
                kind = zlib.crc32(name.encode()) // 8 % len(_QUESTIONS)
                turns = (("user", _QUESTIONS[kind].format(name)), ("model", answer))
                yield path.name, "".join(map(_turn, turns))


def _problem(rng: random.Random) -> str:
    """Write one sum with its worked answer."""
    a, b, c = rng.randint(12, 99), rng.randint(12, 99), rng.randint(3, 9)
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    kind = rng.randrange(4)
    if kind == 0:
        tens, ones = b // 10 * 10, b % 10
        question = f"What is {a} * {b}?"
        work = f"{a} * {tens} = {a * tens}. {a} * {ones} = {a * ones}. "
        work += f"{a * tens} + {a * ones} = {a * b}."
        result = a * b
    elif kind == 1:
        question = f"{name} has {a} {thing} and buys {c} boxes of {b} {thing}. "
        question += f"How many {thing} does {name} have now?"
        work = f"{c} boxes hold {c} * {b} = {c * b} {thing}. {a} + {c * b} = "
        work += f"{a + c * b}."
        result = a + c * b
    elif kind == 2:
        total = a * c
        question = f"{name} shares {total} {thing} equally among {c} friends. "
        question += f"How many {thing} does each friend get?"
        work = f"{total} / {c} = {a}, because {c} * {a} = {total}."
        result = a
    else:
        high, low = max(a, b) + 100 * c, min(a, b)
        question = f"A book has {high} pages. {name} has read {low}. "
        question += "How many pages are left?"
        work = f"{high} - {low // 10 * 10} = {high - low // 10 * 10}. "
        work += f"{high - low // 10 * 10} - {low % 10} = {high - low}."
        result = high - low
    return f"Question: {question}\nAnswer: {work} The answer is {result}.\n\n"


def _worked(held_out: bool) -> Iterator[tuple[str, str]]:
    rng = random.Random(f"worked {held_out}")
    while True:
        problem = _problem(rng)
        yield problem, problem


def text(domain: str, manual_pages: Path, *, held_out: bool = False) -> str:
    """Write a domain's text.

    A checksum puts one in eight documents on the held-out side. A document is a module
    of Python's library with all its docstrings, a manual page, a paragraph of a
    licence, or a generated sum.

    Args:
        domain: one of `DOMAINS`.
        manual_pages: folder of `fetch_manual_pages`.
        held_out: text for evaluation instead of text for training.

    Returns:
        at most `TRAINING_CHARACTERS` or `HELD_OUT_CHARACTERS` characters.

    Raises:
        OSError: the sources of a text are not installed.
    """
    if domain in ("code", "legal"):
        return corpora.text(domain, held_out=held_out)
    sources = {
        "worked": lambda: _worked(held_out),
        "german": lambda: _german(manual_pages),
        "chat": _chat,
    }
    size = HELD_OUT_CHARACTERS if held_out else TRAINING_CHARACTERS
    parts, length = [], 0
    for name, words in sources[domain]():
        if (zlib.crc32(name.encode()) % 8 == 0) == held_out:
            parts.append(words)
            length += len(words)
        if length >= size:
            break
    return "".join(parts)[:size]
