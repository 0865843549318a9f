"""DNO with a teacher and a side-by-side judge behind a real server, through the real command."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from chat_server import transformers_serve
from commands import Cli
from forked import ended

from srlm_lite.loop import iterate
from srlm_lite.methods.dno import render
from srlm_lite.recipe import load_recipe
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt, Reply
from srlm_lite.run.files import read_records
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.tasks import toy

TEMPLATE = "show me the Score for each answer.\nquestion: {{prompt}}\n{{responses}}"
REPLIES = 3  # the teacher's, and two of the policy's


def side_by_side_rows(n: int) -> list[dict[str, str]]:
    """Questions of the side-by-side judge with the gold scores as replies."""
    rng = random.Random("side by side")
    rows = []
    for number, prompt in enumerate(rng.sample(toy.prompts(held_out=False), n)):
        replies = [toy.sample_answer(rng, prompt, rng.choice((0.1, 0.9))) for _ in range(REPLIES)]
        scores = [int(sum(toy.gold(prompt, reply).values())) for reply in replies]
        said = "\n".join(f"Score {i}: {score}" for i, score in enumerate(scores, start=1))
        question = render(TEMPLATE, prompt, replies)
        rows.append({"prompt_id": f"s{number}", "prompt": question, "response": said})
    return rows


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy base, taught to answer and to grade side by side, as a model of its own."""
    folder = tmp_path_factory.mktemp("served")
    extra = folder / "extra.jsonl"
    extra.write_text("".join(json.dumps(row) + "\n" for row in side_by_side_rows(64)))
    recipe = load_recipe(
        "tiny",
        ["base.quantization=none", "iterations=0", f"data.extra={extra}",
         "anchor.use_eft=false", "anchor.ift_limit=24", "anchor.epochs=5", "anchor.batch_size=4",
         "anchor.micro_batch_size=4", "anchor.lora.rank=8", "anchor.lora.alpha=16",
         "evaluate.policy_prompts=0", "evaluate.eft_prompts=1", "evaluate.votes=1"],
    )  # fmt: skip
    run = RunDir(folder / "run")
    run.open(recipe, {"versions": {}})
    iterate(Session(recipe, run))
    out = folder / "model"
    command = ["export", "--adapters", str(run.path), "--iteration", "anchor", "--out", str(out)]
    exported = ended("-m", "srlm_lite", *command)
    assert exported.returncode == 0, exported.stderr
    config = out / "generation_config.json"
    told = {**json.loads(config.read_text()), "do_sample": True, "top_k": 0}
    config.write_text(json.dumps(told))
    return out


@pytest.mark.slow
def test_a_teacher_and_a_judge_behind_a_server(served: Path, tmp_path: Path, cli: Cli) -> None:
    template = tmp_path / "side.txt"
    template.write_text(TEMPLATE)
    sets = {
        "method": "dno",
        "dno.teacher": "server",
        "dno.grading": "side-by-side",
        "dno.template": str(template),
        "dno.least_positive": 1,
        "dno.margin": 1,
        "judge.engine": "openai",
        "judge.votes": 1,
        "judge.min_votes": 1,
        "judge.max_new_tokens": 24,
        "openai.model": str(served),
        "openai.parallel": 1,  # the server's seeds are global
        "base.quantization": "none",
        "iterations": 1,
        "anchor.ift_limit": 16,
        "anchor.eft_prompts": 16,
        "prompts.per_iteration": 6,
        "rollout.n": REPLIES - 1,
        "pairing.min_pairs": 1,
        "pairing.drop_truncated": "false",
        "evaluate.eft_prompts": 1,
        "evaluate.votes": 1,
        "evaluate.policy_prompts": 0,
    }
    out = tmp_path / "out"
    with transformers_serve(served) as url:
        settings = [f"{key}={value}" for key, value in {**sets, "openai.url": url}.items()]
        options = [word for setting in settings for word in ("--set", setting)]
        done = cli("iterate", "--recipe", "tiny", "--adapters", out, *options)
    assert done.returncode == 0, done.stderr
    place = RunDir(out).iteration(1)
    prompts = read_records(place.prompts, Prompt)
    taught = read_records(place.teacher_candidates, Candidate)
    assert [row.prompt_id for row in taught] == [row.prompt_id for row in prompts]
    assert all(row.text and "#teacher-" in row.candidate_id for row in taught)
    assert len(read_records(place.candidates, Candidate)) == 6 * (REPLIES - 1)
    assert len(read_records(place.replies, Reply)) == 6
    votes = read_records(place.judgements, Judgement)
    known = {row.candidate_id for path in place.judged_candidates
             for row in read_records(path, Candidate)}  # fmt: skip
    assert {row.candidate_id for row in votes} <= known and len(votes) > 6 * 2
    readable = [row for row in votes if row.score is not None]
    assert len(readable) > len(votes) / 2
    assert any("#teacher-" in row.candidate_id for row in readable)
    scores = {row.candidate_id: row.score for row in readable}
    pairs = read_records(place.pairs, PreferencePair)
    assert pairs
    for pair in pairs:
        assert (pair.chosen_score, pair.rejected_score) == (
            scores[pair.chosen_id],
            scores[pair.rejected_id],
        )
