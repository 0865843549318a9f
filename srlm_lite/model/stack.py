"""Stacked adapters in one fused slot.

A stack is `[anchor]` or `[anchor, delta]`. PEFT, TRL and Trainer each handle one active adapter,
so the stack runs as one: concatenated along the rank, `A = [A_1; A_2]` and `B = [c_1 B_1, c_2
B_2]`, the fused adapter's update is the exact sum of both. `linear` combination would multiply
every A with every B and add cross terms that nobody trained.

The slot's own scaling is that of the last adapter of the stack, the one that trains, so that its
rows of A and columns of B are its weights as they are; those below it absorb the ratio of the
scalings in B.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import transformers_weight_conversion
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from srlm_lite.errors import ProofError, UserError
from srlm_lite.model import unsloth_backend
from srlm_lite.model.sharding import is_sharded
from srlm_lite.model.targets import targeted
from srlm_lite.settings import Lora, is_targeted

Factors = tuple[Tensor, Tensor]
"""LoRA's A, (rank, in_features), and B, (out_features, rank)."""

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_SLOT = "default"
_NOT_PLAIN = (
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "alora_invocation_tokens",
    "layer_replication",
)
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations whose adapters stand on other weights than the base's own."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """LoRA weights apart from any model: on the CPU, in float32, one (A, B) for each module."""

    rank: int
    alpha: float
    factors: Mapping[str, Factors]

    @property
    def scaling(self) -> float:
        """The update of a module is scaling * B @ A."""
        return self.alpha / self.rank

    @property
    def is_finite(self) -> bool:
        """Whether all weights are numbers."""
        return all(bool(w.isfinite().all()) for factors in self.factors.values() for w in factors)

    def differs_from(self, other: Adapter) -> bool:
        """Whether any weight differs."""
        return any(
            not (
                torch.equal(a, other.factors[module][0])
                and torch.equal(b, other.factors[module][1])
            )
            for module, (a, b) in self.factors.items()
        )

    def digest(self) -> str:
        """SHA-256 of the weights."""
        found = hashlib.sha256(f"{self.rank} {self.alpha}".encode())
        for module in sorted(self.factors):
            for factor in self.factors[module]:
                found.update(module.encode() + factor.contiguous().numpy().tobytes())
        return found.hexdigest()

    def save(
        self,
        directory: Path,
        *,
        base_name: str,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        placing: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a PEFT LoRA directory; each file is complete or absent.

        Args:
            revision: The base's commit, for a base from the Hub.
            placing: Settings that tell PEFT where it goes; default: the modules' short names.
        """
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for module, (a, b) in self.factors.items():
            tensors[f"{_PREFIX}{module}{_A}"] = a.to(dtype).contiguous()
            tensors[f"{_PREFIX}{module}{_B}"] = b.to(dtype).contiguous()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            **({"revision": revision} if revision else {}),
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            "target_modules": sorted({module.rsplit(".", 1)[-1] for module in self.factors}),
            **(placing or {}),
        }
        with tempfile.TemporaryDirectory(dir=directory, prefix=".") as temporary:
            weights = Path(temporary) / WEIGHTS
            save_file(tensors, weights, metadata={"format": "pt"})
            settings = Path(temporary) / CONFIG
            settings.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            weights.chmod(settings.stat().st_mode)  # safetensors makes it private
            settings.replace(directory / CONFIG)
            weights.replace(directory / WEIGHTS)

    @classmethod
    def load(cls, directory: Path) -> Adapter:
        """Read a PEFT LoRA directory.

        Raises:
            UserError: Not there, truncated, with other shapes than it says, with weights that are
                no numbers, a kind of LoRA that cannot be stacked, or one with weights beside A and
                B, such as of embeddings: without them it is another model.
        """
        try:
            config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
            tensors = load_file(directory / WEIGHTS)
        except FileNotFoundError as error:
            raise UserError(
                f"no adapter here ({Path(str(error.filename or WEIGHTS)).name} is missing)",
                where=str(directory),
            ) from error
        except (SafetensorError, ValueError) as error:
            raise UserError(
                f"the adapter's files are damaged ({error})", where=str(directory)
            ) from error
        if not isinstance(config, dict):
            raise UserError(f"{CONFIG} is no JSON object", where=str(directory))
        odd = [key for key in _NOT_PLAIN if config.get(key)]
        if str(config.get("init_lora_weights")).lower().startswith(_CHANGE_THE_BASE):
            odd.append(f"init_lora_weights={config['init_lora_weights']}")
        if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or odd:
            kind = ", ".join(odd) or config.get("peft_type")
            raise UserError(
                f"only plain LoRA adapters can be stacked, not {kind}", where=str(directory)
            )
        factors: dict[str, Factors] = {}
        for key in [key for key in tensors if key.endswith(_A)]:
            module = key.removeprefix(_PREFIX).removesuffix(_A)
            a, b = tensors.pop(key), tensors.pop(key.removesuffix(_A) + _B, torch.empty(0))
            factors[module] = (a.float(), b.float())
        if tensors:
            raise UserError(
                f"only plain LoRA adapters can be stacked, not one that holds {min(tensors)}",
                where=str(directory),
            )
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(rank, int) or not isinstance(alpha, int | float) or not factors:
            raise UserError("holds no LoRA weights, or not their r and alpha", where=str(directory))
        for module, (a, b) in factors.items():
            # A row too few would be copied into all of the slot's, and nobody would notice.
            if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == rank:
                raise UserError(
                    f"its weights for {module} are {[*a.shape]} and {[*b.shape]}, and r is {rank}",
                    where=str(directory),
                )
        adapter = cls(rank=rank, alpha=float(alpha), factors=factors)
        if not adapter.is_finite:
            raise UserError(
                "some of its weights are no numbers (NaN or infinite)", where=str(directory)
            )
        return adapter


def fuse(stack: Sequence[Adapter]) -> Adapter:
    """One adapter whose update is the exact sum of the stack's updates.

    Its rank is the sum of the ranks, its scaling that of the last adapter. A module that one of
    the adapters lacks has zeros there.

    Raises:
        ValueError: The stack is empty.
    """
    if not stack:
        raise ValueError("an empty stack has no update")
    scaling = stack[-1].scaling
    rank = sum(adapter.rank for adapter in stack)
    factors: dict[str, Factors] = {}
    for module in dict.fromkeys(name for adapter in stack for name in adapter.factors):
        present = [adapter.factors[module] for adapter in stack if module in adapter.factors]
        in_features, out_features = present[0][0].shape[1], present[0][1].shape[0]
        rows, columns = [], []
        for adapter in stack:
            a, b = adapter.factors.get(module) or (
                torch.zeros(adapter.rank, in_features),
                torch.zeros(out_features, adapter.rank),
            )
            rows.append(a)
            columns.append(b * (adapter.scaling / scaling))
        factors[module] = (torch.cat(rows, dim=0), torch.cat(columns, dim=1))
    return Adapter(rank=rank, alpha=scaling * rank, factors=factors)


def split(fused: Adapter, ranks: Sequence[int], scalings: Sequence[float]) -> list[Adapter]:
    """Undo `fuse`: the adapters of the given ranks and scalings, in the order of the stack.

    Raises:
        ValueError: The ranks do not add up to the fused rank.
    """
    if sum(ranks) != fused.rank or len(ranks) != len(scalings):
        raise ValueError(f"ranks {list(ranks)} do not split a fused rank of {fused.rank}")
    adapters = []
    start = 0
    for rank, scaling in zip(ranks, scalings, strict=True):
        part = slice(start, start + rank)
        ratio = fused.scaling / scaling
        factors = {
            module: (a[part].clone(), b[:, part] * ratio)
            for module, (a, b) in fused.factors.items()
        }
        adapters.append(Adapter(rank=rank, alpha=scaling * rank, factors=factors))
        start += rank
    return adapters


class Slot:
    """The one adapter in the model's memory. Every role runs in it; nothing is ever reloaded.

    Args:
        base: The frozen model; it is wrapped once, and `model` is the wrapped one.
        targets: Names of the linear layers that carry an adapter.
        rank: Room for the whole stack: the anchor's rank plus the delta's.
        fold: While nothing trains, compute on a copy of the weights that has the stack's update
            written into it, in the compute dtype; 4-bit weights are expanded for it. Faster where
            launching operations takes longer than they do: small models, and any on a GPU. The
            copy takes memory, and the sum is rounded. Has no effect on a sharded base.
        backend: What the base was loaded with.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        targets: Sequence[str],
        rank: int,
        fold: bool = False,
        backend: Literal["transformers", "unsloth"] = "transformers",
    ) -> None:
        self._backend = backend
        if backend == "unsloth":
            self.model: PeftModel = unsloth_backend.wrap(base, targets=targets, rank=rank)
        else:
            config = LoraConfig(
                r=rank,
                lora_alpha=rank,
                target_modules=targeted(base, targets),
                fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
                task_type="CAUSAL_LM",
            )
            self.model = _wrapped(base, config)
        self.rank = rank
        self.compute_dtype: torch.dtype = base.dtype
        self._layers: dict[str, LoraLayer] = {
            name.removeprefix(_PREFIX): module
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer)
        }
        self.sharded = is_sharded(base)
        self.fold = fold
        self._bare: dict[str, nn.Module] = {}
        self._last_scaling = 1.0
        self._held: tuple[Adapter, ...] | None = None
        self.learning: dict[int, tuple[slice, slice]] = {}
        """While one adapter trains: by the id of each of the slot's parameters, its part of it."""
        self.load(())

    @property
    def has_own_attention(self) -> bool:
        """Whether the model's layers attend by code of their backend, not of transformers."""
        return self._backend == "unsloth" and self.model.device.type != "cpu"

    @property
    def modules(self) -> list[str]:
        """Names of the layers that carry the adapter, in the model's order."""
        return list(self._layers)

    def fresh(self, lora: Lora, *, seed: int) -> Adapter:
        """An adapter that changes nothing yet: A drawn as LoRA draws it, B zero.

        Each module's A depends on the seed and the module alone.
        """
        factors: dict[str, Factors] = {}
        for index, (module, layer) in enumerate(self._layers.items()):
            if not is_targeted(module, lora.targets):
                continue
            generator = torch.Generator().manual_seed((seed + index * 1_000_003) % (1 << 63))
            a_shape, b_shape = self._shapes(layer, lora.rank)
            bound = 1 / math.sqrt(a_shape[1])
            a = torch.empty(a_shape).uniform_(-bound, bound, generator=generator)
            factors[module] = (a, torch.zeros(b_shape))
        return Adapter(rank=lora.rank, alpha=lora.alpha, factors=factors)

    @staticmethod
    def _shapes(layer: LoraLayer, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        a, b = _weight(layer.lora_A, _SLOT), _weight(layer.lora_B, _SLOT)
        return (rank, a.shape[1]), (b.shape[0], rank)

    @torch.inference_mode(mode=False)  # who samples loads too: a training could not use its tensors
    def load(
        self,
        stack: Sequence[Adapter],
        *,
        adapter: str = _SLOT,
        train: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Copy a stack into the slot; an empty one gives the bare base.

        Args:
            adapter: The slot itself, or the copy that TRL keeps as its reference.
            train: Trainable, and float32 unless said otherwise; else frozen.
            dtype: Default without `train`: the compute dtype.

        Raises:
            UserError: The stack does not fit the slot: its rank, or its modules.
        """
        runs_a_role = adapter == _SLOT and not train and dtype is None
        if runs_a_role and _same(self._held, stack):
            return
        for each in stack:
            self._refuse_other_shapes(each)
        fused = self._fused(stack) if stack else Adapter(rank=0, alpha=0.0, factors={})
        if fused.rank > self.rank:
            raise UserError(
                f"the stack's rank {fused.rank} exceeds the slot's {self.rank}", where="adapters"
            )
        missing = fused.factors.keys() - self._layers.keys()
        if missing:
            raise UserError(
                f"the adapter has weights for {min(missing)}, which the base does not have or "
                "the recipe does not target",
                where="adapters",
                way_out="Use the base the adapter was trained on, and the same lora.targets",
            )
        scaling = stack[-1].scaling if stack else 1.0
        dtype = dtype or (torch.float32 if train else self.compute_dtype)
        for module, layer in self._layers.items():
            a, b = (_weight(part, adapter) for part in (layer.lora_A, layer.lora_B))
            for parameter in (a, b):
                parameter.data = torch.zeros_like(parameter, dtype=dtype)
                parameter.grad = None
                parameter.requires_grad_(train)
            if module in fused.factors:
                rows, columns = fused.factors[module]
                a.data[: fused.rank].copy_(rows)
                b.data[:, : fused.rank].copy_(columns)
            layer.scaling[adapter] = scaling
        if adapter == _SLOT:
            self._unfold()
            folds = self.fold and not self.sharded and not train
            if folds and dtype == self.compute_dtype:
                self._fold_in(fused)
            self._last_scaling = scaling
            self._held = tuple(stack) if runs_a_role else None
            if self._backend == "unsloth":
                unsloth_backend.prepare(self.model, training=train)
            self.model.eval()

    def _fused(self, stack: Sequence[Adapter]) -> Adapter:
        """The stack as one adapter, without layers that it has no update for and the slot lacks.

        Adapters made by version 0.1 lie on the vision tower of a vision-language base as well,
        where text has taught them nothing.
        """
        fused = fuse(stack)
        factors = {
            module: (a, b)
            for module, (a, b) in fused.factors.items()
            if module in self._layers or b.any()
        }
        return replace(fused, factors=factors)

    def _refuse_other_shapes(self, adapter: Adapter) -> None:
        for module in adapter.factors.keys() & self._layers.keys():
            a, b = adapter.factors[module]
            rows, columns = self._shapes(self._layers[module], adapter.rank)
            if a.shape != rows or b.shape != columns:
                raise UserError(
                    f"the adapter's {module} is for a layer of {a.shape[1]} to {b.shape[0]}, the "
                    f"base's is one of {rows[1]} to {columns[0]}",
                    where="adapters",
                    way_out="Use the base the adapter was trained on",
                )

    def _fold_in(self, fused: Adapter) -> None:
        for module, layer in self._layers.items():
            layer._disable_adapters = True
            if module not in fused.factors:
                continue
            bare: Any = layer.get_base_layer()
            weight = _expanded(bare)
            a, b = (factor.to(weight.device) for factor in fused.factors[module])
            folded = weight.float() + fused.scaling * (b @ a)
            self._bare[module] = bare
            layer.base_layer = _linear(folded.to(self.compute_dtype), bare.bias)

    def _unfold(self) -> None:
        for layer in self._layers.values():
            layer._disable_adapters = False
        for module, bare in self._bare.items():
            self._layers[module].base_layer = bare
        self._bare.clear()

    def read(self, start: int, rank: int, modules: Sequence[str]) -> Adapter:
        """What training has made of one adapter of the stack: `rank` rows from `start` on.

        Exact for the stack's last adapter, whose scaling is the slot's.

        Raises:
            UserError: Training has diverged: a weight is infinite or no number. Those of the rows
                that were to stay are then none either, so ask this before `assert_unchanged`.
        """
        end = start + rank
        factors: dict[str, Factors] = {}
        for module in modules:
            layer = self._layers[module]
            a, b = _weight(layer.lora_A, _SLOT), _weight(layer.lora_B, _SLOT)
            factors[module] = (a.data[:end].float().cpu(), b.data[:, :end].float().cpu())
        fused = Adapter(rank=end, alpha=self._last_scaling * end, factors=factors)
        if not fused.is_finite:
            raise UserError(
                "training has diverged: weights are infinite or no numbers",
                where="learning_rate",
                way_out="Lower it, or set base.dtype=float32 if it is float16",
            )
        ranks = [start, rank] if start else [rank]
        return split(fused, ranks, [fused.scaling] * len(ranks))[-1]

    @contextmanager
    def training_only(self, start: int, adapter: Adapter) -> Iterator[None]:
        """Within this context, only the rows of one adapter of the stack receive a gradient.

        Everything else in the slot gets an exact zero, which AdamW without weight decay turns
        into an exact zero update.
        """
        part = slice(start, start + adapter.rank)
        handles = []
        for module, layer in self._layers.items():
            trains = module in adapter.factors
            a, b = _weight(layer.lora_A, _SLOT), _weight(layer.lora_B, _SLOT)
            rows, columns = torch.zeros(self.rank, 1), torch.zeros(1, self.rank)
            own = part if trains else slice(0, 0)
            rows[own], columns[:, own] = 1, 1
            self.learning |= {id(a): (own, slice(None)), id(b): (slice(None), own)}
            for parameter, mask in ((a, rows), (b, columns)):
                handles.append(parameter.register_hook(_masking(mask.to(parameter.device))))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self.learning = {}
            for handle in handles:
                handle.remove()

    @contextmanager
    def beside(self, name: str, stack: Sequence[Adapter]) -> Iterator[None]:
        """Within this context, another stack lies beside the slot, frozen and in float32.

        It takes the memory of its adapters; the base is the same. Not active until PEFT is told so.

        Raises:
            ProofError: It was changed meanwhile.
        """
        self.model.add_adapter(name, self.model.peft_config[_SLOT])
        try:
            self.load(stack, adapter=name, dtype=torch.float32)
            yield
            expected = self._fused(stack)
            for module, (rows, columns) in expected.factors.items():
                layer = self._layers[module]
                a, b = _weight(layer.lora_A, name).data, _weight(layer.lora_B, name).data
                a, b = a[: expected.rank].cpu(), b[:, : expected.rank].cpu()
                if not torch.equal(a, rows) or not torch.equal(b, columns):
                    raise ProofError(f"training changed the frozen adapter {name} in {module}")
        finally:
            self.model.delete_adapter(name)

    def assert_unchanged(self, stack: Sequence[Adapter]) -> None:
        """Check that the slot still begins with this stack, bit for bit, as `load` wrote it.

        Raises:
            ProofError: Names the first tensor that differs.
        """
        if not stack:
            return
        rank = sum(adapter.rank for adapter in stack)
        # Fused as it was below the adapter that trained, whose scaling the slot has.
        top = Adapter(rank=1, alpha=self._last_scaling, factors={})
        expected = self._fused([*stack, top])
        for module, (rows, columns) in expected.factors.items():
            layer = self._layers[module]
            a = _weight(layer.lora_A, _SLOT).data[:rank].float().cpu()
            b = _weight(layer.lora_B, _SLOT).data[:, :rank].float().cpu()
            if not torch.equal(a, rows[:rank]) or not torch.equal(b, columns[:, :rank]):
                raise ProofError(f"training changed the anchor's weights in {module}")

    @contextmanager
    def dropping_out(self, of_layer: Callable[[str], nn.Module]) -> Iterator[None]:
        """Within this context the adapter's input passes through a module, one for each layer."""
        for name, layer in self._layers.items():
            layer.lora_dropout[_SLOT] = of_layer(name)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.lora_dropout[_SLOT] = nn.Identity()


def _wrapped(base: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """The base with LoRA on the layers that the configuration names, and on nothing else.

    Also where an adapter is added later, as TRL does for its reference.
    """
    with _names_as_they_are():
        model: PeftModel = get_peft_model(base, config)
    tuner: Any = model.base_model
    inject = tuner.inject_adapter

    def as_they_are(*args: Any, **kwargs: Any) -> None:
        with _names_as_they_are():
            inject(*args, **kwargs)

    tuner.inject_adapter = as_they_are
    return model


@contextmanager
def _names_as_they_are() -> Iterator[None]:
    """Have PEFT take the names of layers as names of layers.

    Where the experts of a mixture lie fused in memory, PEFT 0.21 reads `gate_proj`, `up_proj` and
    `down_proj`, whole names that end so too, as those of the experts: it adapts these, and takes
    the names off the dense layers and shared experts that have them.
    """
    name = "convert_peft_config_for_transformers"
    before = getattr(transformers_weight_conversion, name)
    setattr(transformers_weight_conversion, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        setattr(transformers_weight_conversion, name, before)


def _weight(part: Any, adapter: str) -> nn.Parameter:
    weight = part[adapter].weight
    if not isinstance(weight, nn.Parameter):
        raise TypeError(f"adapter {adapter} has no weight")
    return weight


def _expanded(layer: Any) -> Tensor:
    """A layer's weight (out, in) in 16 or 32 bits, whatever it is kept in."""
    weight = layer.weight
    if getattr(weight, "quant_state", None) is None:
        expanded: Tensor = weight.data.T if isinstance(layer, Conv1D) else weight.data
    else:
        from bitsandbytes.functional import dequantize_4bit

        expanded = dequantize_4bit(weight.data, weight.quant_state)
    return expanded


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.data, requires_grad=False)
    return layer


def _same(held: tuple[Adapter, ...] | None, stack: Sequence[Adapter]) -> bool:
    return (
        held is not None
        and len(held) == len(stack)
        and all(a is b for a, b in zip(held, stack, strict=True))
    )


def _masking(mask: Tensor) -> Any:
    return lambda gradient: gradient * mask
