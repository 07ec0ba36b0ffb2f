"""Reads parts of a file on the hub by HTTP range requests, with patience."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Requests at a time, of all repositories together.
AT_ONCE = 16
# Bytes of a file that are asked for first: headers are rarely longer.
HEAD = 1 << 16
# What safetensors itself refuses to read.
MOST_HEADER = 100_000_000
MOST_JSON = 64_000_000
TRIES = 5
FIRST_WAIT_S = 1.0
MOST_WAIT_S = 300.0
TIMEOUT_S = 30.0
# Answers of a busy server.
AGAIN = frozenset({408, 429, 500, 502, 503, 504})
# A signed address that has expired.
_EXPIRED = frozenset({400, 401, 403, 404, 410})


@dataclass(frozen=True)
class Answer:
    """Bytes of a file, its size, its ETag here and on the hub, and where it lies."""

    content: bytes
    total: int
    etag: str
    linked: str
    url: str


class _Expired(Exception):
    """A redirect that was followed before leads nowhere any more."""


def request(
    what: str, url: str, span: tuple[int, int] | None, *, direct: bool = False
) -> Answer:
    """Get a file or a part of it; try again where the server is busy.

    Args:
        what: the file, for messages.
        url: its address.
        span: its first and last byte that are asked for; all of it if None.
        direct: whether the address is a signed one, which gets no token.

    Returns:
        the answer.

    Raises:
        OSError: it cannot be had, in huggingface_hub's or our own words.
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
            f"{what} ends before byte {span[0]:,}, which its header or size promises: "
            "it has changed, or its upload is not complete"
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
    """A safetensors file of a repository, of which parts are read.

    Attributes:
        label: the file, for messages.
        url: on the hub, at a commit.
        starts: first byte and size of every tensor.
        size: of the file, once it is known.
        linked: the hub's hash of its content, once it is known.
    """

    label: str
    url: str
    starts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    size: int | None = None
    linked: str = ""
    _etag: str | None = None
    _direct: str | None = None

    def read(self, first: int, last: int) -> bytes:
        """Get some of its bytes.

        Args:
            first: the first of them.
            last: the last of them; the file may end before it.

        Returns:
            the bytes.

        Raises:
            OSError: they cannot be had, or the file has changed since it was first
                asked for.
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
            self._etag, self.size, self.linked = (
                answer.etag,
                answer.total,
                answer.linked,
            )
        if (answer.etag, answer.total) != (self._etag, self.size):
            raise OSError(
                f"{self.label} has changed between two requests: an estimate would be "
                "of two versions. Run the command again"
            )
        if answer.url != self.url:
            self._direct = answer.url
        return answer.content

    def read_into(self, first: int, into: memoryview) -> None:
        """Fill a buffer with the bytes of the file from `first` on."""
        into[:] = self.read(first, first + len(into) - 1)

    def read_header(self) -> Mapping[str, Any]:
        """Read the header of a safetensors file, and take `starts` from it.

        Returns:
            what the header says of each tensor.

        Raises:
            OSError: it cannot be had, is corrupt, or promises more than the file holds.
        """
        head = self.read(0, HEAD - 1)
        length = int.from_bytes(head[:8], "little")
        if not 2 <= length <= MOST_HEADER:
            raise OSError(f"{self.label} is no safetensors file. Fetch it yourself")
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
                "Its upload is not complete"
            )
        return header
