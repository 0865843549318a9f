"""Whether a base that does not understand its data is noticed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from reporting import add_anchor, new_run

from srlm_lite.evaluate.reading import (
    Price,
    anchor_doubts,
    doubts,
    excerpt,
    figures,
    shuffled,
    spread,
)
from srlm_lite.progress import Silent
from srlm_lite.recipe import load_recipe
from srlm_lite.report.answer import worries
from srlm_lite.report.facts import gather
from srlm_lite.report.html import html
from srlm_lite.run.files import read_json
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.stages.reading import reading

TOY = Path(load_recipe("tiny").base.name)
TEXT = "Whales, says J.-P. Müller, sing for 24 hours; 鲸鱼会唱歌 too."


def test_shuffling_moves_letters_within_their_words_and_nothing_else() -> None:
    mixed = shuffled(TEXT, Random(0))
    assert mixed != TEXT and len(mixed) == len(TEXT)
    for before, after in zip(TEXT, mixed, strict=True):
        assert before.isalpha() == after.isalpha()
        assert before.isalpha() or before == after
    for before, after in zip(TEXT.split(), mixed.split(), strict=True):
        assert sorted(before) == sorted(after)
    assert shuffled("1 + 2 = 3; a b c", Random(0)) == "1 + 2 = 3; a b c"


def test_an_excerpt_ends_with_a_word() -> None:
    assert excerpt("  short text \n") == "short text"
    assert excerpt("many words " * 20) == "many words " * 10 + "many"
    assert excerpt("鲸" * 200) == "鲸" * 120


def test_rows_are_taken_from_all_over_the_data() -> None:
    assert spread(range(3), 4) == [0, 1, 2]
    assert spread(range(10), 4) == [0, 2, 5, 7]


def test_figures_on_hand_worked_prices() -> None:
    found = figures(
        [(Price(10.0, 5, 20), Price(40.0, 10, 20)), (Price(30.0, 10, 30), Price(60.0, 15, 30))],
        vocabulary=100,
    )
    assert found["texts"] == 2
    assert found["bits_per_byte"] == pytest.approx(40 / 50 / math.log(2), abs=1e-4)
    assert found["nats_per_token"] == pytest.approx(40 / 15, abs=1e-4)
    assert found["shuffled"]["bits_per_byte"] == pytest.approx(100 / 50 / math.log(2), abs=1e-4)
    assert found["shuffled"]["nats_per_token"] == 100 / 25
    # A token of the first text costs 2 and 4 when shuffled, of the second 3 and 4.
    assert found["gain"] == pytest.approx((0.5 + 0.25) / 2)
    assert found["gain_interval"] == [0.25, 0.5]
    assert found["blind_nats_per_token"] == pytest.approx(4.6052)


def read(gains: list[float], *, price: float = 3.0, vocabulary: int = 50_000) -> dict[str, Any]:
    pairs = [(Price(10 * price, 10, 40), Price(20 * price / (1 - g), 20, 40)) for g in gains]
    return {"answers": figures(pairs, vocabulary=vocabulary)}


def test_a_base_is_doubted_by_what_a_token_costs_and_by_more_than_chance() -> None:
    assert doubts(read([0.3, 0.4, 0.2] * 4)) == []
    # As with a tokenizer that spells: real text is a little cheaper, and in bits half as dear.
    spelled = read([0.08, 0.02, 0.05] * 4)
    assert (
        spelled["answers"]["bits_per_byte"] < 0.6 * spelled["answers"]["shuffled"]["bits_per_byte"]
    )
    (told,) = doubts(spelled)
    assert told.startswith("the base reads the answers of its data hardly better than")
    # The mean is 0.3, but it rests on one text in four.
    assert doubts(read([1.0 - 1e-9, 0.02, 0.03, 0.15] * 2))
    # Of five texts nothing is said, whatever they are like.
    assert doubts(read([0.01] * 5)) == []
    assert doubts(read([0.01] * 6)) != []


def test_a_base_that_guesses_blindly_is_doubted_whatever_shuffling_costs() -> None:
    (told,) = doubts(read([0.5] * 12, price=11.0))  # ln 50,000 is 10.8
    assert "no likelier than ids drawn blindly (11.00 nats a token against 10.82)" in told
    (told,) = doubts(read([0.5] * 12, price=math.nan))
    assert "ids drawn blindly" in told
    alone = {"prompts": read([0.5] * 12, price=11.0)["answers"]}
    assert doubts(alone) == []  # it may have learned answers alone


def test_an_anchor_s_losses_are_held_to_blind_chance_and_to_shuffled_letters() -> None:
    before = read([0.5] * 12, price=3.0)  # shuffled: 6 nats a token
    sound = {"step0_nll": 9.0, "first_loss": 8.0, "last_loss": 2.0}
    assert anchor_doubts(before, sound) == []
    (told,) = anchor_doubts(before, {**sound, "step0_nll": 10.9})
    assert told == (
        "the anchor's training began at 10.90 nats a token, and an id drawn blindly costs 10.82"
    )
    (told,) = anchor_doubts(before, {**sound, "last_loss": 6.1})
    assert "ended at 6.10 nats a token" in told and "cost the base 6.00" in told
    assert anchor_doubts({}, sound) == []
    assert anchor_doubts(before, {"taken_from": "elsewhere"}) == []


class Heard(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def measure(folder: Path, *overrides: str) -> tuple[dict[str, Any], list[str]]:
    heard = Heard()
    _, found = reading(Session(load_recipe("tiny", overrides), RunDir(folder), heard))
    assert read_json(RunDir(folder).anchor.reading) == found
    return found, heard.warnings


@pytest.mark.model
def test_the_toy_base_understands_what_it_was_made_for(tmp_path: Path) -> None:
    found, warnings = measure(tmp_path / "run")
    assert warnings == []
    assert found["answers"]["texts"] == found["prompts"]["texts"] == 24
    assert found["answers"]["bits_per_byte"] < 0.5
    # What is there is not measured again: this recipe's base would be another one.
    again = load_recipe("tiny", ["base.name=nowhere"])
    assert reading(Session(again, RunDir(tmp_path / "run")))[1] == found


@pytest.mark.model
def test_it_is_measured_as_the_model_s_own_loss(tmp_path: Path) -> None:
    import torch

    found, _ = measure(tmp_path / "run", "anchor.ift_limit=1", "base.quantization=none")
    session = Session(load_recipe("tiny", ["base.quantization=none"]), RunDir(tmp_path / "other"))
    row = json.loads(Path(session.recipe.data.dir, "ift.jsonl").read_text().splitlines()[0])
    prompt, text = row["prompt"], excerpt(row["response"])
    assert excerpt(prompt) == prompt
    target = session.chat.target_ids(text)[:-1]
    ids = torch.tensor([[*session.chat.prompt_ids(prompt), *target]])
    labels = ids.clone()
    labels[:, : -len(target)] = -100
    with torch.no_grad():
        nats = float(session.base.model(input_ids=ids, labels=labels).loss) * len(target)
    assert found["answers"]["texts"] == 1
    bits = nats / len(text.encode()) / math.log(2)
    assert found["answers"]["bits_per_byte"] == pytest.approx(bits, abs=2e-4)


@pytest.mark.model
def test_ids_that_are_not_the_base_s_own_are_warned_of(tmp_path: Path) -> None:
    """The same words, each with the id of the next one: nothing crashes, and nothing is right."""
    base = shutil.copytree(TOY, tmp_path / "base")
    path = base / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    special = {token["content"] for token in tokenizer["added_tokens"]}
    words = [word for word in tokenizer["model"]["vocab"] if word not in special]
    ids = [tokenizer["model"]["vocab"][word] for word in words]
    tokenizer["model"]["vocab"].update(zip(words, [*ids[1:], ids[0]], strict=True))
    path.write_text(json.dumps(tokenizer))
    _, warnings = measure(tmp_path / "run", f"base.name={base}")
    (warning,) = warnings
    assert "the answers of its data" in warning and "its tokenizer" in warning


def test_a_base_of_random_weights_is_warned_of(
    tmp_path: Path, family_base: Callable[[str], Path]
) -> None:
    _, (warning,) = measure(tmp_path / "run", f"base.name={family_base('llama')}")
    assert "no likelier than ids drawn blindly" in warning


@pytest.mark.model
def test_ranked_replies_are_read_where_there_is_no_instruction_data(tmp_path: Path) -> None:
    data = shutil.copytree(load_recipe("tiny").data.dir, tmp_path / "data")
    only = (f"data.dir={data}", "anchor.use_ift=false")
    found, warnings = measure(tmp_path / "judge-only", *only)
    assert found["answers"]["texts"] == 24 and warnings == []
    (data / "eft_train.jsonl").unlink()
    assert measure(tmp_path / "neither", *only) == ({}, [])


@pytest.mark.model
def test_the_report_has_what_the_base_makes_of_its_data(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    run.add_metrics({"iteration": 0, "stage": "base", "seconds": 1.0, **read([0.01] * 8)})
    losses = {"step0_nll": 5.25, "first_loss": 4.5, "last_loss": 4.0}
    add_anchor(run)
    rows = run.read_metrics()
    run.metrics.unlink()
    for row in rows:
        run.add_metrics({**row, **losses} if row["stage"] == "anchor" else row)
    facts = gather(run)
    found = worries(facts)
    assert any("hardly better than with the letters" in text for text in found)
    assert any("ended at 4.00 nats a token" in text for text in found)
    page = html(facts)
    for text in ("bits a byte of answers, letters shuffled", "first loss, nats a token", "5.25"):
        assert text in page
