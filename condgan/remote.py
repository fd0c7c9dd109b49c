"""Checkpoints on the Hugging Face hub: downloads, and errors that say what to do."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from condgan import __version__

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

_NOT_HERE = (
    "it is not in the cache, nor is there a folder of that name here, and the hub does not answer or offline mode "
    "is on (local_files_only or HF_HUB_OFFLINE): check the connection and these, or the path."
)


class CheckpointError(ValueError):
    """A checkpoint cannot be found, read or written; the message says which file, what is wrong and what to do."""


def download(
    repo_id: str,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    """The folder of the cache that holds both files of a checkpoint, of one commit, downloaded if need be.

    Args:
        repo_id: ``"org/repo"``.
        revision: branch, tag or commit; None for the main branch.
        cache_dir: where downloads are kept; None for the cache of ``huggingface_hub``.
        token: access token; None for the one that is stored, if any.
        local_files_only: make no network call.

    Raises:
        CheckpointError: they cannot be downloaded; the message says why.
    """
    from huggingface_hub import hf_hub_download

    folder = Path()
    for filename in (CONFIG_NAME, WEIGHTS_NAME):
        if not local_files_only:
            _check_answer(repo_id, filename, revision, cache_dir, token)
        with _quiet_hub(), hub_errors(f"download {filename} from", repo_id, revision):
            path = hf_hub_download(
                repo_id,
                filename,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                library_name="condgan",
                library_version=__version__,
            )
        folder = Path(path).parent
        revision = folder.name  # the commit: somebody may push between the two files
    return folder


def _check_answer(
    repo_id: str, filename: str, revision: str | None, cache_dir: str | Path | None, token: str | bool | None
) -> None:
    """Ask the hub for a file that is not in the cache, once: a download asks for minutes where nobody answers."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    with hub_errors(f"download {filename} from", repo_id, revision, otherwise=_NOT_HERE):
        if try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision) is None:
            with suppress(errors.HfHubHTTPError, errors.OfflineModeIsEnabled):  # the download tells them
                get_hf_file_metadata(hf_hub_url(repo_id, filename, revision=revision), token=token)


_hushing = threading.Lock()
_levels: list[int] = []
"""Of ``huggingface_hub``'s logger, as those that are in :func:`_quiet_hub` found it, the first of them first."""


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Let ``huggingface_hub`` log errors only: what it warns of, such as that it tries again, our own error says.

    Of several threads in such a block the last one to leave it puts the level back.
    """
    logger = logging.getLogger("huggingface_hub")
    with _hushing:
        _levels.append(logger.level)
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        with _hushing:
            left = _levels.pop()
            if not _levels:
                logger.setLevel(left)


@contextmanager
def hub_errors(
    action: str,
    repo_id: str,
    revision: str | None,
    otherwise: str = "check the connection and the free disk space, then try again.",
) -> Iterator[None]:
    """Turn whatever ``huggingface_hub`` raises into a :class:`CheckpointError` that says what to do.

    ``otherwise`` is said of what is neither an answer of the hub nor one of its own errors.
    """
    from huggingface_hub import errors

    login = "pass token= or run `hf auth login`"
    absent = f"there is no such repository on the hub, nor a folder of that name here: check it; if private, {login}."
    advice: tuple[tuple[type[Exception], str], ...] = (  # the first that fits: subclasses come before their bases
        (errors.GatedRepoError, f"it is gated: ask for access on its page, then {login}."),
        (errors.RepositoryNotFoundError, absent),
        (errors.RevisionNotFoundError, f"it has no revision {revision!r}: check the branch, tag or commit."),
        (errors.LocalEntryNotFoundError, _NOT_HERE),
        (errors.EntryNotFoundError, f"it has no such file. A checkpoint is {CONFIG_NAME} with {WEIGHTS_NAME}."),
        (errors.OfflineModeIsEnabled, "offline mode is on: unset HF_HUB_OFFLINE."),
        (errors.HFValidationError, "a hub id looks like 'org/repo'."),
        (errors.LocalTokenNotFoundError, f"no token is stored: {login}."),
        (errors.HfHubHTTPError, f"the hub refused. If it is about permission, {login}."),
        (Exception, otherwise),
    )
    try:
        yield
    except Exception as error:  # also what its HTTP client raises, which is another one in each major version
        text = next(text for kind, text in advice if isinstance(error, kind))
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"cannot {action} {repo_id!r}: {text} ({reason})") from error
