"""The whole loop on the toy base, on a CPU: what it writes, and that it can be killed."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from commands import Cli
from forked import ended

from srlm_lite.errors import GateError, UserError
from srlm_lite.evaluate.gate import findings
from srlm_lite.loop import iterate
from srlm_lite.methods import method_of
from srlm_lite.progress import Silent
from srlm_lite.recipe import Recipe, load_recipe
from srlm_lite.records import Candidate, TrainingStep
from srlm_lite.run.files import read_json, read_jsonl, read_records, sha256_file, write_records
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.settings import Gate
from srlm_lite.stages.evaluation import evaluation, evaluations

JUDGE_KEYS = {
    "pairwise_accuracy",
    "five_best",
    "exact_match",
    "spearman",
    "kendall",
    "parse_rate",
    "tie_rate",
    "score_histogram",
}


LORA = "{rank: 4, alpha: 8, targets: [q_proj, v_proj]}"
LEAN = (
    "base.quantization=none",
    "evaluate.policy_prompts=4",
    "evaluate.eft_prompts=2",
    "evaluate.votes=1",
    "prompts.per_iteration=8",
    "judge.votes=2",
    "judge.min_votes=1",
    f"anchor.lora={LORA}",
    f"dpo.lora={LORA}",
)
"""Less of everything than in the recipe `tiny`: two chunks, a vote more than one, two layers."""


def tiny(*overrides: str) -> Recipe:
    return load_recipe("tiny", [*LEAN, *overrides])


NF4 = "base.quantization=nf4"
"""As in the recipe `tiny`; without instructions for it, a CPU takes twice the time."""


def run(path: Path, *overrides: str) -> RunDir:
    recipe = tiny(*overrides)
    directory = RunDir(path)
    directory.open(recipe, {})
    iterate(Session(recipe, directory))
    return directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """An undisturbed run: an iteration, and then another one, which it is told of later.

    The killed one is told of both at once, and ends with the same bytes.
    """
    path = tmp_path_factory.mktemp("undisturbed") / "out"
    shorter = run(path, "iterations=1")
    assert shorter.last_done() == 1
    return run(path)


def artefacts(directory: RunDir) -> dict[str, str]:
    """Hashes of all that a run computes; seconds and hardware are no results."""
    return {
        str(file.relative_to(directory.path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.path.rglob("*"))
        if file.is_file()
        and file.suffix != ".sums"
        and file.name not in {"done.json", ".noted.json", "metrics.jsonl", "run.json", ".lock"}
    }


def test_the_run_directory_is_as_documented(finished: RunDir) -> None:
    for place in (finished.anchor, finished.iteration(1), finished.iteration(2)):
        done = read_json(place.done)
        for name, digest in done["sha256"].items():
            assert sha256_file(place.path / name) == digest
        evaluation = read_json(place.evaluation)
        assert evaluation["judge"].keys() >= JUDGE_KEYS
        assert evaluation["policy"].keys() >= {"mean_length_chars", "gold_mean", "gold_se"}
    for t in (1, 2):
        names = {file.name for file in finished.iteration(t).path.iterdir()}
        assert names >= {
            "prompts.jsonl",
            "candidates.jsonl",
            "judgements.jsonl",
            "pairs.jsonl",
            "drops.json",
            "delta",
            "eval.json",
            "done.json",
        }
    assert not finished.scratch.exists()


def test_the_training_leaves_its_curve(finished: RunDir) -> None:
    for place in (finished.iteration(1).delta_place, finished.iteration(2).delta_place):
        facts, curve = read_json(place.training), read_records(place.steps, TrainingStep)
        assert [row.step for row in curve] == list(range(1, facts["steps"] + 1))
        assert curve[0].loss == facts["first_loss"]
        late = curve[-max(1, len(curve) // 4) :]
        assert fmean(row.reward_margin for row in late) == pytest.approx(facts["reward_margin"])
        for row in curve:
            margin = row.reward_chosen - row.reward_rejected
            assert margin == pytest.approx(row.reward_margin, abs=1e-6)


def test_ids_match_from_prompts_to_pairs(finished: RunDir) -> None:
    for place in finished.iterations():
        prompts = {row["prompt_id"]: row["text"] for row in read_jsonl(place.prompts)}
        candidates = {row["candidate_id"]: row for row in read_jsonl(place.candidates)}
        votes: dict[str, list[float | None]] = {}
        for row in read_jsonl(place.judgements):
            votes.setdefault(row["candidate_id"], []).append(row["score"])
        assert len(candidates) == 4 * len(prompts)
        assert votes.keys() <= candidates.keys()
        pairs = [row for row in read_jsonl(place.pairs) if "replay" not in row.get("origin", "")]
        assert pairs
        for pair in pairs:
            chosen, rejected = candidates[pair["chosen_id"]], candidates[pair["rejected_id"]]
            assert chosen["prompt_id"] == rejected["prompt_id"] == pair["prompt_id"]
            assert (chosen["text"], rejected["text"]) == (pair["chosen"], pair["rejected"])
            assert prompts[pair["prompt_id"]] == pair["prompt"]
            assert pair["chosen_score"] > pair["rejected_score"]
            readable = [vote for vote in votes[pair["chosen_id"]] if vote is not None]
            assert pair["chosen_score"] == pytest.approx(sum(readable) / len(readable))
        drops = read_json(place.drops)
        dropped = sum(count for reason, count in drops.items() if reason != "candidates")
        assert len(pairs) + dropped == len(prompts)


def test_prompts_are_new_in_every_iteration(finished: RunDir) -> None:
    first, second = (
        {row["prompt_id"] for row in read_jsonl(finished.iteration(t).prompts)} for t in (1, 2)
    )
    assert len(first) == len(second) == 8
    assert not first & second


def test_metrics_have_a_row_for_each_stage_and_the_proof(finished: RunDir) -> None:
    rows = finished.read_metrics()
    stages = ["prompts", "candidates", "judgements", "pairs", "delta", "evaluation"]
    assert [(row["iteration"], row["stage"]) for row in rows] == [
        (0, "base"),
        (0, "anchor"),
        (0, "evaluation"),
        *((t, stage) for t in (1, 2) for stage in stages),
    ]
    for row in rows:
        assert row["seconds"] >= 0
        if row["stage"] == "delta":
            assert row["step0_loss"] == pytest.approx(math.log(2), abs=1e-3)
            assert row["step0_margin"] == pytest.approx(0, abs=1e-3)


def test_the_judge_s_accuracy_on_the_policy_s_own_candidates(finished: RunDir) -> None:
    from itertools import combinations

    from srlm_lite.tasks.toy import gold

    row = next(row for row in finished.read_metrics() if row["stage"] == "judgements")
    place = finished.iteration(1)
    prompts = {r["prompt_id"]: r["text"] for r in read_jsonl(place.prompts)}
    votes: dict[str, list[float]] = {}
    for judgement in read_jsonl(place.judgements):
        if judgement["score"] is not None:
            votes.setdefault(judgement["candidate_id"], []).append(judgement["score"])
    credits = []
    for a, b in combinations(read_jsonl(place.candidates), 2):
        if a["prompt_id"] != b["prompt_id"] or not {a["candidate_id"], b["candidate_id"]} <= set(
            votes
        ):
            continue
        prompt = prompts[a["prompt_id"]]
        truth = sum(gold(prompt, a["text"]).values()) - sum(gold(prompt, b["text"]).values())
        judge = sum(votes[a["candidate_id"]]) / len(votes[a["candidate_id"]])
        judge -= sum(votes[b["candidate_id"]]) / len(votes[b["candidate_id"]])
        if truth:
            credits.append(0.5 if judge == 0 else float((judge > 0) == (truth > 0)))
    assert row["parse_rate"] == 1.0  # else the unreadable would count as halves
    assert row["gold_pairwise_accuracy"] == pytest.approx(sum(credits) / len(credits), abs=1e-4)


def test_a_finished_run_is_left_alone_and_loads_nothing(finished: RunDir) -> None:
    before = artefacts(finished)
    recipe = tiny()
    session = Session(recipe, finished)
    finished.open(recipe, {})
    iterate(session)
    assert "base" not in session.__dict__
    assert artefacts(finished) == before


def test_a_gate_stops_the_loop_and_another_gate_lets_it_go_on(
    finished: RunDir, tmp_path: Path
) -> None:
    shutil.copytree(finished.path, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "iter_002")
    # One score has a hundredth of the votes for sure: no judge passes.
    with pytest.raises(GateError) as caught:
        run(tmp_path / "out", "evaluate.gate.action=stop", "evaluate.gate.one_score=0.01")
    assert "after iteration 1: the judge gives nearly every reply the score" in str(caught.value)
    assert "--set evaluate.gate.action=warn" in str(caught.value)
    stopped = RunDir(tmp_path / "out")
    assert stopped.last_done() == 1
    assert not stopped.iteration(2).path.exists()
    assert stopped.facts()["recipe"]["evaluate"]["gate"]["action"] == "stop"
    # Gates do not change what is computed.
    assert artefacts(run(tmp_path / "out")) == artefacts(finished)


def test_the_answers_are_graded_by_the_model_and_by_the_anchor(finished: RunDir) -> None:
    first = read_json(finished.anchor.evaluation)["policy"]
    assert first["self_score"] == first["anchor_score"]  # one and the same judge
    policy = read_json(finished.iteration(1).evaluation)["policy"]
    assert policy["score_scale"] == [0.0, 5.0]
    for name in ("self", "anchor"):
        votes: dict[str, list[float]] = {}
        for row in read_jsonl(finished.iteration(1).evaluation_dir / f"grades_{name}.jsonl"):
            if row["score"] is not None:
                votes.setdefault(row["candidate_id"], []).append(row["score"])
        means = [sum(scores) / len(scores) for scores in votes.values()]
        low, high = policy["intervals"][f"{name}_score"]
        assert policy[f"{name}_score"] == pytest.approx(sum(means) / len(means), abs=1e-4)
        assert low <= policy[f"{name}_score"] <= high


def test_a_run_goes_on_by_its_own_recipe_and_with_less_in_memory(
    finished: RunDir, tmp_path: Path, cli: Cli
) -> None:
    shutil.copytree(finished.path, tmp_path / "out")
    last = RunDir(tmp_path / "out").iteration(2)
    shutil.rmtree(last.path)
    settings = ("--set", "dpo.micro_batch_size=2", "--set", "rollout.batch_rows=40")
    done = cli("iterate", "--adapters", tmp_path / "out", *settings)
    assert done.returncode == 0, done.stderr
    assert "resuming tiny" in done.stderr and "M3, iteration 2" in done.stdout
    # Other batches move last bits; what was sampled from the same model is the same.
    before = finished.iteration(2)
    for name in ("prompts", "candidates"):
        assert getattr(last, name).read_bytes() == getattr(before, name).read_bytes()
    facts = read_json(last.delta_place.training)
    assert facts["step0_loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_answers_without_text_have_the_lowest_grade(finished: RunDir, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / "out")
    recipe, mute = tiny(), RunDir(tmp_path / "out")
    place = mute.iteration(2)
    for file in (place.evaluation, *place.evaluation_dir.glob("[gl]*.jsonl")):
        file.unlink()
    answers = place.evaluation_dir / "answers_sampled.jsonl"
    rows = read_records(answers, Candidate)
    write_records(answers, [replace(row, text="", n_tokens=1) for row in rows])
    session = Session(recipe, mute)
    evaluation(session, place, session.stack(2))
    policy = read_json(place.evaluation)["policy"]
    assert policy["anchor_score"] == policy["self_score"] == 0.0
    assert "anchor_score" in {one.gate for one in findings(evaluations(mute), Gate())}


def test_the_judge_s_pick_of_several_answers(finished: RunDir, tmp_path: Path) -> None:
    """Asked of a finished model: its first answer is the sampled one, and the pick the best."""
    shutil.copytree(finished.path, tmp_path / "out")
    copied = RunDir(tmp_path / "out")
    place = copied.iteration(2)
    before = read_json(place.evaluation)
    place.evaluation.unlink()
    session = Session(tiny("evaluate.best_of=3"), copied)
    evaluation(session, place, session.stack(2))
    after = read_json(place.evaluation)
    best = after["policy"].pop("best_of")
    assert after == before
    rows = read_jsonl(place.evaluation_dir / "grades_best_of.jsonl")
    votes: dict[str, list[float | None]] = {}
    for row in rows:
        votes.setdefault(row["candidate_id"], []).append(row["score"])
    answers = read_records(place.evaluation_dir / "answers_best_of.jsonl", Candidate)
    sampled = read_records(place.evaluation_dir / "answers_sampled.jsonl", Candidate)
    assert [one.text for one in answers[::3]] == [one.text for one in sampled]
    assert (best["n"], best["answers"], len(answers)) == (3, 4, 12)
    assert all(len(of_one) == tiny().judge.votes for of_one in votes.values())
    assert best["gold_mean"] >= 0 and best["gold_se"] is not None


def test_the_divergence_is_measured_where_no_answer_is_graded(
    finished: RunDir, tmp_path: Path
) -> None:
    shutil.copytree(finished.path, tmp_path / "out")
    copied = RunDir(tmp_path / "out")
    place = copied.iteration(2)
    graded = read_json(place.evaluation)["policy"]
    for file in (place.evaluation, *place.evaluation_dir.glob("[gl]*.jsonl")):
        file.unlink()
    session = Session(tiny("evaluate.judged_answers=0"), copied)
    evaluation(session, place, session.stack(2))
    policy = read_json(place.evaluation)["policy"]
    assert "anchor_score" in graded and "anchor_score" not in policy
    assert policy["divergence"] == graded["divergence"]  # of the same 4 answers


def test_held_out_prompts_that_do_not_fit_are_left_out_and_counted(
    finished: RunDir, tmp_path: Path
) -> None:
    data = shutil.copytree(tiny().data.dir, tmp_path / "data")
    rows = read_jsonl(data / "eval_prompts.jsonl")
    rows[1]["text"] += " whale" * 300
    (data / "eval_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    anchor = f"anchor.init={finished.anchor.adapter}"
    after = run(tmp_path / "out", "iterations=0", f"data.dir={data}", anchor)
    policy = read_json(after.anchor.evaluation)["policy"]
    assert (policy["too_long"], policy["answers"]) == (1, 3)  # of 4
    answered = {
        row["prompt_id"] for row in read_jsonl(after.anchor.evaluation_dir / "answers_greedy.jsonl")
    }
    assert len(answered) == 3 and rows[1]["prompt_id"] not in answered


def test_the_paper_s_chain_starts_each_delta_from_the_one_before(
    finished: RunDir, tmp_path: Path
) -> None:
    given = (f"anchor.init={finished.anchor.path}", "evaluate.policy_prompts=0")
    chained = run(tmp_path / "out", "dpo.init=previous", *given)
    rows = {r["iteration"]: r for r in chained.read_metrics() if r["stage"] == "delta"}
    assert rows[2]["first_loss"] == pytest.approx(math.log(2), abs=1e-3)
    ours, rebased = artefacts(chained), artefacts(finished)
    weights = "delta/adapter_model.safetensors"
    assert ours[f"iter_001/{weights}"] == rebased[f"iter_001/{weights}"]
    assert ours[f"iter_002/{weights}"] != rebased[f"iter_002/{weights}"]


def test_a_killed_run_ends_with_the_same_bytes(finished: RunDir, tmp_path: Path) -> None:
    """Killed four times, at moments drawn at random, then left to finish.

    It was told of both iterations from the start; the other one was continued by the second.
    """
    assert artefacts(killed(tmp_path / "out", 4)) == artefacts(finished)


@pytest.mark.slow
def test_a_run_in_nf4_that_is_killed_ten_times(tmp_path: Path) -> None:
    left_alone = run(tmp_path / "undisturbed", NF4)
    assert left_alone.facts()["recipe"]["base"]["quantization"] == "nf4"
    assert artefacts(killed(tmp_path / "out", 10, NF4)) == artefacts(left_alone)


def killed(out: Path, times: int, *overrides: str) -> RunDir:
    words = [word for setting in (*LEAN, *overrides) for word in ("--set", setting)]
    kills = int(ended(Path(__file__).with_name("killing.py"), out, str(times), *words).stdout)
    assert kills >= 4, "the run was over before it could be killed often enough to tell"
    assert not (out / "iter_002" / "done.json").exists()
    again = ended("-m", "srlm_lite", "iterate", "--recipe", "tiny", "--adapters", out, *words)
    assert again.returncode == 0, again.stderr
    return RunDir(out)


def test_an_iteration_in_nf4_goes_on_within_its_journal(tmp_path: Path) -> None:
    """The base is rounded anew when the run goes on, to the same weights."""
    less = ("prompts.per_iteration=4", "rollout.chunk_prompts=2", "anchor.ift_limit=12")
    settings = (NF4, "iterations=1", "evaluate.policy_prompts=0", *less)
    made = run(tmp_path / "out", *settings)
    assert made.facts()["recipe"]["base"]["quantization"] == "nf4"
    before, place = artefacts(made), made.iteration(1)
    for file in sorted(place.path.rglob("*")):
        if file.is_file() and file not in (place.prompts, place.candidates):
            file.unlink()
    whole = place.candidates.read_bytes()
    place.candidates.write_bytes(whole[: len(whole) * 2 // 3])
    assert artefacts(run(made.path, *settings)) == before


def test_too_few_pairs_stop_the_run_with_the_counts(tmp_path: Path) -> None:
    settings = ("iterations=1", "pairing.min_gap=2.5", "evaluate.policy_prompts=0")
    with pytest.raises(UserError) as error:
        run(tmp_path / "out", *settings, "pairing.min_pairs=12")
    text = str(error.value)
    assert "fewer than pairing.min_pairs = 12" in text
    assert "narrow" in text and "lower pairing.min_gap" in text
    assert read_json(RunDir(tmp_path / "out").iteration(1).drops)["narrow"] > 0
    assert "anchor.init=" in text
    found = re.search(r"Go on with them by (pairing\.min_pairs=\d+)\.", text)
    assert found is not None, text
    # It goes on with what is there: the anchor, the candidates and their judgements.
    made = artefacts(RunDir(tmp_path / "out"))
    after = run(tmp_path / "out", *settings, found[1])
    assert after.last_done() == 1
    assert artefacts(after).items() >= made.items()


def test_pairs_longer_than_the_window_are_dropped_and_counted(
    finished: RunDir, tmp_path: Path
) -> None:
    """A window that the longest pairs of the undisturbed run exceed, and nothing else does."""
    from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt
    from srlm_lite.run.files import read_records
    from srlm_lite.run.layout import IterationDir
    from srlm_lite.stages.at_work import AtWork
    from srlm_lite.stages.pairs import pair_example

    place = finished.iteration(1)
    session = Session(tiny(), finished)
    made = read_records(place.pairs, PreferencePair)
    lengths = sorted(len(pair_example(session, pair)) for pair in made)
    window = lengths[len(lengths) // 2]
    short = Session(tiny(f"base.window={window}"), finished)
    short.__dict__["chat"] = session.chat
    copy = IterationDir(tmp_path, 1)
    kept, facts = method_of(short.recipe).pairs(
        AtWork(short, copy),
        read_records(place.prompts, Prompt),
        read_records(place.candidates, Candidate),
        read_records(place.judgements, Judgement),
    )
    expected = sum(length <= window for length in lengths)
    assert len(kept) == expected < len(made)
    assert facts["drops"]["too_long"] == read_json(copy.drops)["too_long"] == len(made) - expected


def test_a_window_beyond_the_base_s_positions_is_warned_of(tmp_path: Path) -> None:
    class Heard(Silent):
        def __init__(self) -> None:
            self.warnings: list[str] = []

        def warn(self, text: str) -> None:
            self.warnings.append(text)

    for window, count in ((256, 0), (257, 1)):  # the toy base has 256 positions
        heard = Heard()
        Session(tiny(f"base.window={window}"), RunDir(tmp_path), heard).base  # noqa: B018
        assert len(heard.warnings) == count, heard.warnings
    assert "made for 256 positions" in heard.warnings[0]


def test_a_shipped_anchor_is_taken_as_it_is(finished: RunDir, tmp_path: Path) -> None:
    anchor = finished.anchor.path
    again = run(tmp_path / "out", f"anchor.init={anchor}", "iterations=1")
    name = "adapter_model.safetensors"
    assert sha256_file(again.anchor.path / name) == sha256_file(anchor / name)
    ours, theirs = artefacts(again), artefacts(finished)
    assert {k: v for k, v in ours.items() if k.startswith("iter_001")} == {
        k: v for k, v in theirs.items() if k.startswith("iter_001")
    }


def test_a_training_s_facts_of_another_hand_are_told(tmp_path: Path) -> None:
    """An iteration that goes on takes a training that is there for what it says."""
    from srlm_lite.stages.anchor import anchor
    from srlm_lite.stages.learning import dpo_delta

    directory = RunDir(tmp_path)
    session = Session(tiny(), directory)
    for training in (directory.anchor.training, directory.iteration(1).delta_place.training):
        training.parent.mkdir(parents=True)
        training.write_text("{}")
    told = r"training\.json: not as written: no `steps`"
    with pytest.raises(UserError, match=told):
        anchor(session)
    with pytest.raises(UserError, match=told):
        dpo_delta(session, directory.iteration(1), [])


def test_an_anchor_on_judge_data_alone(tmp_path: Path) -> None:
    only = run(tmp_path / "out", "anchor.use_ift=false", "iterations=0")
    facts = read_json(only.anchor.training)
    assert (facts["ift"], facts["eft"]) == (0, 48)
    assert list(only.iterations()) == []


def test_the_ift_only_model_writes_the_judge_s_targets(tmp_path: Path) -> None:
    """The paper's way: kept are judgements whose order over a prompt's replies is the human one."""
    data = tmp_path / "data"
    source = Path(tiny().data.dir)
    data.mkdir()
    for name in ("ift.jsonl", "eft_eval.jsonl", "prompts.jsonl"):
        (data / name).write_text((source / name).read_text())
    ranked = read_jsonl(source / "eft_eval.jsonl")[:96]
    (data / "eft_train.jsonl").write_text(
        "".join(json.dumps({**row, "target": None}) + "\n" for row in ranked)
    )
    out = run(
        tmp_path / "out",
        f"data.dir={data}",
        "anchor.eft_targets=self",
        "anchor.ift_limit=200",
        "iterations=0",
    )
    facts: dict[str, Any] = read_json(out.anchor.training)
    targets = read_jsonl(out.anchor.eft_targets)
    assert facts["eft"] == len(targets) > 0
    assert all(row["target"] for row in targets)
    dropped = facts["eft_drops"]
    groups = len({row["prompt_id"] for row in ranked})
    kept = groups - dropped["unreadable"] - dropped["disagreeing"]
    assert 0 < kept <= groups
    assert (out.anchor.ift_only / "adapter_model.safetensors").is_file()


def test_given_targets_are_wanted_where_the_recipe_says_so(tmp_path: Path) -> None:
    data = tmp_path / "data"
    source = Path(tiny().data.dir)
    data.mkdir()
    for name in ("ift.jsonl", "eft_eval.jsonl", "prompts.jsonl"):
        (data / name).write_text((source / name).read_text())
    (data / "eft_train.jsonl").write_text((source / "eft_eval.jsonl").read_text())
    with pytest.raises(UserError, match=r"rows have no target.*anchor\.eft_targets=self"):
        run(tmp_path / "out", f"data.dir={data}", "iterations=0")


def test_prompts_run_out_with_a_way_out(finished: RunDir) -> None:
    from srlm_lite.stages.prompts import prompts

    recipe: Recipe = tiny()
    session, listed = Session(recipe, finished), method_of(recipe).pool
    far = finished.iteration(999)
    told = r"iteration 999 needs prompts .* prompts\.reuse=true, in another directory; "
    with pytest.raises(UserError, match=rf"{told}anchor\.init={finished.anchor.path} keeps"):
        prompts(session, far, listed)
    reusing = Session(tiny("prompts.reuse=true"), finished)
    reusing.__dict__["chat"] = session.chat
    found, _ = prompts(reusing, finished.iteration(998), listed)
    assert len({prompt.prompt_id for prompt in found}) == 8
    for number in (998, 999):
        folder = finished.iteration(number).path
        (folder / "prompts.jsonl").unlink(missing_ok=True)
        if folder.exists():
            folder.rmdir()


def test_prompts_longer_than_the_window_are_told_before_the_anchor_is_trained(
    tmp_path: Path,
) -> None:
    """A run of other settings is another run: it could not go on with this one's anchor."""
    data = shutil.copytree(tiny().data.dir, tmp_path / "data")
    listed = read_jsonl(data / "prompts.jsonl")
    lines = [json.dumps({**row, "text": 300 * "long "}) + "\n" for row in listed[:-12]]
    lines += [json.dumps(row) + "\n" for row in listed[-12:]]  # 2 x 8 are wanted
    (data / "prompts.jsonl").write_text("".join(lines))
    out = RunDir(tmp_path / "out")
    told = r"needs prompts 9 to 16, but the list has 12 .* set prompts\.reuse=true$"
    with pytest.raises(UserError, match=told):
        run(out.path, f"data.dir={data}")
    assert not out.anchor.training.is_file()
