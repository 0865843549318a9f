"""The loop on a real language model, SmolLM2-135M."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from forked import ended

from srlm_lite.model.whereabouts import SMOLLM2_WHEEL, smollm2_file
from srlm_lite.run.files import read_json, read_jsonl
from srlm_lite.run.run import RunDir

pytestmark = pytest.mark.skipif(smollm2_file() is None, reason=f"no SmolLM2 here ({SMOLLM2_WHEEL})")


def srlm_lite(*arguments: object) -> str:
    """Run the real command; its stdout. Fails with what it said on stderr."""
    done = ended("-m", "srlm_lite", *map(str, arguments))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_demo_in_small(tmp_path: Path) -> None:
    """The recipe of `make demo` with fewer prompts, on its shipped anchor: every stage, of the
    evaluations that of the judge."""
    out = tmp_path / "out"
    table = srlm_lite(
        *("iterate", "--recipe", "smollm2-135m-demo", "--adapters", out, "--iterations", 1),
        *("--set", "anchor.ift_limit=2", "--set", "prompts.per_iteration=2"),
        *("--set", "rollout.n=3", "--set", "rollout.max_new_tokens=64"),
        *("--set", "pairing.min_pairs=1", "--set", "pairing.drop_truncated=false"),
        *("--set", "judge.votes=1", "--set", "judge.min_votes=1", "--set", "dpo.epochs=1"),
        *("--set", "evaluate.policy_prompts=0", "--set", "evaluate.eft_prompts=1"),
    )
    assert "M1, anchor" in table and "M2, iteration 1" in table
    run = RunDir(out)
    delta = next(row for row in run.read_metrics() if row["stage"] == "delta")
    assert delta["step0_loss"] == pytest.approx(math.log(2), abs=1e-3)
    judge = read_json(run.anchor.evaluation)["judge"]
    assert judge["parse_rate"] > 0.9  # the shipped anchor does know how to grade
    assert judge["pairwise_accuracy"] > 0.75
    for pair in read_jsonl(run.iteration(1).pairs):
        assert pair["chosen_score"] > pair["rejected_score"]
    shown = srlm_lite("show", "pairs", "--adapters", out, "--limit", 1)
    assert "chosen" in shown and "rejected" in shown and "Score:" in shown


@pytest.mark.slow
def test_one_iteration_on_human_scored_replies(shared_data: Path, tmp_path: Path) -> None:
    """In NF4, from `data prepare` on ranked human replies to the judge against human order."""
    data, out, rubric = tmp_path / "data", tmp_path / "out", tmp_path / "short.yaml"
    rubric.write_text(
        "min: 0\nmax: 5\ntemplate: |-\n  Grade the reply from 0 to 5. Question: {{prompt}}\n"
        "  Reply: {{response}}\n  End with: Score: n\n"
    )
    source = shared_data / "oasst2_quality.jsonl"
    counts: dict[str, Any] = json.loads(
        srlm_lite(
            *("data", "prepare", "--source", source, "--format", "ranked"),
            *("--score-column", "quality", "--out", data, "--json"),
        )
    )
    assert counts["files"]["eft_eval.jsonl"]["rows"] == 316
    srlm_lite(
        *("iterate", "--recipe", "smollm2-135m", "--adapters", out, "--iterations", 1),
        *("--set", f"data.dir={data}", "--set", "base.quantization=nf4"),
        *("--set", f"prompts.file={shared_data / 'prompts_generated.jsonl'}"),
        *("--set", "prompts.per_iteration=4", "--set", "pairing.min_pairs=1"),
        *("--set", "anchor.ift_limit=2", "--set", "anchor.eft_prompts=8"),
        *("--set", "anchor.learning_rate=1e-3", "--set", "anchor.batch_size=2"),
        *("--set", "anchor.micro_batch_size=2", "--set", f"judge.rubric={rubric}"),
        *("--set", "evaluate.eft_prompts=2", "--set", "evaluate.policy_prompts=2"),
        *("--set", "rollout.max_new_tokens=24", "--set", "base.window=256"),
    )
    judge = read_json(RunDir(out).iteration(1).evaluation)["judge"]
    assert judge["prompts"] == 2
    for name in ("pairwise_accuracy", "five_best", "exact_match", "spearman", "kendall"):
        assert name in judge


def test_self_instruct_writes_new_prompts(tmp_path: Path) -> None:
    """SmolLM2 itself continues lists of requests; what it writes passes the filters."""
    from srlm_lite.recipe import load_recipe
    from srlm_lite.session import Session
    from srlm_lite.stages.seed_data import read_ift
    from srlm_lite.stages.self_instruct import write_prompts

    demo = load_recipe("smollm2-135m-demo")
    recipe = load_recipe(
        "smollm2-135m",
        [
            f"data.dir={demo.data.dir}",
            "seed=4",  # most of what the base writes is filtered: with this one it takes two rounds
            "prompts.source=self-instruct",
            "prompts.per_iteration=2",
            "rollout.chunk_prompts=2",
        ],
    )
    run = RunDir(tmp_path)
    run.open(recipe, {})
    session = Session(recipe, run)
    # An adapter that changes nothing: the anchor is then the base.
    fresh = session.slot.fresh(recipe.anchor.lora, seed=0)
    fresh.save(run.anchor.adapter, base_name=recipe.base.name)
    prompts, facts = write_prompts(session, run.iteration(1))
    texts = [prompt.text for prompt in prompts]
    assert len(set(texts)) == 2
    assert not set(texts) & {row.prompt for row in read_ift(recipe)}
    assert {prompt.source for prompt in prompts} == {"self-instruct"}
    assert isinstance(facts["filtered"], dict)
