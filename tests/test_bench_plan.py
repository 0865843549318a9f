"""`bench plan`: every phase of a recipe is run, at the batch that the plan counts with.

Here all of them run in this process, so that nothing can be said of their peaks: those are held
against the plan in test_plan.py, byte by byte.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import Cli

from srlm_lite.bench import plan as bench
from srlm_lite.planning.rates import known_rates

SMALL = (
    "base.quantization=none",
    "base.dtype=float32",
    "base.window=128",
    "rollout.max_new_tokens=16",
    "judge.max_new_tokens=16",
    "judge.retry_max_new_tokens=16",
    "rollout.chunk_prompts=2",
    "anchor.batch_size=4",
    "anchor.micro_batch_size=2",
    "dpo.batch_size=4",
    "dpo.micro_batch_size=2",
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, for the rates."""
    monkeypatch.setenv("SRLM_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("recipe", "more", "phases"),
    [
        ("toy", (), []),
        (
            "toy-rlhf",
            ("rlhf.reward.batch_size=4", "rlhf.reward.micro_batch_size=2"),
            ["reward model"],
        ),
        ("toy-rlaif", ("rlaif.sft.batch_size=4", "rlaif.sft.micro_batch_size=2"), ["revision SFT"]),
    ],
)
def test_every_phase_runs_at_the_plan_s_batch(
    recipe: str,
    more: tuple[str, ...],
    phases: list[str],
    cli: Cli,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "apart", lambda way, job: way(job))
    settings = [word for one in (*SMALL, *more) for word in ("--set", one)]
    chosen = ["--phases", ",".join(phases)] if phases else []
    done = cli("bench", "plan", "--recipe", recipe, "--json", *settings, *chosen)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    rates = row["tokens_per_s"]
    every = ["load", "candidates", "judge", "anchor SFT", "DPO", "evaluation", "export"]
    assert list(row["phases"]) == (phases or every)
    assert rates.keys() == row["phases"].keys() - {"load", "export"}
    for name in rates.keys() & {"anchor SFT", "revision SFT", "reward model", "DPO"}:
        phase = row["phases"][name]
        trained = (
            2
            * phase["shape"]["sequences"]
            * phase["shape"]["tokens"]
            * min(2, phase["shape"]["accumulated"])
        )
        assert rates[name] == pytest.approx(trained / phase["seconds"])
    [key] = json.loads((cache / "rates.json").read_text())
    found = known_rates(cache, key)
    assert found is not None and found[0] == rates


def test_a_phase_that_the_recipe_does_not_have_is_told(cli: Cli) -> None:
    done = cli("bench", "plan", "--recipe", "toy", "--phases", "reward model")
    assert done.returncode == 2
    assert "no phase named reward model. Known: load, candidates" in done.stderr
