"""What is minimised is the model's own likelihood: families that scale, cap, route, and others."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer

from srlm_lite.errors import ProofError
from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.model.targets import check_targets
from srlm_lite.settings import Anchor, Base, Dpo, Lora
from srlm_lite.training import dpo as dpo_module
from srlm_lite.training import tokens as tokens_module
from srlm_lite.training.dpo import PairExample, train_dpo
from srlm_lite.training.sft import Example, train_sft
from srlm_lite.training.tokens import TargetTokens, prove_own

hf: Any = transformers
VOCABULARY = 448  # the tokenizer has fewer
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, **ROUTED}
GRANITE = {"logits_scaling": 0.25, "embedding_multiplier": 3.0, "attention_multiplier": 0.2}
LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
MAMBA = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
SPARSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEP = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "granite": ("GraniteConfig", GRANITE),
    "cohere": ("CohereConfig", {"logit_scale": 3.0}),
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}),
    "minicpm3": ("MiniCPM3Config", {**LATENT, "dim_model_base": 8}),
    "falcon_h1": ("FalconH1Config", {"lm_head_multiplier": 3.0, **MAMBA}),
    "gpt_neox": ("GPTNeoXConfig", {"hidden_dropout": 0.3, "attention_dropout": 0.2}),
    "opt": (
        "OPTConfig",
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.3, "layerdrop": 0.2},
    ),
    "mixtral": ("MixtralConfig", EXPERTS),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, **SPARSE, **ROUTED}),
    "granitemoe": ("GraniteMoeConfig", {**EXPERTS, **GRANITE}),
    "gpt_oss": ("GptOssConfig", {"sliding_window": 8, **EXPERTS}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**LATENT, "head_dim": 4, **SPARSE, **DEEP, "n_group": 1, "topk_group": 1},
    ),
}
NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            not hasattr(hf, FAMILIES[name][0]), reason="transformers does not have it"
        ),
    )
    for name in FAMILIES
]
SCALES = ("granite", "cohere", "gemma2", "minicpm3", "falcon_h1", "granitemoe")
"""What the head gives is not what these models take for logits."""
ATTENTION = {"q_proj", "v_proj", "query_key_value", "q_b_proj", "kv_b_proj"}

Ids = tuple[int, ...]
Family = Callable[..., LoadedBase]


def ids(seed: int, count: int) -> Ids:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCABULARY, (count,), generator=generator).tolist())


EXAMPLES = [Example(ids(i, 3 + i), ids(10 + i, 7 - i)) for i in range(5)]
PAIRS = [PairExample(ids(i, 4), ids(20 + i, 3 + i), ids(30 + i, 6 - i)) for i in range(3)]


@pytest.fixture(scope="module")
def family(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base of a family, random and in float32 unless said otherwise, loaded from its files."""
    made: dict[str, Path] = {}

    def base(name: str, dtype: str = "float32") -> LoadedBase:
        if name not in made:
            made[name] = folder = tmp_path_factory.mktemp(name)
            kind, settings = FAMILIES[name]
            torch.manual_seed(0)
            model = hf.AutoModelForCausalLM.from_config(getattr(hf, kind)(**COMMON | settings))
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(4 if weight.dim() > 1 else 1)  # far from uniform
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(tiny_base_dir).save_pretrained(folder)
        section = Base(name=str(made[name]), quantization="none", dtype=dtype, device="cpu")
        return load_base(section)

    return base


def slot_of(base: LoadedBase) -> tuple[Slot, Lora]:
    there = {name.rpartition(".")[2] for name, _ in base.model.named_modules()}
    lora = Lora(rank=2, alpha=4, targets=tuple(sorted(there & ATTENTION)))
    return Slot(base.model, targets=lora.targets, rank=4), lora


def nats(model: Any, prompt: Ids, target: Ids) -> float:
    """Nats of a target after its prompt, from the logits of one plain pass."""
    with torch.no_grad():
        whole = torch.tensor([[*prompt, *target]])
        chances = model(input_ids=whole).logits[0].float().log_softmax(dim=-1)
    first = len(prompt) - 1
    return -float(sum(chances[first + i, token] for i, token in enumerate(target)))


def own_nll(model: Any) -> float:
    total = sum(nats(model, one.prompt_ids, one.target_ids) for one in EXAMPLES)
    return total / sum(len(one.target_ids) for one in EXAMPLES)


def anchored(slot: Slot, base: LoadedBase, lora: Lora, scratch: Path, micro: int = 5) -> Any:
    return train_sft(
        slot,
        base,
        slot.fresh(lora, seed=1),
        EXAMPLES,
        optim=Anchor(learning_rate=1e-3, batch_size=5, micro_batch_size=micro),
        dropout=0.0,
        scratch=scratch,
        seed=1,
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_losses_are_the_model_s_own(name: str, family: Family, tmp_path: Path) -> None:
    """SFT's first loss is the mean over all targets; DPO's ln 2, though a router has its own."""
    base = family(name)
    settings = {key: getattr(base.model.config, key, None) for key in ROUTED}
    own = own_nll(base.model)
    slot, lora = slot_of(base)
    anchor, facts = anchored(slot, base, lora, tmp_path)
    assert facts["step0_nll"] == pytest.approx(own, abs=1e-5)
    assert facts["first_loss"] == pytest.approx(own, abs=1e-5)  # the base drops nothing out
    _, facts = train_dpo(
        slot,
        base,
        anchor=[anchor],
        delta=slot.fresh(lora, seed=2),
        reference=[anchor],
        pairs=PAIRS,
        dpo=Dpo(learning_rate=1e-3, batch_size=3, micro_batch_size=3, nll_weight=0.5),
        scratch=tmp_path,
        seed=2,
    )
    assert facts["step0_loss"] == pytest.approx(math.log(2), abs=1e-6)
    slot.load([anchor])
    chosen = sum(nats(slot.model, one.prompt_ids, one.chosen_ids) for one in PAIRS)
    nll = chosen / sum(len(one.chosen_ids) for one in PAIRS)
    assert facts["first_loss"] == pytest.approx(math.log(2) + 0.5 * nll, abs=2e-5)
    assert {key: getattr(base.model.config, key, None) for key in ROUTED} == settings
    assert "forward" not in vars(slot.model.get_base_model())


def padded(examples: list[Example]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    width = max(map(len, examples))
    inputs = torch.zeros(len(examples), width, dtype=torch.long)
    mask, scored = torch.zeros_like(inputs), []
    for row, one in enumerate(examples):
        inputs[row, : len(one)] = torch.tensor([*one.prompt_ids, *one.target_ids])
        mask[row, : len(one)] = 1
        first = len(one.prompt_ids) - 1
        scored += [(row, first + i, target) for i, target in enumerate(one.target_ids)]
    places = tuple(torch.tensor(column) for column in zip(*scored, strict=True))
    return {"input_ids": inputs, "attention_mask": mask}, places


@pytest.mark.parametrize("name", NAMES)
def test_pieces_give_the_gradients_of_whole_logits(
    name: str, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tokens at a time, computed again in the backward pass, against one pass with all."""
    monkeypatch.setattr(tokens_module, "PIECE", 2)
    base = family(name)
    slot, lora = slot_of(base)
    slot.load([slot.fresh(lora, seed=1)], train=True)
    weights = [one for one in slot.model.parameters() if one.requires_grad]
    batch, scored = padded(EXAMPLES)
    scorer = TargetTokens(slot.model, ids(1, 9))
    assert scorer._path is not None
    found = []
    for path in (scorer._path, None):  # None: whole logits
        scorer._path = path
        with scorer.answering():
            scores = slot.model(**batch, scored=scored, use_cache=False).logits
        gradients = torch.autograd.grad(scores.sum(), weights)
        found.append((scores.detach(), gradients))
    (pieces, by_pieces), (whole, by_whole) = found
    assert torch.allclose(pieces, whole, atol=1e-5)
    largest = max(float(one.abs().max()) for one in by_whole)
    assert largest > 1e-2
    for one, other in zip(by_pieces, by_whole, strict=True):
        assert torch.allclose(one, other, atol=1e-5 * largest)
    own = sum(scorer.own(slot.model, (one.prompt_ids, one.target_ids)) for one in EXAMPLES)
    assert own == pytest.approx(float(whole.sum()), rel=1e-5)


@pytest.mark.parametrize("name", [one for one in SCALES if hasattr(hf, FAMILIES[one][0])])
def test_a_head_that_is_only_multiplied_with_is_no_proof(
    name: str, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TRL's chunked loss does it: the run stops before its first step, with both figures."""
    base = family(name)
    head: Any = base.model.get_output_embeddings()
    monkeypatch.setattr(TargetTokens, "_logits", lambda self, path, kind, states, ids: head(states))
    monkeypatch.setattr(TargetTokens, "_works", lambda *args: True)
    slot, lora = slot_of(base)
    with pytest.raises(ProofError, match=r"SFT's loss is \d+\.\d+ nats a token, the model's own"):
        anchored(slot, base, lora, tmp_path)
    assert "forward" not in vars(slot.model.get_base_model())


def test_a_family_that_cannot_be_asked_in_pieces_is_computed_whole(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that takes nothing else for its backbone."""
    base = family("granite")
    kind = type(base.model)
    forward = kind.forward

    def choosy(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self.model).__name__ != "GraniteModel":
            raise TypeError("no backbone of Granite's")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", choosy)
    own = own_nll(base.model)
    slot, lora = slot_of(base)
    assert TargetTokens(slot.model, ids(1, 5))._path is None
    _, facts = anchored(slot, base, lora, tmp_path)
    assert facts["first_loss"] == pytest.approx(own, abs=1e-5)


def test_a_term_beside_dpo_s_is_named_as_that(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = dpo_module.PairTrainer.loss

    def more(self: Any, *args: Any) -> Any:
        loss, told = compute(self, *args)
        return loss + 0.008, told

    monkeypatch.setattr(dpo_module.PairTrainer, "loss", more)
    base = family("llama")
    slot, lora = slot_of(base)
    with pytest.raises(ProofError, match=r"must be ln 2.* but something is added to DPO's loss"):
        train_dpo(
            slot,
            base,
            anchor=[],
            delta=slot.fresh(lora, seed=1),
            reference=[],
            pairs=PAIRS,
            dpo=Dpo(batch_size=1, micro_batch_size=1),
            scratch=tmp_path,
            seed=1,
        )


def test_rounding_is_no_other_model() -> None:
    prove_own(5.0049, 5.0, torch.float32, what="it")
    prove_own(5.1, 5.0, torch.bfloat16, what="it")
    for loss, dtype in ((5.007, torch.float32), (5.13, torch.bfloat16), (math.nan, torch.float32)):
        with pytest.raises(ProofError):
            prove_own(loss, 5.0, dtype, what="it")


@pytest.mark.parametrize("name", ["granite", "gemma2", "mixtral", "gpt_oss"])
def test_the_proofs_hold_in_bfloat16(name: str, family: Family, tmp_path: Path) -> None:
    base = family(name, "bfloat16")
    slot, lora = slot_of(base)
    _, facts = anchored(slot, base, lora, tmp_path, micro=1)
    assert facts["step0_nll"] == pytest.approx(own_nll(base.model), rel=0.02)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_may_be_a_target(
    quantization: Any, tied: bool, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It learns in SFT, with dropout, and in DPO; tied embeddings stay what they were."""
    name = f"llama {tied}"
    monkeypatch.setitem(FAMILIES, name, ("LlamaConfig", {"tie_word_embeddings": tied}))
    folder = family(name).model.name_or_path
    base = load_base(Base(name=folder, quantization=quantization, dtype="float32", device="cpu"))
    embeddings = base.model.get_input_embeddings().weight.clone()
    targets = ("q_proj", "lm_head")
    check_targets(base.model, targets)
    slot, lora = Slot(base.model, targets=targets, rank=4), Lora(rank=2, alpha=4, targets=targets)
    start = slot.fresh(lora, seed=1)
    anchor, facts = train_sft(
        slot,
        base,
        start,
        EXAMPLES,
        optim=Anchor(learning_rate=5e-2, batch_size=3, micro_batch_size=1, epochs=10),
        dropout=0.2,
        scratch=tmp_path,
        seed=1,
    )
    assert facts["last_loss"] < facts["first_loss"] - 0.5
    delta, facts = train_dpo(
        slot,
        base,
        anchor=[anchor],
        delta=slot.fresh(lora, seed=2),
        reference=[anchor],
        pairs=PAIRS,
        dpo=Dpo(learning_rate=1e-2, batch_size=3, micro_batch_size=3, epochs=8),
        scratch=tmp_path,
        seed=2,
    )
    assert facts["step0_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert facts["last_loss"] < math.log(2) - 0.05
    for adapter in (anchor, delta):
        assert float(adapter.factors["lm_head"][1].abs().max()) > 0
    assert base.model.get_input_embeddings().weight.equal(embeddings)
    # Sampled with: the head's update is in the logits, and its weight is nobody else's.
    prompt, target = EXAMPLES[0].prompt_ids, EXAMPLES[0].target_ids
    slot.load([anchor])
    with_head = nats(slot.model, prompt, target)
    rest = {key: value for key, value in anchor.factors.items() if key != "lm_head"}
    slot.load([Adapter(anchor.rank, anchor.alpha, rest)])
    assert with_head < nats(slot.model, prompt, target) - 0.1
