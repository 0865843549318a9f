"""Bytes that a base, its adapters and the work on them take, from shapes alone.

Everything here is arithmetic on what the code keeps: what autograd saves of a layer whose base is
frozen, what the losses hold of the logits, what the tree of keys and values holds. A test runs
the real thing and counts. What shapes cannot give, the memory of an interpreter with its libraries,
are the constants `LIBRARIES`.

Letters: c bytes of the compute dtype, H hidden size, I of the MLP, D of a head, V vocabulary, R
rank of the slot, L layers, T tokens in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from srlm_lite.rollout.sizes import (
    DRAWING,
    DRAWN,
    GATHERED,
    PREFILL_TOKENS,
    PRUNE,
    drawing_bytes,
    kv_bytes,
    leaf_room,
)
from srlm_lite.settings import is_targeted
from srlm_lite.training.sizes import PIECE

Device = Literal["cpu", "cuda"]
Training = Literal["sft", "dpo", "reward", "rloo"]

LIBRARIES: Mapping[Device, Mapping[str, int]] = {
    "cpu": {"sampling": 660_000_000, "training": 800_000_000, "export": 480_000_000},
    "cuda": {"sampling": 800_000_000, "training": 800_000_000, "export": 480_000_000},
}
"""What an interpreter holds with the libraries that a phase imports, the tokenizer and the model's
code, mapped files included. Of a CPU: measured with SmolLM2. Of a GPU, the CUDA context and the
libraries' workspaces: measured on an H100 that trained a base of 70B, and taken for sampling as
well. An export runs on the CPU."""

ROUNDING: Mapping[Device, int] = {"cpu": 16, "cuda": 2}
"""Bytes a weight that rounding a tensor to NF4 takes. A GPU has the tensor in 16 bits, and one
kernel. A CPU has it once more and scaled, both in float32, its codes in 32 bits and in 8, and two
halves of the packed result."""
HOLES = 0.5
"""What the C library's heap loses between the activations of a training on a CPU, as a share of
them. A pass frees tensors of many sizes between those that it keeps, and the next ones fit only in
part. By Knuth's fifty-percent rule (The Art of Computer Programming 1, 2.5) such a heap has half as
many free blocks as used ones; here they count as equally large."""
MAPPED = 32 << 20
"""Bytes from which glibc keeps a block outside of its heap, by itself: there are no holes. Logits
are nearly always that large."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of the model. `quantized`: NF4 rounds it, where a base is held in NF4;
    `adaptable`: it is of the text model and can carry an adapter."""

    name: str
    inputs: int
    outputs: int
    quantized: bool
    adaptable: bool = True

    @property
    def last_name(self) -> str:
        """As recipes name it."""
        return self.name.rpartition(".")[2]

    @property
    def is_of_a_layer(self) -> bool:
        """Whether it belongs to a decoder layer, which has a number."""
        return any(part.isdigit() for part in self.name.split("."))


@dataclass(frozen=True, slots=True)
class Shape:
    """A base without its weights."""

    parameters: int
    """Tied ones counted once."""
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    """Query heads of a layer, and the width of one; 0 where nothing attends."""
    head_width: int
    kv_width: int
    """Keys and values that a layer keeps of a token."""
    linears: tuple[Linear, ...]
    largest: int
    """Parameters of the largest tensor."""
    embedded: int
    """Parameters of the embedding and the head."""
    windows: tuple[int, ...] = ()
    """Tokens that a layer sees, of each layer that does not see all of the past."""
    experts: int = 0
    """Parameters of a mixture's experts, where all of a layer lie in one: no NF4 reaches them."""
    lean_norms: bool = False
    """Whether a training keeps of a norm no more than what goes in."""

    def adapted(self, targets: Collection[str]) -> list[Linear]:
        """The linear layers that carry an adapter."""
        layers = (linear for linear in self.linears if linear.adaptable)
        return [linear for linear in layers if is_targeted(linear.name, targets)]

    def adapter_parameters(self, targets: Collection[str], rank: int) -> int:
        """Parameters of one LoRA: R (inputs + outputs) for each layer."""
        return rank * sum(linear.inputs + linear.outputs for linear in self.adapted(targets))


@dataclass(frozen=True, slots=True)
class Held:
    """A base as a run holds it, with the slot around it.

    Args:
        itemsize: Bytes of the compute dtype: 2 or 4.
        rank: Of the slot: the anchor's and the delta's together.
        fold: The stack is written into a second copy of the target weights while sampling, in the
            compute dtype.
        shards: Devices that the decoder layers are spread over; 1: each has them all.
    """

    shape: Shape
    nf4: bool
    itemsize: int
    device: Device
    targets: tuple[str, ...]
    rank: int
    fold: bool = False
    shards: int = 1

    @property
    def base(self) -> int:
        """The frozen weights: of a spread base this device's part, and the gathered layers."""
        if self.shards == 1:
            return self._whole
        # The scales of 4-bit weights are not spread, nor are the norms, which are next to nothing.
        layers = [one for one in self.shape.linears if one.is_of_a_layer and one.adaptable]
        weights = sum(one.inputs * one.outputs for one in layers)
        spread = weights // 2 if self.nf4 else weights * self.itemsize
        spread += self.shape.experts * self.itemsize
        gathered = GATHERED * spread // self.shape.layers
        return self._whole - spread + math.ceil(spread / self.shards) + gathered

    @property
    def _whole(self) -> int:
        """All of them.

        NF4 with double quantization: half a byte a weight, one byte a block of 64 for its scale,
        and four bytes for each 256 scales.
        """
        if not self.nf4:
            return self.shape.parameters * self.itemsize
        packed = 0
        for linear in (one for one in self.shape.linears if one.quantized):
            blocks = math.ceil(linear.inputs * linear.outputs / 64)
            packed += linear.inputs * linear.outputs // 2 + blocks + 4 * math.ceil(blocks / 256)
        return packed + self.itemsize * (self.shape.parameters - self.quantized)

    @property
    def quantized(self) -> int:
        """Parameters that NF4 rounds."""
        return sum(one.inputs * one.outputs for one in self.shape.linears if one.quantized)

    @property
    def not_in_4_bits(self) -> dict[str, int]:
        """Bytes of what NF4 does not reach."""
        shape = self.shape
        parts = {"fused experts": shape.experts, "embedding and head": shape.embedded}
        rest = shape.parameters - self.quantized - sum(parts.values())
        parts["convolutions, norms and the like"] = rest
        return {part: count * self.itemsize for part, count in parts.items()}

    @property
    def slot(self) -> int:
        """Parameters of the slot."""
        return self.shape.adapter_parameters(self.targets, self.rank)

    @property
    def scratch(self) -> int:
        """NF4: the largest layer, expanded for a product."""
        sizes = [one.inputs * one.outputs for one in self.shape.linears if one.quantized]
        return self.itemsize * max(sizes, default=0) if self.nf4 else 0

    @property
    def rounding(self) -> int:
        """The largest tensor on its way, while the rest of the base is loaded: into NF4, or from
        one tensor an expert into one for all."""
        sizes = [one.inputs * one.outputs for one in self.shape.linears if one.quantized]
        rounded = ROUNDING[self.device] * max(sizes, default=0) if self.nf4 else 0
        return max(rounded, self.itemsize * self.shape.largest if self.shape.experts else 0)

    @property
    def mixed(self) -> bool:
        """Adapters in float32, products in 16 bits: mixed precision."""
        return self.itemsize < 4

    @property
    def first_layer(self) -> list[Linear]:
        """The adapted linear layers of one decoder layer."""
        return [one for one in self.shape.adapted(self.targets) if ".0." in one.name]

    @property
    def kv_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        shape = self.shape
        return kv_bytes(layers=shape.layers, width=shape.kv_width, itemsize=self.itemsize)

    def kv_of_prompt(self, tokens: int) -> int:
        """Keys and values of a prompt: a layer with a window keeps what a reply can still see."""
        shape = self.shape
        seen = (min(tokens, max(1, window - 1)) for window in shape.windows)
        kept = (shape.layers - len(shape.windows)) * tokens + sum(seen)
        return kept * kv_bytes(layers=1, width=shape.kv_width, itemsize=self.itemsize)


def loading(held: Held) -> dict[str, int]:
    """The base when its largest tensor is the last to come; nothing else is there yet."""
    return {"base": held.base, "activations": held.rounding}


def sampling(
    held: Held,
    *,
    prompts: int,
    samples: int,
    prompt_tokens: int,
    new_tokens: int,
    refills: bool = False,
) -> dict[str, int]:
    """Sampling `samples` texts after each of `prompts` prompts, all in one batch.

    It has two widest moments: the prompts are read, while no text has grown; and the texts have
    grown, while one token at a time is computed. Prompts are counted as if they shared nothing;
    the keys and values of each are kept once for all of its samples. What a growing tree copies, it
    copies layer by layer; that is less than what a moment later is computed on it.

    Args:
        refills: More prompts wait, and are read when a share `PRUNE` of the texts has ended.
    """
    shape, c = held.shape, held.itemsize
    rows = prompts * samples
    fixed = {"base": held.base, "adapters": c * held.slot + _stack(held)}
    if held.fold:
        folded = (one.inputs * one.outputs for one in shape.adapted(held.targets))
        fixed["adapters"] += c * sum(folded)

    def moment(*, read: int, room: int, drawn: int) -> dict[str, int]:
        kept = prompts * held.kv_of_prompt(prompt_tokens) + held.kv_per_token * rows * room
        # On a CPU tokens are drawn in parts, on a GPU from all rows at once.
        at_once = min(drawn * shape.vocabulary, DRAWN) if held.device == "cpu" else 0
        logits = drawn * (
            shape.vocabulary * c if held.device == "cpu" else drawing_bytes(shape.vocabulary, c)
        )
        return {
            **fixed,
            "activations": read * passing(held) + held.scratch,
            "kv_cache": kept,
            "logits": logits + at_once * DRAWING,
        }

    def read(count: int) -> int:
        return min(count * prompt_tokens, max(PREFILL_TOKENS, prompt_tokens))

    room = leaf_room(new_tokens)
    moments = (
        moment(read=read(prompts), room=0, drawn=0),
        moment(read=rows, room=room, drawn=rows),
        moment(read=read(math.ceil(PRUNE * prompts)) if refills else 0, room=room, drawn=0),
    )
    return max(moments, key=lambda parts: sum(parts.values()))


def passing(held: Held) -> int:
    """Bytes a token holds at the widest place of a forward pass that keeps nothing.

    In the MLP: embeddings, residual stream, the norm's input and output; both projections, the
    activation and their product.
    """
    shape, c = held.shape, held.itemsize
    return c * (4 * shape.hidden + 4 * shape.intermediate)


def _stack(held: Held) -> int:
    """The stack as read from the disk, in float32: on the CPU, and there alone."""
    return 4 * held.slot if held.device == "cpu" else 0


def saved(held: Held, *, dropout: bool = False, by_trl: bool = False) -> int:
    """What autograd keeps of one token in one decoder layer.

    The base is frozen, so its linear layers keep nothing of their inputs. What is kept:

        two norms       their input, in float32 where it is not `lean_norms`
                        or a trainer of TRL's                               2 c H or 8 H
        adapters        the input of A, of width n                          c n
                        its output, the input of B                          c R
                        with dropout, its mask: a byte each
        attention       queries and its output; keys and values;
                        the log-sum-exp in float32            2 c D heads + c kv_width + 4 heads
        MLP             both projections and the activation                 3 c I

    The adapters of one input share it, and that of the attention's output shares what attention
    keeps. With dropout each has its own. So it is in a trainer of TRL's in mixed precision, where
    PEFT casts the input for every adapter; its keys and values are repeated for the query heads.
    """
    shape, c = held.shape, held.itemsize
    adapted = held.first_layer
    own = dropout or (by_trl and held.mixed)
    inputs = 0
    for group in _INPUTS:
        there = [one for one in adapted if one.last_name in group]
        if own:
            inputs += sum(one.inputs for one in there) * c
        elif there and group != ("o_proj",):
            inputs += there[0].inputs * c
    if dropout:
        inputs += sum(one.inputs for one in adapted)
    width = shape.heads * shape.head_width
    kept = 2 * width if by_trl else shape.kv_width
    attention = c * (2 * width + kept) + 4 * shape.heads
    norms = 2 * (c if shape.lean_norms and not by_trl else 4) * shape.hidden
    return norms + inputs + len(adapted) * held.rank * c + attention + (3 * c * shape.intermediate)


_INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linear layers of a decoder layer by what they have as input."""


def training(
    held: Held,
    *,
    kind: Training,
    rows: int,
    tokens: int,
    checkpointing: bool,
    accumulates: bool,
    dropout: bool = False,
    scored: int = 0,
) -> dict[str, int]:
    """One micro-batch in training: the optimiser's states are there, the backward pass begins.

    AdamW keeps two float32 numbers for each parameter. The losses of SFT and DPO have the logits of
    256 target tokens at a time: they themselves, their chances in float32, and where they are in 16
    bits a copy in float32 on the way. A reward model has none. RLOO, a trainer of TRL's, pads; it
    has the logits of all answers of the micro-batch at once, in the compute dtype, and two more
    copies of the slot, the reference's and the reward model's.

    Args:
        rows: Sequences; a pair is two. What they have in common counts as if they did not.
        tokens: Of the longest sequence.
        checkpointing: Only the layers' inputs are kept, and one layer is computed again.
        accumulates: Gradients of earlier micro-batches are there.
        scored: Of RLOO, the tokens of a sequence's answer.
    """
    shape, c = held.shape, held.itemsize
    count = rows * tokens
    by_trl = kind == "rloo"
    layer = count * saved(held, dropout=dropout, by_trl=by_trl)
    if by_trl:  # padded rows need a mask, which every layer's attention expands and keeps
        layer += count * c * tokens
    # While a layer computes its MLP: the product; with dropout its copy for the adapter, and what
    # of it to drop. PEFT's own copy is in float32.
    copied = (4 if held.mixed else 0) + 4 * dropout if by_trl else dropout * (c + 2)
    passing_by = count * shape.intermediate * (c + copied)
    kept = count * 4 * shape.hidden + (
        shape.layers * count * c * shape.hidden if checkpointing else shape.layers * layer
    )
    # Beside a piece's logits the states of all targets, and the slopes of their scores.
    of_logit = c + 4 + (4 if held.mixed else 0)
    pieces = min(count, PIECE) * shape.vocabulary * of_logit + 2 * count * c * shape.hidden
    logits = 0 if kind == "reward" else pieces
    if kind == "rloo":
        logits = rows * scored * shape.vocabulary * 4 * c
    within = passing_by + (layer if checkpointing else 0) + held.scratch
    if by_trl:
        # The reference's pass, which keeps nothing, beside what the policy's keeps.
        within = max(within, count * passing(held) + held.scratch)
    copies = (3 if by_trl else 1) * 4 + (c if held.mixed else 0)
    return {
        "base": held.base,
        "adapters": copies * held.slot + _stack(held),
        "optimizer": (8 + 4 * accumulates) * held.slot,
        "activations": kept + (0 if logits > within else within),
        "logits": logits if logits > within else 0,
    }


def holes(held: Held, activations: int, *, count: int) -> int:
    """What training loses on a CPU between activations of `count` tokens.

    Nothing where a layer's tensors, the hidden states and larger ones, are mapped one by one.
    """
    on_heap = held.device == "cpu" and count * held.itemsize * held.shape.hidden < MAPPED
    return int(HOLES * activations) if on_heap else 0


def exporting(held: Held, *, source_itemsize: int, texts: int, text_tokens: int) -> dict[str, int]:
    """Merging tensor by tensor, and the comparison of stack and export, one layer at a time.

    The widest moment is the head: its weight as read and in float32, and the logits of all texts
    for two stacks, as they are computed and as they are kept.
    """
    shape = held.shape
    return {
        "base": shape.largest * (source_itemsize + 4),
        "adapters": 3 * 4 * held.slot,  # the stack, the fused one, and its scaled half
        "logits": 2 * 2 * 4 * texts * text_tokens * shape.vocabulary,
    }
