"""`srlm-lite bench rollout`: equal work by every way, a floor that is arithmetic, all its keys."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Cli
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from srlm_lite.bench.floor import Dimensions, PhaseWork, decode, phases, prefill, shared_prefix
from srlm_lite.bench.machine import peak_memory, resident
from srlm_lite.bench.plain import PlainGenerate
from srlm_lite.bench.rollout import RolloutBench, bench_rollout, ways_of
from srlm_lite.bench.roofline import copy_bandwidth, matmul_rates, shape_of
from srlm_lite.bench.workload import PROMPTS, StandIn, Workload
from srlm_lite.errors import UserError
from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.planning.shapes import SHAPES
from srlm_lite.progress import Silent
from srlm_lite.settings import Base

SMALL = Dimensions(linear=100, head=50, layers=2, query_width=4, cache_width=2, number_bytes=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tiny_base_dir: Path) -> LoadedBase:
    return load_base(Base(name=str(tiny_base_dir), dtype="float32"))


# --- the floor --------------------------------------------------------------------------------


def test_prefill_computes_a_shared_prefix_once() -> None:
    """Prompts of 3 and 4 tokens, 2 of them shared: 2 + 1 + 2 = 5 tokens.

    They attend to (1 + 2) + 3 + (3 + 4) = 13 tokens.
    """
    work = prefill(SMALL, [3, 4], shared=2)
    # 2 per weight and token; 4 x 2 layers x width 4 per token attended to; 2 scores of a vocabulary
    assert work.flops == 2 * 100 * 5 + 4 * 2 * 4 * 13 + 2 * 50 * 2
    # all weights once, and keys and values of 2 layers x width 2 for 5 tokens, 2 bytes each
    assert work.bytes == 2 * (150 + 2 * 2 * 2 * 5)


def test_decoding_reads_a_prompt_once_for_all_its_samples() -> None:
    """The same prompts, 2 samples of 3 tokens each: 4 rows, 2 steps after the prefill.

    Attended to: 2 x (3 + 4) + 4 in the first step, 2 x 7 + 8 in the second: 40. Read: the 5 tokens
    of the prompts and 4, then the 5 and 8: 22.
    """
    work = decode(SMALL, [3, 4], samples=2, new_tokens=3, shared=2)
    assert work.flops == 2 * 4 * 2 * 150 + 4 * 2 * 4 * 40
    assert work.bytes == 2 * (2 * 150 + 2 * 2 * 2 * 22)


def test_a_window_bounds_what_is_attended_to_and_kept() -> None:
    """The same prompts; of the two layers one has a window of 2 tokens.

    There the prefill attends to (1 + 2) + 2 + (2 + 2) = 9 tokens for 13, and a sample's first token
    can reach no more than the last one of each prompt: 2 tokens for 5. In both steps each of the 4
    rows attends to 2 tokens: 16 for 40. Read are, besides 4 and 8 of their own, the last one of
    each prompt in the first step and none in the second: 2 + 4 + 8 = 14 for 22.
    """
    shape = replace(SMALL, windowed=1, window=2)
    before = prefill(shape, [3, 4], shared=2)
    assert before.flops == 2 * 100 * 5 + 4 * 4 * (13 + 9) + 2 * 50 * 2
    assert before.bytes == 2 * (150 + 2 * 2 * (5 + 2))
    after = decode(shape, [3, 4], samples=2, new_tokens=3, shared=2)
    assert after.flops == 2 * 4 * 2 * 150 + 4 * 4 * (40 + 16)
    assert after.bytes == 2 * (2 * 150 + 2 * 2 * (22 + 14))


def test_a_shared_prefix_is_kept_as_far_as_some_window_reaches() -> None:
    """Prompts of 3 and 4 tokens, 2 of them shared, a window of 4: 3 tokens back, from the first.

    Of the one prompt its own token and both shared ones, of the other its 2 own and a shared one.
    """
    shape = replace(SMALL, windowed=2, window=4)
    assert prefill(shape, [3, 4], shared=2).bytes == 2 * (150 + 2 * 2 * 2 * (1 + 2 + 2))


def test_one_token_a_sample_needs_no_step() -> None:
    assert decode(SMALL, [3], samples=5, new_tokens=1) == PhaseWork(flops=0, bytes=0)


def test_a_phase_takes_what_it_has_too_little_of() -> None:
    work = PhaseWork(flops=600, bytes=100)
    assert work.seconds(flops_rate=100, bandwidth=100) == 6
    assert work.seconds(flops_rate=1000, bandwidth=100) == 1


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        ([(1, 2, 3), (1, 2, 4), (1, 2)], 2),
        ([(1, 2), (1, 2)], 2),
        ([(1, 2)], 0),
        ([(1,), (2,)], 0),
    ],
)
def test_the_shared_prefix(prompts: list[tuple[int, ...]], length: int) -> None:
    assert shared_prefix(prompts) == length


def test_the_phases_of_a_workload() -> None:
    work = phases(
        SMALL, Workload(n=2, answer_tokens=3, votes=4, vote_tokens=5), [(1, 2), (3,)], [(9, 8, 7)]
    )
    assert work == {
        "candidates_prefill": prefill(SMALL, [2, 1]),
        "candidates_decode": decode(SMALL, [2, 1], samples=2, new_tokens=3),
        "judge_prefill": prefill(SMALL, [3]),
        "judge_decode": decode(SMALL, [3], samples=4, new_tokens=5),
    }


def test_the_shape_of_a_model(base: LoadedBase) -> None:
    """2 layers of width 64, 4 query heads and 2 key-value heads of 16, 128 inside, float32."""
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
    vocabulary = base.model.config.vocab_size
    assert shape_of(base.model) == Dimensions(2 * layer, vocabulary * 64, 2, 64, 32, 4)


def test_the_machine_does_something() -> None:
    rates = matmul_rates([(8, 64, 32)], dtype=torch.float32, device=CPU)
    assert list(rates) == ["8x64x32"]
    assert min(rates.values()) > 1e6
    assert copy_bandwidth(CPU) > 1e6


# --- the workload -----------------------------------------------------------------------------


def test_the_workload() -> None:
    """16 x 4 x 96 tokens of answers and 64 x 3 x 64 of votes."""
    assert len(set(PROMPTS)) == 16
    assert Workload().new_tokens == 16 * 4 * 96 + 64 * 3 * 64 == 18_432
    assert Workload(prompts=2, votes=5).new_tokens == 2 * 4 * 96 + 8 * 5 * 64


def test_prompts_of_a_given_length() -> None:
    """Four characters a token: as many words of other questions as fit, in another order each."""
    spelling = StandIn(1000)

    def tokens(text: str) -> int:
        return len(spelling.prompt_ids(text))

    assert Workload().texts(tokens) == PROMPTS
    texts = Workload(prompts=3, question_tokens=1500).texts(tokens)
    assert [tokens(text) for text in texts] == pytest.approx([1500] * 3, abs=5)
    assert max(map(tokens, texts)) <= 1500
    assert all(text.endswith(question) for text, question in zip(texts, PROMPTS, strict=False))
    assert shared_prefix(texts) == 0
    assert Workload(prompts=1, question_tokens=2).texts(tokens) == PROMPTS[:1]


def test_a_stand_in_keeps_what_texts_share() -> None:
    spelling = StandIn(500)
    one, other = (spelling.prompt_ids("The same start, then " + end) for end in ("this", "that."))
    assert len(one) == 7 and max(one) < 500
    assert one[:5] == other[:5] and one[5:] != other[5:]
    assert len(spelling.prompt_ids(spelling.text_of([7, 499, 3]))) == 3


@pytest.mark.parametrize("prompts", [0, 17])
def test_more_prompts_than_there_are(prompts: int) -> None:
    with pytest.raises(UserError, match="--prompts: is"):
        Workload(prompts=prompts)


def test_ways() -> None:
    assert ways_of("one-by-one, ours") == ("ours", "one-by-one")
    with pytest.raises(UserError, match=r"--engines: no such way: trl\. There are ours, vllm"):
        ways_of("ours,trl")


@pytest.mark.parametrize(
    ("batch_prompts", "calls"),
    [(0, [1, 1, 1, 1, 1, 1]), (2, [4, 2]), (16, [6])],
    ids=["one by one", "batches of two prompts", "all at once"],
)
def test_plain_generate_draws_every_token(
    base: LoadedBase, monkeypatch: pytest.MonkeyPatch, batch_prompts: int, calls: list[int]
) -> None:
    """Three ragged prompts, two samples each, 40 tokens, though any token ends these texts."""
    model: Any = base.model
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(400)))
    generate, outputs, done = model.generate, [], []

    def spy(**kwargs: Any) -> Any:
        outputs.append((kwargs["input_ids"].shape[1], generate(**kwargs)))
        return outputs[-1][1]

    monkeypatch.setattr(model, "generate", spy)
    plain = PlainGenerate(model, pad_id=0, batch_prompts=batch_prompts, workload=Workload())
    plain.sample([(5, 6, 7), (8,), (9, 10)], n=2, new_tokens=40, on_samples=done.append)
    assert [len(output) for _, output in outputs] == calls
    assert all(output.shape[1] == width + 40 for width, output in outputs)
    assert done == calls


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.skipif(resident() is None, reason="no /proc")
def test_the_peak_of_memory_is_seen_after_it_has_been_given_back() -> None:
    before = resident() or 0
    with peak_memory(CPU) as peak:
        held = torch.ones(200_000_000, dtype=torch.uint8)
        del held
        torch.ones(50_000_000, dtype=torch.uint8)
    assert peak.bytes is not None
    assert peak.bytes >= before


# --- the command ------------------------------------------------------------------------------


@pytest.mark.usefixtures("brief_rates")
def test_the_command(tiny_base_dir: Path, cli: Cli) -> None:
    arguments = ["--base", tiny_base_dir, "--prompts", "1", "--votes", "2"]
    done = cli("bench", "rollout", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for key in ("one_by_one_s", "batched_generate_s", "ours_s", "floor_s"):
        assert found[key] > 0, key
    assert found["ratio_vs_batched_generate"] == pytest.approx(
        found["batched_generate_s"] / found["ours_s"], rel=0.01
    )
    if "vllm" not in found["phases"]:
        assert found["vllm_s"] is None and found["ratio_vs_vllm"] is None
    for way, parts in found["phases"].items():
        assert min(parts.values()) > 0, way
    assert found["workload"]["new_tokens"] == 4 * 96 + 4 * 2 * 64
    assert found["one_by_one_measured_prompts"] == 1
    assert found["floor_s"] == pytest.approx(
        sum(phase["seconds"] for phase in found["floor"].values()), abs=1e-5
    )
    assert found["floor_share"]["ours"] < 1
    assert found["votes_s"] == found["phases"]["ours"]["judge_s"]
    assert found["prefill_s"] > 0
    assert found["prefill_share"] == pytest.approx(found["prefill_s"] / found["votes_s"], abs=0.01)
    assert {"date", "machine", "versions", "dtype", "threads", "base"} <= found.keys()
    assert found["machine"]["cores"] >= 1 and found["versions"]["torch"]


@pytest.mark.usefixtures("brief_rates")
def test_ways_that_are_not_asked_for_are_null(tiny_base_dir: Path) -> None:
    small = Workload(prompts=1, n=2, answer_tokens=8, votes=2, vote_tokens=8)
    settings = RolloutBench(base=str(tiny_base_dir), ways=("batched",), workload=small)
    found = bench_rollout(settings, Silent())
    assert found["batched_generate_s"] > 0
    absent = ("one_by_one_s", "ours_s", "vllm_s", "ratio_vs_batched_generate", "ratio_vs_vllm")
    assert [found[key] for key in absent] == [None] * 5
    assert [found[key] for key in ("votes_s", "prefill_s", "prefill_share")] == [None] * 3
    assert list(found["phases"]) == ["batched"]


@pytest.mark.usefixtures("brief_rates")
def test_one_by_one_is_extrapolated(tiny_base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two prompts is measured, 2 answers and 2 votes on each: 6 samples."""
    small = Workload(prompts=2, n=2, answer_tokens=8, votes=2, vote_tokens=8)
    drawn: list[tuple[int, int, int]] = []
    sample = PlainGenerate.sample

    def spy(self: Any, prompts: Any, **kwargs: Any) -> None:
        drawn.append((len(prompts), kwargs["n"], kwargs["new_tokens"]))
        sample(self, prompts, **kwargs)

    monkeypatch.setattr(PlainGenerate, "sample", spy)
    settings = RolloutBench(base=str(tiny_base_dir), ways=("one-by-one",), workload=small)
    found = bench_rollout(settings, Silent())
    assert drawn[-2:] == [(1, 2, 8), (2, 2, 8)]
    assert found["one_by_one_measured_prompts"] == 1
    clocked = found["phases"]["one-by-one"]
    assert found["one_by_one_s"] == pytest.approx(sum(clocked.values()), abs=0.002)


@pytest.mark.usefixtures("brief_rates")
def test_a_base_of_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shape has a window that is shorter than the prompts."""
    shape = {**SHAPES["gemma3-270m"], "vocab_size": 2048, "hidden_size": 32, "head_dim": 16}
    monkeypatch.setitem(
        SHAPES,
        "tiny",
        {**shape, "intermediate_size": 64, "num_hidden_layers": 6, "sliding_window": 9},
    )
    small = Workload(prompts=2, n=2, answer_tokens=8, votes=2, vote_tokens=8, question_tokens=60)
    settings = RolloutBench(base="random:tiny", ways=("ours", "batched"), workload=small)
    found = bench_rollout(settings, Silent())
    assert found["ratio_vs_batched_generate"] > 0
    assert found["base"] == {"name": "random:tiny", "kind": "random", "seed": 0}
    assert found["workload"]["prompt_tokens"] == pytest.approx(2 * 60, abs=8)
    assert found["workload"]["judge_prompt_tokens"] > 4 * (60 + 8)


def test_a_shape_that_the_table_lacks() -> None:
    with pytest.raises(UserError, match=r"--base: no such shape: llama9\. Known: gemma3-270m"):
        bench_rollout(RolloutBench(base="random:llama9"), Silent())


@pytest.mark.usefixtures("brief_rates")
def test_a_base_whose_layers_have_other_names(tiny_base_dir: Path, tmp_path: Path) -> None:
    """One projection for queries, keys and values, and no layer of the usual names."""
    config = GPTNeoXConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_base_dir).save_pretrained(tmp_path)
    small = Workload(prompts=1, n=2, answer_tokens=4, votes=1, vote_tokens=4)
    found = bench_rollout(
        RolloutBench(base=str(tmp_path), ways=("ours",), workload=small), Silent()
    )
    assert found["ours_s"] > 0
