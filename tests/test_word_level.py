"""Pretraining a word-level base: what counts in a dialogue, and going on after a stop."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from srlm_lite.model.word_level import Dialogue, Size, encode, make_tokenizer, pretrain

WORDS = ("<pad>", "<unk>", "<bos>", "<eos>", "<user>", "<assistant>", "a", "b", "c", "yes", "no")


def tokenizer() -> Any:
    return make_tokenizer(WORDS, marks="")


def test_a_dialogue_says_what_follows_each_token_and_how_much_it_counts() -> None:
    plain, judged = encode(
        tokenizer(),
        [Dialogue("a b", "c"), Dialogue("a b c", "no", ("yes", "no"), weight=3.0)],
        user_weight=0.5,
        verdict_weight=2.0,
    )
    ids = [WORDS.index(word) for word in ("<bos>", "<user>", "a", "b", "<assistant>", "c", "<eos>")]
    assert plain.ids == ids
    assert plain.targets == ids[1:]
    assert plain.weights == [0.5, 0.5, 0.5, 0.5, 1.0, 1.0]
    # After `b` and `c` stand verdicts; what opens the reply is learned of neither.
    said = ["<user>", "a", "b", "yes", "no", "no", "<eos>"]
    assert [WORDS[target] for target in judged.targets] == said
    assert judged.weights == [0.5, 0.5, 0.5, 2.0, 2.0, 3.0, 3.0]


def dialogue(rng: random.Random, done: float) -> Dialogue:
    word = rng.choice("abc")
    return Dialogue(word, word if done < 0.5 else f"{word} yes")


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_pretraining_that_was_stopped_makes_the_same_base(
    orthogonal: bool, tmp_path: Path
) -> None:
    def made(name: str, minutes: float) -> bool:
        return pretrain(
            tmp_path / name, tokenizer(), dialogue, rng=random.Random(1), seed=1, steps=40, batch=2,
            threads=1, size=Size(1, 16, 16), orthogonal=orthogonal,
            progress=tmp_path / f"{name}.pt", minutes=minutes, tell=told.append,
        )  # fmt: skip

    told: list[str] = []
    assert made("whole", 9.0)
    assert told == []
    # A block of 16 steps is the least.
    assert [made("parts", 0.0) for _ in range(3)] == [False, False, True]
    assert told == [
        "stopped at step 16 of 40; the same command goes on", "goes on from step 16",
        "stopped at step 32 of 40; the same command goes on", "goes on from step 32",
    ]  # fmt: skip
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    assert not (tmp_path / "parts.pt").exists()
