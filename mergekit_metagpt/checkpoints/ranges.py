"""Reads parts of a file on the hub by HTTP range requests, again while it is busy."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Simultaneous requests, to all repositories together.
AT_ONCE = 16
# Bytes of the first request to a file; few headers are longer.
HEAD = 1 << 16
# The limit of safetensors itself.
MOST_HEADER = 100_000_000
MOST_JSON = 64_000_000
TRIES = 5
FIRST_WAIT_S = 1.0
MOST_WAIT_S = 300.0
TIMEOUT_S = 30.0
# Statuses of a busy server.
AGAIN = frozenset({408, 429, 500, 502, 503, 504})
# Statuses of a signed address that has expired.
_EXPIRED = frozenset({400, 401, 403, 404, 410})


@dataclass(frozen=True)
class Answer:
    """Bytes of a file, and what the headers of the answer say of the file.

    Attributes:
        content: the bytes.
        total: size of the file.
        etag: ETag of the last server.
        linked: the hub's hash of the file's content.
        url: address of the last server.
    """

    content: bytes
    total: int
    etag: str
    linked: str
    url: str


class _Expired(Exception):
    """The target of an earlier redirect has expired."""


def request(
    what: str, url: str, span: tuple[int, int] | None, *, direct: bool = False
) -> Answer:
    """Get a file, or the bytes of a span, first and last; try again while it is busy.

    No token is sent to a signed address, which is `direct`. Raises an OSError if the
    file cannot be read; some messages are huggingface_hub's.
    """
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,
        OfflineModeIsEnabled,
    )
    from huggingface_hub.utils import build_hf_headers, get_session

    headers = {} if direct else dict(build_hf_headers())
    headers["Accept-Encoding"] = "identity"
    if span is not None:
        headers["Range"] = f"bytes={span[0]}-{span[1]}"
    problem = ""
    for attempt in range(TRIES):
        wait = FIRST_WAIT_S * 2**attempt
        try:
            with get_session().stream(
                "GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S
            ) as response:
                if response.status_code not in AGAIN:
                    if direct and response.status_code in _EXPIRED:
                        raise _Expired
                    return _answer(what, response, span)
                problem = f"the server answered with status {response.status_code}"
                asked = response.headers.get("Retry-After", "")
                wait = float(asked) if asked.isdecimal() else wait
        except (HfHubHTTPError, OfflineModeIsEnabled):
            raise
        except HTTPError as error:
            problem = str(error) or type(error).__name__
        if wait > MOST_WAIT_S:
            problem += f" and asks to wait for {wait:.0f} s"
            break
        if attempt < TRIES - 1:
            time.sleep(wait)
    raise OSError(f"{what} cannot be read: {problem}. Try again later")


def _answer(what: str, response: Any, span: tuple[int, int] | None) -> Answer:
    from huggingface_hub.utils import hf_raise_for_status

    status, headers = response.status_code, response.headers
    if status == 416:
        assert span is not None
        raise OSError(
            f"{what} ends before byte {span[0]:,}, although its header or size promise "
            "more: it has changed, or its upload is incomplete"
        )
    if status >= 400:
        response.read()
        hf_raise_for_status(response)
    length = int(headers.get("Content-Length") or -1)
    total, most = length, MOST_JSON
    if span is not None:
        most = span[1] - span[0] + 1
        unit, _, given = headers.get("Content-Range", "").partition(" ")
        start, _, size = given.partition("/")
        if status != 206 or unit != "bytes" or not size.isdecimal():
            raise OSError(
                f"{what}: the server ignores Range (status {status}), and would send "
                "the whole file. Download the model, and name its folder"
            )
        total = int(size)
        if not start.startswith(f"{span[0]}-"):
            raise OSError(
                f"{what}: the server sent bytes {start}, not from {span[0]} on. "
                "Download the model, and name its folder"
            )
        most = min(most, total - span[0])
    if length > most:
        raise OSError(f"{what} is {length:,} bytes; expected at most {most:,}")
    content = bytearray()
    for chunk in response.iter_raw():
        content += chunk
        if len(content) > most:
            raise OSError(f"{what}: the server sends more than {most:,} bytes")
    if span is not None and len(content) != most:
        raise OSError(
            f"{what}: the answer ended after {len(content):,} of {most:,} bytes. Try "
            "again"
        )
    linked = [r.headers.get("X-Linked-ETag") for r in (*response.history, response)]
    etag = _plain(headers.get("ETag") or "")
    return Answer(
        content=bytes(content),
        total=total,
        etag=etag,
        linked=_plain(next(filter(None, linked), etag)),
        url=str(response.url),
    )


def _plain(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def places_in(header: dict[str, Any], start: int) -> dict[str, tuple[int, int]]:
    """Return each tensor's first byte and size, where data begins at byte `start`.

    Drops the metadata of the safetensors header.
    """
    header.pop("__metadata__", None)
    offsets = {name: entry["data_offsets"] for name, entry in header.items()}
    return {
        name: (start + first, end - first) for name, (first, end) in offsets.items()
    }


@dataclass(eq=False)
class RemoteFile:
    """A safetensors file on the hub, read in parts.

    Attributes:
        label: the file, for messages.
        url: its address on the hub, at a commit.
        starts: first byte and size of every tensor, once the header was read.
        size: of the file, after the first request.
        linked: the hub's hash of its content, after the first request.
    """

    label: str
    url: str
    starts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    size: int | None = None
    linked: str = ""
    _etag: str | None = None
    _direct: str | None = None

    def read(self, first: int, last: int) -> bytes:
        """Return the bytes from `first` to `last`; the file may end before.

        Raises an OSError if they cannot be read, or the file has changed since the
        first request.
        """
        answer = None
        if self._direct is not None:
            try:
                answer = request(self.label, self._direct, (first, last), direct=True)
            except _Expired:
                self._direct = None
        if answer is None:
            answer = request(self.label, self.url, (first, last))
        if self._etag is None:
            self._etag, self.size = answer.etag, answer.total
            self.linked = answer.linked
        if (answer.etag, answer.total) != (self._etag, self.size):
            raise OSError(
                f"{self.label} has changed between two requests, and an estimate would "
                "mix two versions. Run the command again"
            )
        if answer.url != self.url:
            self._direct = answer.url
        return answer.content

    def read_header(self) -> Mapping[str, Any]:
        """Read the header's entry for each tensor, and take `starts` from it.

        Raises an OSError if the header cannot be read, is corrupt, or promises more
        than the file holds.
        """
        head = self.read(0, HEAD - 1)
        length = int.from_bytes(head[:8], "little")
        if not 2 <= length <= MOST_HEADER:
            raise OSError(
                f"{self.label} is not a safetensors file. Download the model, and look"
            )
        if 8 + length > len(head):
            head += self.read(len(head), 8 + length - 1)
        try:
            header = json.loads(head[8 : 8 + length])
            self.starts = places_in(header, 8 + length)
            end = max((first + size for first, size in self.starts.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise OSError(f"the header of {self.label} is corrupt: {error}") from error
        if self.size is not None and end > self.size:
            raise OSError(
                f"{self.label} is {self.size:,} bytes; its header promises {end:,}. "
                "Its upload is incomplete"
            )
        return header
