"""A finished toy run made by hand: the shipped base, and adapters of small random weights.

The base was pretrained on answers and on reviews in the judge's format, so it can do both; what
the adapters add only makes the models differ.
"""

from __future__ import annotations

from pathlib import Path

from exporting import TARGETS, random_adapter

from srlm_lite.model.base import base_files
from srlm_lite.recipe import load_recipe
from srlm_lite.run.run import RunDir

SETTINGS = (
    "evaluate.policy_prompts=12",
    "judge.votes=2",
    "judge.min_votes=1",
    "rollout.chunk_prompts=4",
    f"anchor.lora={{rank: 4, targets: [{', '.join(TARGETS)}]}}",
    f"dpo.lora={{rank: 4, targets: [{', '.join(TARGETS)}]}}",
)


def make_toy_run(path: Path, *, models: int = 3, overrides: tuple[str, ...] = ()) -> RunDir:
    """The anchor and `models - 1` iterations."""
    recipe = load_recipe("toy", [*SETTINGS, f"iterations={models - 1}", *overrides])
    run = RunDir(path)
    run.open(recipe, {"versions": {}})
    run.hold_to_base(base_files(recipe.base).source)
    for number in range(models):
        place = run.iteration(number) if number else run.anchor
        folder = run.iteration(number).delta if number else run.anchor.adapter
        adapter = random_adapter(Path(recipe.base.name), seed=number, size=0.02)
        adapter.save(folder, base_name=recipe.base.name)
        place.finish(iteration=number, seconds=0.0, counts={})
    return run
