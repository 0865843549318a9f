"""A tiny base of any family through the loop, and its exports beside PEFT on the base itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import Cli, Done
from families import ALIKE, PLAIN, TREE

from srlm_lite.rollout.transformers_engine import TransformersEngine
from srlm_lite.shipped import recipes_dir

FAST = (
    "method=spin",  # one that needs nothing of a judge: here it writes noise
    f"data.ranked={recipes_dir() / 'toy' / 'ranked.jsonl'}",
    "prompts.per_iteration=4",
    "pairing.drop_truncated=false",
    "pairing.min_pairs=1",
    "rollout.max_new_tokens=10",
    "judge.votes=1",
    "judge.min_votes=1",
    "judge.max_new_tokens=8",
    "judge.retry_max_new_tokens=8",
    "anchor.ift_limit=8",
    "anchor.batch_size=4",
    "anchor.micro_batch_size=4",
    "anchor.learning_rate=2e-2",
    "dpo.learning_rate=1e-2",
    "anchor.eft_prompts=8",
    "evaluate.policy_prompts=2",
    "evaluate.eft_prompts=1",
    "evaluate.votes=1",
)
"""Settings with which one iteration takes seconds, and goes through every stage."""


def options(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def iterate(
    cli: Cli, base: Path, folder: Path, settings: Sequence[str] = (), recipe: str = "tiny"
) -> Done:
    """One iteration on a base."""
    told = options([*FAST, f"base.name={base}", *settings])
    return cli("iterate", "--recipe", recipe, "--iterations", "1", "--adapters", folder, *told)


def stages(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows of `metrics.jsonl` by stage, those of the iteration over those of the anchor."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {row["stage"]: row for row in map(json.loads, lines)}


def adapted(folder: Path) -> set[str]:
    """Last names of the layers that the anchor adapts, and those without their numbers."""
    from safetensors import safe_open

    with safe_open(folder / "anchor" / "adapter_model.safetensors", "pt") as file:
        names = {key for key in file.keys() if ".lora_A" in key}  # noqa: SIM118 it is no dict
    bare = {re.sub(r"\.lora_A.*", "", name.removeprefix("base_model.model.")) for name in names}
    return {re.sub(r"\.\d+\.", ".N.", name) for name in bare}


def watch_sampling(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The ways in which answers are sampled from now on: the tree or not, with padding or not."""
    ways: set[str] = set()

    def watched(name: str, way: Callable[[TransformersEngine], str]) -> None:
        original = getattr(TransformersEngine, name)

        def method(self: TransformersEngine, *args: Any) -> Any:
            try:
                return original(self, *args)
            finally:
                ways.add(way(self))

        monkeypatch.setattr(TransformersEngine, name, method)

    watched("_run", lambda engine: TREE)
    watched("_run_plain", lambda engine: ALIKE if engine._pads is False else PLAIN)
    return ways


def logits(model: Any) -> Any:
    """Logits of ids drawn at random, longer than the window of any family in the tests."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 130, (2, 40), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def loaded(folder: Path) -> Any:
    """An export or a base as transformers loads it, with no tensor missing or left over."""
    import torch
    import transformers

    hf: Any = transformers
    model, told = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    wrong = {what: names for what, names in told.items() if names}
    assert not wrong, wrong
    return model.eval()


def peft_logits(base: Path, adapter: Path) -> tuple[Any, Any]:
    """Logits of the base, and of PEFT's model of an exported adapter on it."""
    from peft import PeftModel

    model = loaded(base)
    before = logits(model)
    return before, logits(PeftModel.from_pretrained(model, adapter).eval())
