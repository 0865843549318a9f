"""Upload an export to the Hub, or list what would be uploaded.

The token comes from where the Hub's client looks for it (`HF_TOKEN`, or `hf auth login`), goes to
the Hub alone, and is in no file, log or message here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import logging as client_logging
from huggingface_hub.utils._validators import validate_repo_id
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from srlm_lite.errors import UserError

LARGE = (".safetensors", ".gguf")
"""Ends of names of the files that go up one by one, before the commit."""
_WEIGHTS = (".safetensors", ".bin", ".index.json", "adapter_config.json")
"""Ends of names of files that decide what loading a repository gives."""


def check_repo(repo: str, *, needs_token: bool = True) -> None:
    """Make sure, before any work, that an upload can be tried.

    Args:
        needs_token: Not for a list of what would go up.

    Raises:
        UserError: Not a repository's name, or there is no token.
    """
    where = f"--push-to-hub {repo}"
    _check_name(repo, where)
    if needs_token and get_token() is None:
        raise UserError(
            "there is no token for the Hub",
            where=where,
            way_out="Run `hf auth login`, or set HF_TOKEN",
        )


def check_base_id(name: str) -> None:
    """Make sure that an adapter's base is named as the Hub names models: ORG/NAME[@REVISION].

    Raises:
        UserError: It is not, such as a path of this machine.
    """
    _check_name(name.partition("@")[0], f"--base-id {name}")


def _check_name(repo: str, where: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        said = str(error).removesuffix(".")
        raise UserError(said, where=where, way_out="Choose another name") from error
    if repo.count("/") != 1:
        raise UserError("expected ORG/NAME", where=where)


def files_of(folder: Path) -> list[tuple[str, int]]:
    """Name and bytes of every file that an upload of this folder takes."""
    return sorted(
        (str(file.relative_to(folder)), file.stat().st_size)
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith(".")
    )


def push(
    folder: Path,
    repo: str,
    *,
    public: bool,
    message: str,
    bars: bool = False,
    on_file: Callable[[str, int], None] = lambda name, size: None,
) -> str:
    """Upload a folder in one commit, and return its address.

    Nobody sees half of it: the commit comes after all files. The large ones go up one after the
    other, and each is whole at the Hub before the next begins; when an upload breaks off, the same
    call sends only what the Hub does not have yet.

    Args:
        bars: Let the client draw its bars on stderr.
        on_file: Told of each large file, and its bytes, before it is sent or found there.

    Raises:
        UserError: The Hub refuses or cannot be reached, or has a repository of that name that is
            public where `public` was not asked for, private where it was, or of other weights.
    """
    api = HfApi()
    files = files_of(folder)
    try:
        with _quiet(bars=bars):
            address: Any = api.create_repo(repo, private=not public, exist_ok=True)
            names = [name for name, _ in files]
            _check_what_is_there(repo, api.repo_info(repo), names, public=public)
            additions = []
            for name, size in files:
                addition = CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name)
                additions.append(addition)
                if name.endswith(LARGE):
                    on_file(name, size)
                    api.preupload_lfs_files(repo, [addition])
            # One commit, unlike `upload_folder`, which may split it.
            api.create_commit(repo, additions, commit_message=message)
    # The client wraps what goes wrong with one file in a bare RuntimeError, and does not expect
    # answers that are not a Hub's.
    except (HfHubHTTPError, httpx.HTTPError, OSError, RuntimeError, ValueError, KeyError) as error:
        reason, way_out = _reason(error)
        raise UserError(reason, where=f"--push-to-hub {repo}", way_out=way_out) from error
    return str(address)


@contextmanager
def _quiet(*, bars: bool) -> Iterator[None]:
    """Keep the client from telling of each retry: it quotes addresses that are signed."""
    verbosity, drawn = client_logging.get_verbosity(), not are_progress_bars_disabled()
    client_logging.set_verbosity(logging.ERROR)
    if not bars:
        disable_progress_bars()
    try:
        yield
    finally:
        client_logging.set_verbosity(verbosity)
        if drawn:
            enable_progress_bars()


def _check_what_is_there(repo: str, facts: Any, names: Sequence[str], *, public: bool) -> None:
    where = f"--push-to-hub {repo}"
    if facts.private is public:
        raise UserError(
            "exists and is " + ("private" if public else "public"),
            where=where,
            way_out=f"{'Leave out' if public else 'Say'} --public, or choose another name",
        )
    there = sorted(file.rfilename for file in facts.siblings or ())
    if other := [name for name in there if name.endswith(_WEIGHTS) and name not in names]:
        # Beside ours, they would be loaded in place of ours.
        raise UserError(
            f"holds other weights ({other[0]})",
            where=where,
            way_out="Choose another name, or delete them there",
        )


def _reason(error: BaseException) -> tuple[str, str]:
    """What went wrong, and the way out, without the libraries' words: those may quote a request."""
    again = "The same command goes on where it stopped"
    status = _status(error)
    if status == 404 and "xet-write-token" in str(error):
        return "this Hub does not offer Xet", "Set HF_HUB_DISABLE_XET=1, so that it goes without"
    if status == 401:
        return "the Hub does not accept the token", "Run `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return "the token may not write here", "Use one that may, or choose another name"
    if status is not None:
        return f"the Hub refused (status {status})", again
    kind = type(error).__name__
    if isinstance(error, (ValueError, KeyError)):
        return f"what answers is not a Hub ({kind})", "Look at HF_ENDPOINT"
    return f"the Hub cannot be reached ({kind})", again


def _status(error: BaseException | None) -> int | None:
    """The status that the Hub, or the storage behind it, has answered with."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return error.response.status_code
        # hf_xet has no class for it, only words.
        if isinstance(error, OSError) and (found := re.search(r"error \((\d{3}) ", str(error))):
            return int(found[1])
        error = error.__cause__
    return None
