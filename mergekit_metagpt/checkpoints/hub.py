"""Asks the hub for a repository, and explains its answer in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mergekit_metagpt.checkpoints.nearby import nearest
from mergekit_metagpt.checkpoints.ranges import AGAIN, TIMEOUT_S

T = TypeVar("T")


def require_repository(path: str, revision: str | None) -> None:
    """Check by a single request that the hub has a repository.

    Without a network, huggingface_hub would retry its own requests for half a minute.

    Args:
        path: name of the repository; not a local folder.
        revision: branch, tag or commit.

    Raises:
        ValueError: the name is invalid, the hub cannot be reached, or it does not have
            the repository.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

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
    """Ask the hub; explain its errors in one sentence.

    Args:
        label: the repository, for messages.
        work: asks the hub.

    Returns:
        what `work` returns.

    Raises:
        ValueError: the label is not the name of a repository.
        OSError: the hub cannot be reached, or refuses the request.
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

    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        return work()
    except OfflineModeIsEnabled as error:
        raise OSError(
            f"{label} cannot be read: HF_HUB_OFFLINE is set. Unset it, or name a local "
            "folder"
        ) from error
    except GatedRepoError as error:
        raise OSError(
            f"{label} is gated: accept its conditions on {constants.ENDPOINT}, then "
            f"{login}"
        ) from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{label} is not on {constants.ENDPOINT}, or is private. Check its name; "
            f"if it is private, {login}"
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(
            f"{label}: the repository has no such revision; expected a branch, a tag "
            "or a commit"
        ) from error
    except EntryNotFoundError as error:
        raise OSError(
            f"{label} lacks a file that it lists: {str(error).splitlines()[-1]}"
        ) from error
    except HFValidationError as error:
        raise ValueError(
            f"{label} is not the name of a repository, such as OWNER/NAME. For a "
            f"folder, write its path, such as ./{label}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        denied = f"; {login}" if status in (401, 403) else ""
        raise OSError(
            f"{label} cannot be read: {constants.ENDPOINT} answered with status "
            f"{status}{denied}"
        ) from error
    except HTTPError as error:
        raise OSError(
            f"{label} cannot be read: {constants.ENDPOINT} cannot be reached "
            f"({str(error) or type(error).__name__}). Check the network, or name a "
            "local folder"
        ) from error
