"""What has to be imported before a benchmark imports anything else."""

from __future__ import annotations

from typing import Literal

from srlm_lite.model.unsloth_backend import import_first

Backend = Literal["transformers", "unsloth"]


def prepare(backend: Backend) -> None:
    """See `import_first`; nothing for the plain backend."""
    if backend == "unsloth":
        import_first()
