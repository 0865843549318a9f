"""What can be put beside something else: a model of a run, or replies that lie in a file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srlm_lite.engines import Role
from srlm_lite.errors import UserError
from srlm_lite.records import Prompt
from srlm_lite.run.files import read_jsonl
from srlm_lite.session import Session

if TYPE_CHECKING:
    from srlm_lite.model.stack import Adapter


@dataclass(frozen=True, slots=True)
class RunModel:
    """A model of a run: an iteration's, 0 for the anchor alone, None for the bare base.

    `digest` changes when its weights do.
    """

    name: str
    digest: str
    session: Session
    iteration: int | None

    def stack(self, role: Role = "policy") -> list[Adapter]:
        """Its adapters, from disk."""
        return [] if self.iteration is None else self.session.stack(self.iteration, role)


@dataclass(frozen=True, slots=True)
class FileModel:
    """Replies in a JSONL file, by prompt id and by prompt text; whose they are is not known."""

    name: str
    path: Path
    by_id: Mapping[str, str]
    by_text: Mapping[str, str]

    def replies(self, prompts: Sequence[Prompt]) -> dict[str, str]:
        """Its reply to each prompt, by the prompt's id.

        Raises:
            UserError: It has none to one of them.
        """
        found = {
            prompt.prompt_id: self.by_id.get(prompt.prompt_id, self.by_text.get(prompt.text))
            for prompt in prompts
        }
        missing = [prompt_id for prompt_id, text in found.items() if text is None]
        if missing:
            raise UserError(
                f"has no reply to {len(missing)} of {len(prompts)} prompts; the first is "
                f"{missing[0]}",
                where=str(self.path),
                way_out="Its rows carry prompt_id or the prompt's text; --prompts names the list",
            )
        return {prompt_id: text for prompt_id, text in found.items() if text is not None}


def read_replies(path: Path) -> FileModel:
    """Replies from a JSONL file.

    A row has a reply (`response`, `text`, `output`) and says what to: `prompt_id`, or the text
    itself (`prompt`, `instruction`). Candidates of a run and AlpacaEval's model outputs are such.

    Raises:
        UserError: A row lacks one of them, or two rows reply to the same prompt.
    """
    by_id: dict[str, str] = {}
    by_text: dict[str, str] = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        reply = _first(row, "response", "text", "output")
        named, prompt = row.get("prompt_id"), _first(row, "prompt", "instruction")
        prompt_id = None if named is None else str(named)  # as prompt lists are read
        if reply is None or (prompt_id is None and prompt is None):
            raise UserError(
                f"row {number} lacks a reply (response, text or output), or what it replies to "
                "(prompt_id, prompt or instruction)",
                where=str(path),
            )
        for key, known in ((prompt_id, by_id), (prompt, by_text)):
            if key is not None and known.setdefault(key, reply) != reply:
                raise UserError(f"row {number} is a second reply to one prompt", where=str(path))
    if not by_id and not by_text:
        raise UserError("holds no replies", where=str(path))
    return FileModel(path.name, path, by_id, by_text)


def _first(row: Mapping[str, Any], *keys: str) -> str | None:
    return next((row[key] for key in keys if isinstance(row.get(key), str)), None)


def digest_of(*parts: Any) -> str:
    """Twelve hex digits that stand for all of these, for the names of files."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def file_name(*names: str) -> str:
    """Names joined for a file's name, without what a file system may dislike."""
    return "-".join(re.sub(r"[^\w.]+", "-", name).strip("-.") or "model" for name in names)
