"""Sampling on bases whose layers see a window of the past, cap their scores or have sinks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tapes import logits_by_prefix, taped

from srlm_lite.model.base import load_base
from srlm_lite.model.chat import ChatFormat
from srlm_lite.model.random_base import random_base
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.rollout import steps, tree
from srlm_lite.rollout.protocol import Limits, Request
from srlm_lite.rollout.transformers_engine import TransformersEngine
from srlm_lite.rollout.tree import Tree, Window
from srlm_lite.settings import Base, Lora

hf: Any = transformers

WINDOW = 24
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
GREEDY = Limits(temperature=0.0, top_p=1.0, max_new_tokens=20, ignore_end=True)

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
THREE = {"layer_types": [SLIDING, FULL, SLIDING], "sliding_window": WINDOW}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "all layers": ("MistralConfig", {"sliding_window": WINDOW}),
    "one key-value head": ("Gemma3TextConfig", {**THREE, "num_key_value_heads": 1}),
    "from a layer on": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "fused projections": ("Phi3Config", {"sliding_window": WINDOW}),
    "no positions where all is seen": ("Cohere2Config", THREE),
    "norms behind": ("Olmo3Config", THREE),
    "caps": (
        "Gemma2Config",
        {**THREE, "attn_logit_softcapping": 0.2, "attn_implementation": "eager"},
    ),
    "caps that sdpa drops": ("Gemma2Config", {**THREE, "attn_logit_softcapping": 0.2}),
    "sinks": (
        "GptOssConfig",
        {**THREE, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": None},
    ),
    "chunks": (
        "Llama4TextConfig",
        {
            "layer_types": [CHUNKED, FULL, CHUNKED],
            "no_rope_layers": [1, 0, 1],
            "attention_chunk_size": WINDOW,
            "attn_temperature_tuning": False,
            "intermediate_size_mlp": 96,
            "moe_layers": [],
            "num_local_experts": 2,
        },
    ),
}


def model_of(kind: str, **changes: Any) -> Any:
    """Random weights, wide enough apart that what is hidden changes what is sampled."""
    name, settings = KINDS[kind]
    settings = {**SMALL, **settings, **changes}
    implementation = settings.pop("attn_implementation", None)
    if settings.get("rope_parameters", 0) is None:
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(
        getattr(hf, name)(**settings), dtype=torch.float32, attn_implementation=implementation
    )
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in path:
                parameter.mul_(4)
            if path.endswith("sinks"):
                parameter.normal_(std=2)
    return model.eval()


@pytest.fixture(scope="module")
def chat(tiny_base_dir: Path) -> ChatFormat:
    return ChatFormat.of(load_base(Base(name=str(tiny_base_dir), dtype="float32")))


def prompts(*, shared: int) -> list[Request]:
    """Ids at random, shorter and longer than the window, all with the same start."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(3, 512, (shared,), generator=generator).tolist()
    return [
        Request(
            (*start, *torch.randint(3, 512, (length,), generator=generator).tolist()),
            tuple(range(10 * length, 10 * length + 1 + length % 3)),
        )
        for length in (3, 9, 30, 61, 2, 27, 40)
    ]


def engine_of(
    model: Any, chat: ChatFormat, *, batch_rows: int = 5, fold: bool = False
) -> TransformersEngine:
    target = (
        "qkv_proj" if any("qkv_proj" in name for name, _ in model.named_modules()) else "q_proj"
    )
    slot = Slot(model, targets=(target,), rank=2, fold=fold)
    engine = TransformersEngine(slot, chat, batch_rows=batch_rows)
    fresh = slot.fresh(Lora(rank=2, alpha=2, targets=(target,)), seed=0)
    factors = {name: (a, torch.full_like(b, 0.1)) for name, (a, b) in fresh.factors.items()}
    engine.load([Adapter(rank=2, alpha=2, factors=factors)])
    return engine


def generated(model: Any, request: Request) -> tuple[int, ...]:
    ids = torch.tensor([request.prompt_ids])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=GREEDY.max_new_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tuple(output[0, ids.shape[1] :].tolist())


def most_probable(model: Any, prompt: tuple[int, ...], reply: tuple[int, ...]) -> tuple[int, ...]:
    """What the model without a cache takes for the best token at each place of a reply."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *reply]]), use_cache=False).logits[0]
    return tuple(logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist())


@pytest.mark.parametrize("shared", [0, 18, 40], ids=lambda shared: f"trunk of {shared}")
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_token_for_token_what_the_model_gives(
    kind: str, shared: int, chat: ChatFormat
) -> None:
    """Prompts, and replies, begin and end on both sides of the window; rows enter and leave."""
    model = model_of(kind)
    engine = engine_of(model, chat)
    asked = prompts(shared=shared)
    found = engine.sample(asked, GREEDY)
    assert engine._branches is True
    assert engine._windows == {WINDOW} == {engine._proven_window}
    for request, row in zip(asked, found, strict=True):
        [reply] = {sample.token_ids for sample in row}
        assert reply == most_probable(model, request.prompt_ids, reply)
    if shared == 18:
        assert [sample.token_ids for sample in found[2]] == [generated(model, asked[2])]


@pytest.mark.parametrize("kind", ["all layers", "chunks"])
def test_what_lies_behind_the_window_is_hidden(kind: str, chat: ChatFormat) -> None:
    """The same weights that see all of the past sample something else, where a row is longer."""
    seeing = {"sliding_window": 400, "attention_chunk_size": 400}
    narrow, wide = model_of(kind), model_of(kind, **seeing)
    asked = prompts(shared=0)
    one, other = (engine_of(model, chat).sample(asked, GREEDY) for model in (narrow, wide))
    longer = [len(request.prompt_ids) + GREEDY.max_new_tokens > WINDOW for request in asked]
    assert longer == [False, True, True, True, False, True, True]
    assert [a != b for a, b in zip(one, other, strict=True)] == longer


@pytest.mark.parametrize("kind", ["caps", "sinks"])
def test_caps_and_sinks_change_what_is_sampled(
    kind: str, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a tree without them could not pass for one with them."""
    engine, asked = engine_of(model_of(kind), chat), prompts(shared=0)
    expected = engine.sample(asked, GREEDY)
    whole = Tree.attend

    def bare(self: Tree, *args: Any, **kwargs: Any) -> Any:
        return whole(self, *args, **{**kwargs, "softcap": None, "s_aux": None})

    monkeypatch.setattr(Tree, "attend", bare)
    assert engine.sample(asked, GREEDY) != expected


@pytest.mark.parametrize("kind", ["caps", "one key-value head"])
def test_a_prompt_longer_than_a_block_is_computed_in_blocks(
    kind: str, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(kind)
    asked = prompts(shared=18)
    engine = engine_of(model, chat)
    expected = engine.sample(asked, GREEDY)
    engine.close()
    monkeypatch.setattr(tree, "BLOCK", 7)
    assert engine.sample(asked, GREEDY) == expected


@pytest.mark.parametrize("kind", ["one key-value head", "chunks", "sinks", "caps"])
def test_replayed_steps_are_the_steps(
    kind: str, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of unlike age, whose windows leave trunk and branch behind while a graph is replayed."""
    engine = engine_of(model_of(kind), chat, batch_rows=7)
    monkeypatch.setattr(steps, "HELD", 24)
    monkeypatch.setattr(chat, "stop_ids", tuple(range(3, 512, 40)))
    limits = Limits(temperature=1.0, top_p=0.95, max_new_tokens=60)
    asked = prompts(shared=18)
    expected = logits_by_prefix(lambda: engine.sample(asked, limits), monkeypatch)
    tapes = taped(engine, monkeypatch)
    found = logits_by_prefix(lambda: engine.sample(asked, limits), monkeypatch)
    assert engine._captures
    assert sum(tape.replays for tape in tapes) > 50
    shared = found.keys() & expected.keys()
    assert len(shared) > 0.75 * len(expected) > 100
    for prefix in shared:
        torch.testing.assert_close(found[prefix], expected[prefix], atol=1e-4, rtol=0)


@pytest.mark.parametrize("fold", [False, True], ids=["beside", "folded"])
def test_a_window_on_a_base_in_4_bits(chat: ChatFormat, fold: bool) -> None:
    name, settings = KINDS["one key-value head"]
    base = random_base(
        getattr(hf, name)(**{**SMALL, **settings}),
        name="tiny",
        device=torch.device("cpu"),
        dtype=torch.float32,
        quantization="nf4",
    )
    engine = engine_of(base.model, chat, fold=fold)
    asked = prompts(shared=18)
    found = engine.sample(asked, GREEDY)
    assert engine._branches is True
    for request, row in zip(asked, found, strict=True):
        [reply] = {sample.token_ids for sample in row}
        assert reply == most_probable(engine._model, request.prompt_ids, reply)


def test_the_proof_is_made_again_where_a_window_begins_to_bind(
    chat: ChatFormat, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A tree that hides nothing: right as long as all is within the window, and then found out."""
    monkeypatch.setattr(Window, "hidden", lambda self, queries, keys: keys > queries)
    model = model_of("all layers")
    engine = engine_of(model, chat)
    short, long = prompts(shared=0)[0], prompts(shared=0)[3]
    engine.sample([short], GREEDY)
    assert (engine._branches, engine._proven_window) == (True, 0)
    [[sample]] = [row[:1] for row in engine.sample([long], GREEDY)]
    assert (engine._branches, engine._proven_window) == (False, WINDOW)
    assert sample.token_ids == most_probable(model, long.prompt_ids, sample.token_ids)
    [said] = caplog.messages
    assert said == "this model's attention is its own; sampling with plain generate"


def test_a_layer_that_counts_its_own_positions_is_sampled_with_generate(chat: ChatFormat) -> None:
    """Llama 4 scales queries by the cache's length, which in a batch of one age is a row's own."""
    model = model_of("chunks", attn_temperature_tuning=True, floor_scale=8, attn_scale=2.0)
    engine = engine_of(model, chat)
    request = prompts(shared=0)[2]
    [row] = engine.sample([request], GREEDY)
    assert engine._branches is False
    assert row[0].token_ids == generated(model, request)


@torch.inference_mode()
def test_a_base_that_caps_its_scores_is_loaded_with_its_caps(
    tiny_base_dir: Path, tmp_path: Path
) -> None:
    """By transformers' default they are gone before 5.21; a run that was begun so goes on so."""
    model_of("caps").save_pretrained(tmp_path)
    hf.AutoTokenizer.from_pretrained(tiny_base_dir).save_pretrained(tmp_path)
    ids = torch.tensor([prompts(shared=0)[3].prompt_ids])
    own, bare = (model_of(kind)(ids).logits for kind in ("caps", "caps that sdpa drops"))
    drops = Version(hf.__version__) < Version("5.21")
    assert (float((own - bare).abs().max()) > 0.005) == drops
    for attention, expected in {"own": own, "sdpa": bare}.items():
        section = Base(name=str(tmp_path), dtype="float32", attention=attention)
        assert torch.allclose(load_base(section).model(ids).logits, expected, atol=1e-6)
