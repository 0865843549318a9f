"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "bad", "absent"]
"""`bad`: srlm-lite does not work like this. `warning`: it works, but not as tested or not all of
it. `absent`: something nobody has to have."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found, and what to do about it.

    Args:
        facts: The values behind the text, for `--json`.
    """

    state: State
    name: str
    text: str
    way_out: str | None = None
    facts: dict[str, object] | None = None
