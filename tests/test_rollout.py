"""Sampling: equal to plain `generate`, true to the distribution, one seed for each sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from srlm_lite.config import Base, Lora
from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.stack import Slot
from srlm_lite.rollout import transformers_engine
from srlm_lite.rollout.nucleus import draw, uniforms
from srlm_lite.rollout.protocol import Limits, Request, Sample
from srlm_lite.rollout.transformers_engine import TransformersEngine, _shared_prefix

TEXTS = ("moon", "How do I look after a bicycle?", "Read the reply and judge it, please.", "a b c")
GREEDY = Limits(temperature=0.0, top_p=1.0, max_new_tokens=12)
WARM = Limits(temperature=1.0, top_p=0.95, max_new_tokens=12)


@pytest.fixture(scope="module")
def base(tiny_base_dir: Path) -> LoadedBase:
    return load_base(Base(name=str(tiny_base_dir), dtype="float32"))


@pytest.fixture(scope="module")
def engine(base: LoadedBase) -> TransformersEngine:
    slot = Slot(base.model, targets=("q_proj", "v_proj"), rank=4)
    slot.load([slot.fresh(Lora(rank=4, alpha=4), seed=0)])
    return TransformersEngine(slot.model, ChatFormat.of(base), batch_rows=64)


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
    """Ragged prompts, left-padded, a prefix shared by n samples, against one by one."""
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


def test_a_prefix_that_all_prompts_share_is_computed_once(
    engine: TransformersEngine, base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a rubric: long fixed text first, then what differs; and nothing else changes."""
    rubric = "Read the reply and judge it. One point for each thing that it does well. " * 3
    prompts = [
        Request(tuple(engine._chat.prompt_ids(rubric + text)), (i, i + 50))
        for i, text in enumerate((*TEXTS, ""))
    ]
    lengths: list[tuple[int, ...]] = []
    decoder = engine._model.get_base_model().get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    results = engine.sample(prompts, GREEDY)
    hook.remove()
    shared = _shared_prefix([prompt.prompt_ids for prompt in prompts])
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    assert shared > 40
    assert lengths[:3] == [(1, shared), (5, longest - 1 - shared), (10, 1)]
    for prompt, samples in zip(prompts, results, strict=True):
        expected = plain_generate(engine, base, prompt)
        for sample in samples:
            assert list(sample.token_ids) == expected[: len(sample.token_ids)]


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        ([(1, 2, 3, 4), (1, 2, 9)], 2),
        ([(1, 2, 3), (1, 2, 3)], 2),  # the last token of a prompt is always its own
        ([(1, 2, 3)], 0),
        ([(1,), (1, 2)], 0),
        ([(5, 6), (7, 6)], 0),
        ([(1, 2, 3), (1, 2, 3, 4), (1, 2, 8, 9)], 2),
    ],
)
def test_the_shared_prefix(rows: list[tuple[int, ...]], length: int) -> None:
    assert _shared_prefix(rows) == length


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
    widths: list[int] = []
    decoder = engine._model.get_base_model().get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    together = engine.sample(prompts, limits)
    hook.remove()
    assert len(set(widths)) >= 3  # the batch did shrink
    reasons = {sample.finish_reason for row in together for sample in row}
    assert "stop" in reasons
    assert len({len(sample.token_ids) for row in together for sample in row}) >= 4
    for place, prompt in enumerate(prompts):
        for sample, seed in zip(together[place], prompt.seeds, strict=True):
            alone = engine.sample([Request(prompt.prompt_ids, (seed,))], limits)
            assert alone == [[sample]]


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
    small = TransformersEngine(engine._model, engine._chat, batch_rows=12)
    generate, sizes = TransformersEngine._generate, []

    def hungry(self: TransformersEngine, batch: Any, limits: Limits) -> Any:
        rows = sum(len(request.seeds) for request in batch)
        sizes.append(rows)
        if rows > 3:
            raise torch.OutOfMemoryError("out of memory")
        return generate(self, batch, limits)

    monkeypatch.setattr(transformers_engine.TransformersEngine, "_generate", hungry)
    assert ids(small.sample(prompts, WARM)) == expected
    assert sizes == [12, 6, 3, 3, 3, 3]


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, batch: Any, limits: Limits) -> Any:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(TransformersEngine, "_generate", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        engine.sample(requests(engine, n=2), WARM)


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


def test_uniform_numbers_belong_to_their_seed() -> None:
    together = uniforms((5, 6, 7), 10)
    assert torch.equal(together[1:2], uniforms((6,), 10))
    assert torch.equal(together[:, :4], uniforms((5, 6, 7), 4))
    assert float(together.min()) >= 0 and float(together.max()) < 1
