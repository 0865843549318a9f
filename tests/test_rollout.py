"""Sampling: equal to plain `generate`, true to the distribution, one seed for each sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from tapes import Tape, logits_by_prefix, taped
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig, MiniCPM3Config

from srlm_lite.model import random_base as random_base_module
from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.random_base import random_base
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.rollout import memory, nucleus, steps, transformers_engine, tree
from srlm_lite.rollout.attention import attention, merged, plain_attention
from srlm_lite.rollout.nucleus import draw, largest, most_probable, uniforms
from srlm_lite.rollout.protocol import Limits, Request, Sample
from srlm_lite.rollout.sizes import MOST_ROWS
from srlm_lite.rollout.steps import Steps
from srlm_lite.rollout.transformers_engine import TransformersEngine
from srlm_lite.rollout.tree import shared_prefix
from srlm_lite.settings import Base, Lora

TEXTS = ("moon", "How do I look after a bicycle?", "Read the reply and judge it, please.", "a b c")
GREEDY = Limits(temperature=0.0, top_p=1.0, max_new_tokens=12)
WARM = Limits(temperature=1.0, top_p=0.95, max_new_tokens=12)


@pytest.fixture(scope="module")
def base(tiny_base_dir: Path) -> LoadedBase:
    return load_base(Base(name=str(tiny_base_dir), dtype="float32"))


@pytest.fixture(scope="module")
def shared_engine(base: LoadedBase) -> TransformersEngine:
    slot = Slot(base.model, targets=("q_proj", "v_proj"), rank=4)
    engine = TransformersEngine(slot, ChatFormat.of(base), batch_rows=64)
    # The proof that the model may grow on a tree is made here, and in no test's count of passes.
    engine.sample([Request((3, 4, 5), (0,))], Limits(0.0, 1.0, max_new_tokens=1))
    return engine


@pytest.fixture
def engine(shared_engine: TransformersEngine) -> TransformersEngine:
    """With the same stack for every test, whatever the one before has loaded."""
    shared_engine.load([noisy_adapter(shared_engine._slot)])
    return shared_engine


def noisy_adapter(slot: Slot, *, seed: int = 0) -> Adapter:
    """An adapter that changes what is sampled."""
    fresh = slot.fresh(Lora(rank=4, alpha=4, targets=("q_proj", "v_proj")), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        rank=4,
        alpha=4,
        factors={
            module: (a, torch.randn(b.shape, generator=generator))
            for module, (a, b) in fresh.factors.items()
        },
    )


def requests(engine: TransformersEngine, *, n: int) -> list[Request]:
    return [
        Request(tuple(engine._chat.prompt_ids(text)), tuple(range(100 * i, 100 * i + n)))
        for i, text in enumerate(TEXTS)
    ]


def ids(samples: list[list[Sample]]) -> list[list[tuple[int, ...]]]:
    return [[sample.token_ids for sample in row] for row in samples]


def plain_generate(engine: TransformersEngine, base: LoadedBase, prompt: Request) -> Any:
    prompt_ids = torch.tensor([prompt.prompt_ids])
    output = engine._model.generate(
        input_ids=prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=list(engine._chat.stop_ids),
        pad_token_id=engine._chat.pad_id,
    )
    return output[0, prompt_ids.shape[1] :].tolist()


@pytest.mark.parametrize("n", [1, 3])
def test_greedy_is_token_for_token_what_plain_generate_gives(
    engine: TransformersEngine, base: LoadedBase, n: int
) -> None:
    """Ragged prompts, a prefix shared by all and one by n samples, against one by one."""
    prompts = requests(engine, n=n)
    assert len({len(prompt.prompt_ids) for prompt in prompts}) > 1
    for prompt, samples in zip(prompts, engine.sample(prompts, GREEDY), strict=True):
        expected = plain_generate(engine, base, prompt)
        for sample in samples:
            assert list(sample.token_ids) == expected[: len(sample.token_ids)]
            stopped = expected[len(sample.token_ids) :][:1]
            assert (sample.finish_reason == "stop") == (
                bool(stopped) and stopped[0] in engine._chat.stop_ids
            )


def passes(engine: TransformersEngine, call: Any) -> list[tuple[int, ...]]:
    """Shapes of the ids in each forward pass of a call."""
    shapes: list[tuple[int, ...]] = []
    hook = engine._model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    try:
        call()
    finally:
        hook.remove()
    return shapes


def rubric_requests(engine: TransformersEngine, texts: tuple[str, ...]) -> list[Request]:
    rubric = "Read the reply and judge it. One point for each thing that it does well. " * 3
    return [
        Request(tuple(engine._chat.prompt_ids(rubric + text)), (i, i + 50))
        for i, text in enumerate(texts)
    ]


def test_a_prefix_that_all_prompts_share_is_computed_once(
    engine: TransformersEngine, base: LoadedBase
) -> None:
    """As with a rubric: long fixed text first, then what differs; and nothing else changes."""
    prompts = rubric_requests(engine, (*TEXTS, ""))
    engine.close()
    results: list[list[Sample]] = []
    shapes = passes(engine, lambda: results.extend(engine.sample(prompts, GREEDY)))
    shared = shared_prefix([prompt.prompt_ids for prompt in prompts])
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    assert shared > 40
    assert shapes[:3] == [(1, shared), (5, longest - 1 - shared), (10, 1)]
    for prompt, samples in zip(prompts, results, strict=True):
        expected = plain_generate(engine, base, prompt)
        for sample in samples:
            assert list(sample.token_ids) == expected[: len(sample.token_ids)]


def test_the_rubric_is_kept_from_call_to_call_until_the_stack_changes(
    engine: TransformersEngine,
) -> None:
    prompts = rubric_requests(engine, TEXTS)
    others = rubric_requests(engine, ("the sun and the stars", "oil"))
    stack = [noisy_adapter(engine._slot)]
    engine.load(stack)
    engine.sample(prompts, GREEDY)
    kept: list[list[Sample]] = []
    shapes = passes(engine, lambda: kept.extend(engine.sample(others, GREEDY)))
    assert shapes[0][0] == 2  # straight to the branches
    engine.close()
    assert engine.sample(others, GREEDY) == kept
    engine.load([noisy_adapter(engine._slot, seed=1)])
    changed: list[list[Sample]] = []
    shapes = passes(engine, lambda: changed.extend(engine.sample(others, GREEDY)))
    assert shapes[0][0] == 1
    assert changed != kept
    engine.load(stack)
    assert engine.sample(others, GREEDY) == kept


def test_what_one_stack_has_kept_is_no_other_stacks_whoever_loads_the_slot(
    engine: TransformersEngine,
) -> None:
    """A stage that scores candidates loads the slot itself, past the engine."""
    prompts = rubric_requests(engine, TEXTS)
    one, other = ([noisy_adapter(engine._slot, seed=seed)] for seed in (0, 1))
    engine.load(other)
    expected = engine.sample(prompts, GREEDY)
    engine.load(one)
    assert engine.sample(prompts, GREEDY) != expected
    assert engine._trunk
    engine._slot.load(other)
    engine.load(other)
    found: list[list[Sample]] = []
    shapes = passes(engine, lambda: found.extend(engine.sample(prompts, GREEDY)))
    assert shapes[0][0] == 1  # the trunk is computed anew
    assert found == expected


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        ([(1, 2, 3, 4), (1, 2, 9, 8)], 2),
        ([(1, 2, 3, 4), (1, 2, 3, 4)], 2),  # a branch, and the token its leaves start from
        ([(1, 2, 3)], 1),
        ([(1,), (1, 2)], 0),
        ([(5, 6), (7, 6)], 0),
        ([(1, 2, 3, 4), (1, 2, 3, 4, 5), (1, 2, 8, 9)], 2),
    ],
)
def test_the_shared_prefix(rows: list[tuple[int, ...]], length: int) -> None:
    assert shared_prefix(rows) == length


def test_a_samples_seed_does_not_depend_on_its_neighbours(engine: TransformersEngine) -> None:
    prompts = requests(engine, n=3)
    together = engine.sample(prompts, WARM)
    assert len({ids_ for row in ids(together) for ids_ in row}) > 4  # they do differ
    for place, prompt in enumerate(prompts):
        assert ids(engine.sample([prompt], WARM)) == [ids(together)[place]]
    backwards = engine.sample(prompts[::-1], WARM)
    assert ids(backwards) == ids(together)[::-1]
    fewer = [Request(prompt.prompt_ids, prompt.seeds[1:]) for prompt in prompts]
    assert ids(engine.sample(fewer, WARM)) == [row[1:] for row in ids(together)]


@pytest.mark.parametrize("limits", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_rows_that_end_leave_the_batch_and_nothing_else_changes(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, limits: Limits
) -> None:
    """With every eighth token an end, rows end at all lengths; alone each gives the same."""
    monkeypatch.setattr(engine._chat, "stop_ids", tuple(range(2, 600, 8)))
    prompts = [
        Request(tuple(engine._chat.prompt_ids(f"{text} {i}")), (i, i + 70, i + 140))
        for i in range(4)
        for text in TEXTS
    ]
    together: list[list[Sample]] = []
    shapes = passes(engine, lambda: together.extend(engine.sample(prompts, limits)))
    assert len({shape[0] for shape in shapes if shape[1] == 1}) >= 3  # the batch did shrink
    reasons = {sample.finish_reason for row in together for sample in row}
    assert "stop" in reasons
    assert len({len(sample.token_ids) for row in together for sample in row}) >= 4
    for place, prompt in enumerate(prompts):
        for sample, seed in zip(together[place], prompt.seeds, strict=True):
            alone = engine.sample([Request(prompt.prompt_ids, (seed,))], limits)
            assert alone == [[sample]]


@pytest.mark.parametrize("limits", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_waiting_rows_enter_the_batch_as_others_leave_it(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, limits: Limits
) -> None:
    """Rows of unlike age side by side: their leaves differ in length, their branches in rows."""
    monkeypatch.setattr(engine._chat, "stop_ids", tuple(range(2, 600, 8)))
    prompts = [
        Request(tuple(engine._chat.prompt_ids(f"{text} {i}")), tuple(range(i, i + 1 + i % 3)))
        for i in range(6)
        for text in TEXTS
    ]
    expected = engine.sample(prompts, limits)
    small = TransformersEngine(engine._slot, engine._chat, batch_rows=9)
    results: list[list[Sample]] = []
    shapes = passes(small, lambda: results.extend(small.sample(prompts, limits)))
    assert results == expected
    steps = [shape[0] for shape in shapes if shape[1] == 1]
    assert max(steps) <= 9
    # One batch after the other would take more steps than rows that are replaced as they end.
    assert len(steps) < 12 * len(prompts) * 2 / 9


def test_requests_may_differ_in_their_number_of_samples(engine: TransformersEngine) -> None:
    prompts = requests(engine, n=3)
    ragged = [Request(p.prompt_ids, p.seeds[: 1 + i % 3]) for i, p in enumerate(prompts)]
    together = engine.sample(prompts, WARM)
    expected = [row[: 1 + i % 3] for i, row in enumerate(ids(together))]
    assert ids(engine.sample(ragged, WARM)) == expected


def test_the_batch_is_halved_when_memory_runs_out(
    base: LoadedBase, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = requests(engine, n=3)
    expected = ids(engine.sample(prompts, WARM))
    small = TransformersEngine(engine._slot, engine._chat, batch_rows=12)
    step, sizes = Steps.next_logits, []

    def hungry(self: Steps, ids: torch.Tensor) -> torch.Tensor:
        sizes.append(len(ids))
        # Halfway through, as keys and values grow.
        if len(ids) > 3 and len(sizes) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return step(self, ids)

    monkeypatch.setattr(Steps, "next_logits", hungry)
    finished: list[int] = []
    assert ids(small.sample(prompts, WARM, on_samples=finished.append)) == expected
    assert sum(finished) == 12
    tried = [size for size, before in zip(sizes, [1, *sizes], strict=False) if size != before]
    assert tried[:3] == [12, 6, 3]


def test_a_single_request_may_be_larger_than_the_batch(engine: TransformersEngine) -> None:
    prompt = Request(tuple(engine._chat.prompt_ids("moon")), tuple(range(5)))
    small = TransformersEngine(engine._slot, engine._chat, batch_rows=2)
    assert small.sample([prompt, prompt], WARM) == engine.sample([prompt, prompt], WARM)


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(Steps, "next_logits", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        engine.sample(requests(engine, n=2), WARM)


def test_a_stop_rule_is_asked_at_the_end_of_each_line(engine: TransformersEngine) -> None:
    asked: list[str] = []

    def long_enough(text: str) -> bool:
        asked.append(text)
        return len(text) > 30

    prompts = [Request(engine_ids, tuple(range(40))) for engine_ids in [(3, 4, 5), (7, 8, 9, 10)]]
    limits = Limits(temperature=2.0, top_p=1.0, max_new_tokens=60, ignore_end=True)
    whole = engine.sample(prompts, limits)
    stopped = engine.sample(prompts, replace(limits, stop=long_enough))
    assert asked and all("\n" in text for text in asked)
    assert any(len(text) <= 30 for text in asked)
    ends = 0
    for long_row, row in zip(whole, stopped, strict=True):
        for one, cut in zip(long_row, row, strict=True):
            assert one.token_ids[: len(cut.token_ids)] == cut.token_ids
            if len(cut.token_ids) < 60:
                assert "\n" in engine._chat.spell(cut.token_ids[-1:])
                assert cut.finish_reason == "stop"
                ends += 1
    assert ends


def test_ends_of_turns_can_be_ignored(engine: TransformersEngine) -> None:
    endless = Limits(temperature=1.0, top_p=1.0, max_new_tokens=40, ignore_end=True)
    for row in engine.sample(requests(engine, n=2), endless):
        assert [sample.n_tokens for sample in row] == [40, 40]
        assert [sample.finish_reason for sample in row] == ["length", "length"]


def test_alternatives_are_the_models_own_probabilities(engine: TransformersEngine) -> None:
    limits = Limits(temperature=0.7, top_p=0.9, max_new_tokens=5, alternatives=3)
    prompt = requests(engine, n=2)[1]
    other = requests(engine, n=1)[0]
    for sample in engine.sample([other, prompt], limits)[1]:
        sequence = torch.tensor([[*prompt.prompt_ids, *sample.token_ids]])
        with torch.no_grad():
            logs = engine._model(input_ids=sequence).logits[0].log_softmax(dim=-1)
        assert len(sample.tokens) == sample.n_tokens > 0
        for place, token in enumerate(sample.tokens):
            expected = logs[len(prompt.prompt_ids) - 1 + place].topk(3)
            assert [p for _, p in token.alternatives] == pytest.approx(
                expected.values.tolist(), abs=1e-4
            )
            texts = [engine._chat.spell([int(i)]) for i in expected.indices]
            assert [text for text, _ in token.alternatives] == texts
            assert token.text == engine._chat.spell([sample.token_ids[place]])


def test_a_model_that_carries_roundings_far_still_grows_a_tree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random weights, wide and deep, in bfloat16: it is as far from itself as from the tree."""
    monkeypatch.setattr(random_base_module, "_SPREAD", 0.2)
    shape = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=48,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    wild = random_base(
        shape, name="wild", device=torch.device("cpu"), dtype=torch.bfloat16, quantization="none"
    )
    engine = TransformersEngine(Slot(wild.model, targets=("q_proj",), rank=2), ChatFormat.of(wild))
    prompt = tuple(range(100, 132))
    with torch.inference_mode():
        assert engine._branches_like_the_model(prompt)
        monkeypatch.setattr(transformers_engine, "LIKE_ITSELF", 0)
        assert not engine._branches_like_the_model(prompt)  # so it was this that let it pass


def test_a_model_with_an_attention_of_its_own_is_sampled_with_plain_generate(
    base: LoadedBase, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a distance that no bound admits, the proof fails as it would for such a model."""
    prompts = requests(engine, n=2)
    limits = Limits(temperature=1.0, top_p=0.95, max_new_tokens=12, alternatives=2)
    expected = engine.sample(prompts, limits)
    careful = TransformersEngine(engine._slot, engine._chat, batch_rows=5)
    monkeypatch.setattr(transformers_engine, "divergence", lambda *_: torch.tensor(torch.inf))
    found = careful.sample(prompts, limits)
    assert careful._branches is False
    assert ids(found) == ids(expected)
    for row, other in zip(found, expected, strict=True):
        for one, two in zip(row, other, strict=True):
            assert [t.text for t in one.tokens] == [t.text for t in two.tokens]


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("shape", "target"),
    [
        # Falcon's layers choose their attention when they are built, and never ask a tree.
        (FalconConfig(**SMALL, alibi=False), "dense"),
        # Latent attention: values are narrower than keys.
        (MiniCPM3Config(**SMALL, intermediate_size=128), "o_proj"),
    ],
    ids=["code of its own", "latent"],
)
def test_architectures_that_a_tree_does_not_reach_are_sampled_as_they_are(
    engine: TransformersEngine, shape: Any, target: str
) -> None:
    torch.manual_seed(0)
    shape.vocab_size = engine._model.config.vocab_size
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()
    other = TransformersEngine(Slot(model, targets=(target,), rank=2), engine._chat, batch_rows=8)
    other.load(())
    prompts = requests(engine, n=1)
    limits = Limits(temperature=0.0, top_p=1.0, max_new_tokens=8, ignore_end=True)
    found = other.sample(prompts, limits)
    assert other._branches is False
    for (sample,), prompt in zip(found, prompts, strict=True):
        ids_of = torch.tensor([prompt.prompt_ids])
        own = model.generate(
            input_ids=ids_of,
            attention_mask=torch.ones_like(ids_of),
            do_sample=False,
            min_new_tokens=8,
            max_new_tokens=8,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert sample.token_ids == tuple(own[0, ids_of.shape[1] :].tolist())


# --- steps from a graph -----------------------------------------------------------------------


@pytest.fixture
def tapes(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """The graphs that are captured from now on."""
    return taped(engine, monkeypatch)


@pytest.mark.parametrize("limits", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_replayed_steps_are_the_steps(
    engine: TransformersEngine, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch, limits: Limits
) -> None:
    """Rows enter and leave, leaves outgrow their room and what a graph attends to.

    The samples themselves may part where two tokens tie: a held tree is rounded in its own way.
    """
    monkeypatch.setattr(steps, "HELD", 24)
    monkeypatch.setattr(engine._chat, "stop_ids", tuple(range(2, 600, 40)))
    monkeypatch.setattr(engine, "_most_rows", 9)
    limits = replace(limits, max_new_tokens=80)
    prompts = [
        Request(tuple(engine._chat.prompt_ids(f"{text} {i}")), tuple(range(i, i + 1 + i % 3)))
        for i in range(4)
        for text in TEXTS
    ]
    found = logits_by_prefix(lambda: engine.sample(prompts, limits), monkeypatch)
    assert engine._captures
    assert len(tapes) > 3
    assert sum(tape.replays for tape in tapes) > 100
    monkeypatch.setattr(engine, "_captures", False)
    expected = logits_by_prefix(lambda: engine.sample(prompts, limits), monkeypatch)
    shared = found.keys() & expected.keys()
    assert len(shared) > 0.75 * len(expected) > 400
    for prefix in shared:
        torch.testing.assert_close(found[prefix], expected[prefix], atol=1e-5, rtol=0)


def test_a_step_that_cannot_be_captured_is_computed(
    engine: TransformersEngine,
    tapes: list[Tape],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def impossible(work: Any, *, after: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    prompts, limits = requests(engine, n=2), replace(GREEDY, max_new_tokens=80)
    monkeypatch.setattr(steps, "captured", impossible)
    found = engine.sample(prompts, limits)
    assert not engine._captures
    assert found == engine.sample(prompts, limits)
    [said] = caplog.messages
    assert "(operation not permitted when stream is capturing); sampling without" in said


def test_a_graph_that_gives_something_else_is_not_used(
    engine: TransformersEngine,
    tapes: list[Tape],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As of a model whose code counts its passes: a graph does not count."""
    right = Tape.replay

    def wrong(self: Tape) -> None:
        right(self)
        self.operations[-1][-1].mul_(100)

    monkeypatch.setattr(Tape, "replay", wrong)
    prompts, limits = requests(engine, n=2), replace(GREEDY, max_new_tokens=80)
    found = engine.sample(prompts, limits)
    assert not engine._captures
    assert [tape.replays for tape in tapes] == [1]
    assert found == engine.sample(prompts, limits)
    [said] = caplog.messages
    assert "nats from the model's" in said


def test_biases_and_masks_of_a_models_own_are_refused_by_the_tree(
    engine: TransformersEngine,
) -> None:
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(tree.UnsupportedAttention, match="position_bias"):
        tree.Tree().attend(
            torch.nn.Identity(), states, states, states, None, position_bias=torch.zeros(1)
        )
    with pytest.raises(tree.UnsupportedAttention, match="mask"):
        tree.Tree().attend(torch.nn.Identity(), states, states, states, torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_parts_are_the_attention_over_the_whole(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, n, 8).to(dtype) for n in (4, 20, 20))
    whole = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    bias = torch.zeros(3, 1, 1, 9, dtype=dtype)
    bias[1, ..., 5:] = -torch.inf
    behind = bias.expand(3, 2, 4, 9)
    parts = [
        attention(query, key[:, :, :9], value[:, :, :9], bias=bias),
        attention(query, key[:, :, 9:], value[:, :, 9:]),
    ]
    mask = torch.cat([behind, torch.zeros(3, 2, 4, 11, dtype=dtype)], dim=-1)
    masked = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(merged(parts), masked, atol=tolerance)
    assert not torch.allclose(whole[1], masked[1], atol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_written_out_agrees_with_the_kernel(causal: bool) -> None:
    torch.manual_seed(1)
    query, key, value = (torch.randn(2, 3, 7, 8) for _ in range(3))
    bias = None if causal else torch.zeros(2, 1, 1, 7).masked_fill(torch.arange(7) > 4, -torch.inf)
    for one, two in zip(
        attention(query, key, value, 0.3, causal=causal, bias=bias),
        plain_attention(query, key, value, 0.3, causal=causal, bias=bias),
        strict=True,
    ):
        assert torch.allclose(one, two, atol=1e-5)


def test_the_largest_values_are_found_in_the_best_blocks() -> None:
    torch.manual_seed(2)
    values = torch.randn(5, 64 * 200)
    values[2, 640:660] = 9.0  # all of the best in one block, tied
    found, places = largest(values, 64)
    assert torch.equal(found, values.topk(64).values)
    assert torch.equal(values.gather(1, places), found)
    assert all(len(set(row)) == 64 for row in places.tolist())


def test_no_alternatives_unless_asked_for() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert most_probable(logits, 0) == [()]
    [(first, second)] = most_probable(logits, 2)
    normaliser = float(logits.logsumexp(-1))
    assert first == (1, pytest.approx(2 - normaliser))
    assert second == (2, pytest.approx(1 - normaliser))


def exact_nucleus(logits: torch.Tensor, *, temperature: float, top_p: float) -> torch.Tensor:
    probabilities = (logits.double() / temperature).softmax(dim=-1)
    ordered, order = probabilities.sort(descending=True)
    kept = ordered.cumsum(dim=-1) - ordered < top_p
    result = torch.zeros_like(probabilities)
    result[order[kept]] = ordered[kept]
    return result / result.sum()


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.5, 0.5), (0.7, 1e-6)]
)
def test_token_frequencies_agree_with_the_exact_distribution(
    temperature: float, top_p: float
) -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0])
    exact = exact_nucleus(logits, temperature=temperature, top_p=top_p)
    rows = 20_000
    numbers = uniforms(tuple(range(rows)), 1)[:, 0]
    tokens = draw(logits.expand(rows, -1), numbers, temperature=temperature, top_p=top_p)
    counts = torch.bincount(tokens, minlength=len(logits))
    assert counts[exact == 0].sum() == 0
    inside = exact > 0
    if inside.sum() > 1:
        assert chisquare(counts[inside], (exact[inside] * rows)).pvalue > 1e-3


def test_a_flat_distribution_widens_the_cut_and_stays_exact() -> None:
    """1,000 equal tokens: 900 of them reach .8995, far more than the first cut holds."""
    rows = 20_000
    numbers = uniforms(tuple(range(rows)), 1)[:, 0]
    tokens = draw(torch.zeros(1, 1000).expand(rows, -1), numbers, temperature=1.0, top_p=0.8995)
    counts = torch.bincount(tokens, minlength=1000)
    assert int((counts > 0).sum()) == 900
    assert chisquare(counts[counts > 0]).pvalue > 1e-3


@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("top_p", [0.6, 0.9, 1.0])
def test_a_wide_nucleus_needs_no_sorting(
    monkeypatch: pytest.MonkeyPatch, top_p: float, spread: float
) -> None:
    """The token is the one that sorting all of the vocabulary gives, at both ends as well."""
    torch.manual_seed(3)
    logits = spread * torch.randn(6, 30_000)
    logits[5, 20_000:] = -torch.inf
    number = torch.tensor([0.0, 0.2, 0.5, 0.999, 1 - 2**-53, 0.7], dtype=torch.float64)
    order = logits.argsort(dim=-1, descending=True, stable=True)
    probabilities = (logits - logits.logsumexp(-1, keepdim=True)).exp().double()
    cumulative = probabilities.gather(1, order).cumsum(-1)
    last = (cumulative < top_p).sum(-1, keepdim=True).clamp(max=29_999)
    target = number.unsqueeze(1) * cumulative.gather(1, last)
    expected = order.gather(1, torch.searchsorted(cumulative, target, right=True).minimum(last))
    found = draw(logits, number, temperature=1.0, top_p=top_p)
    inside = slice(None) if spread else slice(1, None, 2)  # equal ones have no order of their own
    sorts: list[int] = []
    monkeypatch.setattr(nucleus, "largest", lambda values, n: sorts.append(n) or largest(values, n))
    assert torch.equal(draw(logits, number, temperature=1.0, top_p=top_p), found)
    assert max(sorts) <= nucleus.MOST_SORTED
    assert torch.equal(found[inside], expected.squeeze(1)[inside])


def test_uniform_numbers_belong_to_their_seed() -> None:
    together = uniforms((5, 6, 7), 10)
    assert torch.equal(together[1:2], uniforms((6,), 10))
    assert torch.equal(together[:, :4], uniforms((5, 6, 7), 4))
    assert float(together.min()) >= 0 and float(together.max()) < 1


def test_the_batch_follows_the_devices_memory(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 layers of 2 key-value heads of 16 in float32: 512 bytes a token; logits 8,272 or so."""
    weights = sum(p.numel() * 4 for p in engine._model.parameters())
    vocabulary = engine._model.config.vocab_size
    row = 512 * 100 + vocabulary * 16
    monkeypatch.setattr(memory, "memory_of", lambda device: weights + 2 * 10 * row + 5)
    assert memory.rows_that_fit(engine._model, tokens=100) == 10
    assert memory.rows_that_fit(engine._model, tokens=10**9) == 1
    monkeypatch.setattr(memory, "memory_of", lambda device: 10**15)
    assert memory.rows_that_fit(engine._model, tokens=100) == MOST_ROWS
