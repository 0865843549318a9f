"""Runs made by hand for the tests of export and chat: real files, adapters of random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from srlm_lite.model.base import base_files
from srlm_lite.model.stack import Adapter
from srlm_lite.recipe import recipe_from
from srlm_lite.records import Candidate, Prompt
from srlm_lite.run.files import write_json, write_records
from srlm_lite.run.layout import StageDir
from srlm_lite.run.run import RunDir

TARGETS = ("q_proj", "v_proj", "down_proj")


def random_adapter(base: Path, *, seed: int, rank: int = 4, size: float = 0.05) -> Adapter:
    """On every target of the base, with updates of about this size an element."""
    from srlm_lite.model.checkpoint import Checkpoint

    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for infos in Checkpoint(base).shards.values():
        for info in infos:
            module = info.name.removesuffix(".weight")
            if module.endswith(TARGETS):
                out, into = info.shape
                a = torch.randn(rank, into, generator=generator)
                b = torch.randn(out, rank, generator=generator) * size / rank**0.5
                factors[module] = (a, b)
    return Adapter(rank=rank, alpha=2.0 * rank, factors=factors)


def make_run(
    path: Path,
    base: Path | str,
    *,
    adapters: list[Adapter],
    method: str = "self-rewarding",
    more: Mapping[str, Mapping[str, Any]] | None = None,
    **base_: Any,
) -> RunDir:
    """A finished run: the first adapter is the anchor, each other one an iteration's delta."""
    told = more or {}
    recipe = recipe_from(
        {
            "name": "by-hand",
            "method": method,
            "base": {"name": str(base), "device": "cpu", "window": 512, **base_},
            "data": {"dir": "nowhere"},
            "iterations": len(adapters) - 1,
            "anchor": {"lora": {"rank": adapters[0].rank, "targets": TARGETS}},
            "dpo": {
                "lora": {"rank": adapters[-1].rank, "targets": TARGETS},
                **told.get("dpo", {}),
            },
            "rollout": {"max_new_tokens": 16, "temperature": 0, **told.get("rollout", {})},
            "judge": {"max_new_tokens": 8, "retry_max_new_tokens": 8},
        },
        where="test",
    )
    run = RunDir(path)
    run.open(recipe, {"versions": {}})
    run.hold_to_base(base_files(recipe.base).source)
    adapters[0].save(run.anchor.adapter, base_name=str(base))
    finish(run.anchor, length=100)
    for number, delta in enumerate(adapters[1:], start=1):
        place = run.iteration(number)
        delta.save(place.delta, base_name=str(base))
        write_records(place.prompts, [Prompt("p1", "How do I look after a bicycle?")])
        answer = Candidate("p1", "p1#0", "Keep it clean, and oil the chain.", 9, "stop")
        write_records(place.candidates, [answer])
        finish(place, length=100 + 60 * number, pairs={"pairs": 7 * number})
    return run


def finish(place: StageDir, *, length: float, **counts: Any) -> None:
    judge = {
        "pairwise_accuracy": 0.75,
        "tie_rate": 0.1,
        "parse_rate": 0.98,
        "pairs": 40,
        "score_histogram": {"2": 4, "3": 4},
    }
    write_json(place.evaluation, {"judge": judge, "policy": {"mean_length_chars": length}})
    place.finish(iteration=0, seconds=1.0, counts=counts)


def parity(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "parity.json").read_text()))


def as_the_card_says(folder: Path, **places: str) -> Any:
    """The model that an export's card loads, with these names in the place of its dots."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    for name, value in {"place": str(folder), **places}.items():
        assert f'{name} = "..."' in code, (name, code)
        code = code.replace(f'{name} = "..."', f"{name} = {value!r}")
    assert '"..."' not in code
    given: dict[str, Any] = {}
    exec(code, given)
    return given["model"]
