"""Upload an export to the Hub, or list what would be uploaded.

The token comes from where the Hub's client looks for it (`HF_TOKEN`, or `hf auth login`), goes to
the Hub alone, and is in no file, log or message here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from srlm_lite.errors import UserError


def check_repo(repo: str) -> None:
    """Make sure, before any work, that an upload can be tried.

    Raises:
        UserError: Not a repository's name, or there is no token.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(str(error).split(".")[0], where=f"--push-to-hub {repo}") from error
    if repo.count("/") != 1:
        raise UserError("expected ORG/NAME", where=f"--push-to-hub {repo}")
    if get_token() is None:
        raise UserError(
            "there is no token for the Hub",
            where=f"--push-to-hub {repo}",
            way_out="Run `hf auth login`, or set HF_TOKEN",
        )


def files_of(folder: Path) -> list[tuple[str, int]]:
    """Name and bytes of every file that an upload of this folder takes."""
    return sorted(
        (str(file.relative_to(folder)), file.stat().st_size)
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith(".")
    )


def push(folder: Path, repo: str, *, public: bool, message: str) -> str:
    """Upload a folder in one commit, and return its address.

    Nobody sees half of it: the commit comes after all files. When an upload breaks off, the same
    call sends only what the Hub does not have yet.

    Raises:
        UserError: The Hub refuses, cannot be reached, or has a public repository of that name
            where `public` was not asked for.
    """
    api = HfApi()
    try:
        address: Any = api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.repo_info(repo).private:
            raise UserError(
                "exists and is public",
                where=f"--push-to-hub {repo}",
                way_out="Say --public, or choose another name",
            )
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, ignore_patterns=[".*"]
        )
    # The client wraps what goes wrong with one file in a bare RuntimeError.
    except (HfHubHTTPError, httpx.HTTPError, OSError, RuntimeError) as error:
        raise UserError(
            _reason(error),
            where=f"--push-to-hub {repo}",
            way_out="The same command goes on where it stopped",
        ) from error
    return str(address)


def _reason(error: BaseException | None) -> str:
    """What went wrong, without the words of the libraries: those may quote the request."""
    kind = type(error).__name__
    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            status = error.response.status_code
            known = {401: "the Hub does not accept the token", 403: "the token may not write here"}
            return known.get(status, f"the Hub refused (status {status})")
        error = error.__cause__
    return f"the Hub cannot be reached ({kind})"
