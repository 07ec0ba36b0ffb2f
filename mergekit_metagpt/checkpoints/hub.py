"""Asks the hub for a repository, and explains its answer in one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mergekit_metagpt.checkpoints.nearby import nearest
from mergekit_metagpt.checkpoints.ranges import AGAIN, TIMEOUT_S

T = TypeVar("T")


def require_repository(path: str, revision: str | None) -> None:
    """Check by a single request that the hub has a repository, or raise a ValueError.

    Without a network, huggingface_hub would retry its own requests for half a minute.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if "://" in path:
        named = re.match(r"https://huggingface\.co/([\w.-]+/[\w.-]+)$", path)
        name = named[1] if named else "OWNER/NAME"
        raise ValueError(
            f"{path} is an address; expected the name of a repository, such as {name}"
        )
    if "$" in path:
        raise ValueError(
            f"{path} is not a folder: variables stay as they are written. Write the "
            "whole path"
        )

    def ask() -> None:
        try:
            HfApi().model_info(path, revision=revision, timeout=TIMEOUT_S)
        except HfHubHTTPError as error:
            if error.response.status_code not in AGAIN:
                raise
            # The server is busy: mergekit's own requests are repeated.

    try:
        explained(f"{path}@{revision}" if revision else path, ask)
    except (ValueError, OSError) as error:
        meant = nearest(Path(path), folders=True)
        hint = f" (did you mean {meant}?)" if meant else ""
        raise ValueError(
            f"{path} is not a folder in {Path.cwd()}{hint}. As a repository: {error}"
        ) from error


def explained(label: str, work: Callable[[], T]) -> T:
    """Return what `work` gets from the hub; explain errors in one sentence.

    Raises a ValueError if the label is not the name of a repository; an OSError if the
    hub cannot be reached, or refuses the request.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub, login = constants.ENDPOINT, "log in with `hf auth login`, or set HF_TOKEN"
    try:
        return work()
    except HFValidationError as error:
        raise ValueError(
            f"{label} is not the name of a repository, such as OWNER/NAME. For a "
            f"folder, write its path, such as ./{label}"
        ) from error
    except (OfflineModeIsEnabled, EntryNotFoundError, HTTPError) as error:
        match error:
            case OfflineModeIsEnabled():
                why = (
                    " cannot be read: HF_HUB_OFFLINE is set. Unset it, or name a local "
                    "folder"
                )
            case GatedRepoError():
                why = f" is gated: accept its conditions on {hub}, then {login}"
            case RepositoryNotFoundError():
                why = (
                    f" is not on {hub}, or is private. Check its name; if it is "
                    f"private, {login}"
                )
            case RevisionNotFoundError():
                why = (
                    ": the repository has no such revision; expected a branch, a tag "
                    "or a commit"
                )
            case EntryNotFoundError():
                why = f" lacks a file that it lists: {str(error).splitlines()[-1]}"
            case HfHubHTTPError():
                status = error.response.status_code
                denied = f"; {login}" if status in (401, 403) else ""
                why = f" cannot be read: {hub} answered with status {status}{denied}"
            case _:
                why = (
                    f" cannot be read: {hub} cannot be reached "
                    f"({str(error) or type(error).__name__}). Check the network, or "
                    "name a local folder"
                )
        raise OSError(f"{label}{why}") from error
