"""A base that no process holds whole: FSDP2 spreads its decoder layers over all of them.

A layer is gathered while it computes, and given up again; so a forward or backward pass is one that
all processes make at the same time (`Pace`). What is spread is the frozen base alone. The adapters
lie beside it, whole and in float32 in every process, as they do without sharding: so the rule that
FSDP, LoRA and the storage of 4-bit weights must have one dtype does not touch them, the bytes of a
4-bit weight travel as they are, and all that is proven of the slot holds here.

Embedding, head and norms stay whole in every process, and so do the scales of 4-bit weights, about
an eighth of a bit a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from srlm_lite.model.bare import bare_model
from srlm_lite.model.checkpoint import Checkpoint
from srlm_lite.model.layout import Layout
from srlm_lite.model.nf4 import expect_nf4, put_weight

hf: Any = transformers  # only partly typed

_OF_4_BITS = ("compress_statistics", "quant_type")
"""What PEFT asks a 4-bit weight for, when it puts an adapter beside it."""


def load_shards(
    folder: Path, settings: Any, device: torch.device, dtype: torch.dtype, *, nf4: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """This process's part of the model of a directory, and what the files lack.

    All processes call it. A layer is read and quantized whole and then cut, so the peak of memory
    is the finished part and one layer.
    """
    model = bare_model(settings, dtype=dtype)
    model.tie_weights()
    files = Layout(Checkpoint(folder), model)
    if nf4:
        expect_nf4(model, dtype)
        model.tie_weights()
    decoder = _decoder(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    missing: list[str] = []
    for name, layer in _layers(model, decoder):
        missing += _fill(model, name, files, device, dtype)
        shown = _plain(layer)
        fully_shard(layer, mesh=mesh)
        for module, attributes in shown:
            vars(module.weight).update(attributes)
    missing += _fill(model, "", files, device, dtype)
    model.tie_weights()
    for owner in model.modules():
        for key, buffer in owner.named_buffers(recurse=False):
            setattr(owner, key, buffer.to(device))
    if not missing:
        whole = {p for p in decoder.parameters() if not isinstance(p, DTensor)}
        fully_shard(decoder, mesh=mesh, ignored_params=whole)
    model.name_or_path = model.config._name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = hf.GenerationConfig.from_pretrained(str(folder))
    return model, {"missing_keys": missing}


def _decoder(model: Any) -> Any:
    """Embedding, layers and last norm: what every forward pass goes through."""
    return model.get_decoder()


def _layers(model: PreTrainedModel, decoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder layers by their names in the model: what transformers would not split."""
    kinds = set(model._no_split_modules or ())
    inside = set(decoder.modules())
    found = [
        (name, module)
        for name, module in model.named_modules()
        if module in inside and type(module).__name__ in kinds
    ]
    if not found:
        raise ValueError("its decoder layers are not known, so it cannot be sharded")
    return found


def _fill(
    model: PreTrainedModel, within: str, files: Layout, device: torch.device, dtype: torch.dtype
) -> list[str]:
    """Read the weights of a module that are not there yet; returns those the files do not have."""
    missing = []
    for name, parameter in list(model.get_submodule(within).named_parameters()):
        path = f"{within}.{name}" if within else name
        if parameter.device.type != "meta":
            continue
        if path not in files:
            missing.append(path)
            continue
        put_weight(model, path, files.read(path).to(dtype), device)
    return missing


def _plain(layer: nn.Module) -> list[tuple[Any, dict[str, Any]]]:
    """Make a layer's 4-bit weights plain bytes; returns their modules, and what they said.

    The module keeps what it takes to expand them, and bitsandbytes looks for it there.
    """
    found: list[tuple[Any, dict[str, Any]]] = []
    modules: Iterator[Any] = layer.modules()
    for module in modules:
        weight: Any = getattr(module, "weight", None)
        if getattr(weight, "quant_state", None) is None:
            continue
        found.append((module, {key: getattr(weight, key) for key in _OF_4_BITS}))
        plain = weight.data.as_subclass(Tensor)
        module.weight = nn.Parameter(plain, requires_grad=False)
    return found


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds a part of the model only."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def held(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class Pace:
    """Lets no process of a sharded base pass forward without the others.

    A process that has nothing to compute takes part with a pass of one token, whose result nobody
    looks at. There are three ways to be in step:

        apart   each has work of its own, and whoever is through helps the others to their end
        alike   all do the same at the same time, as in training
        else    the first process works alone, and calls the others to every pass

    Args:
        model: The base.
        anyone: Whether it is true for any process; all call it together.
        call: Of the first process: have the others call `pass_by` once.
        thank: What the first process does when such a pass is over.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        anyone: Callable[[bool], bool],
        call: Callable[[], object],
        thank: Callable[[], object],
    ) -> None:
        self._decoder = _decoder(model)
        self._anyone, self._call, self._thank = anyone, call, thank
        self._way: Literal["alone", "apart", "alike"] = "alone"
        self._decoder.register_forward_pre_hook(self._before, prepend=True)
        self._decoder.register_forward_hook(self._after)
        # FSDP makes its buffers in the first pass: in that of a sampling, in inference mode, they
        # would be of no use for training.
        self.pass_by()

    def _before(self, *_: Any) -> None:
        if self._way == "apart":
            self._anyone(True)
        elif self._way == "alone":
            self._call()

    def _after(self, *_: Any) -> None:
        if self._way == "alone":
            self._thank()

    @contextmanager
    def _going(self, way: Literal["apart", "alike"]) -> Iterator[None]:
        before, self._way = self._way, way
        try:
            yield
        finally:
            self._way = before

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within this context each process does work of its own; it ends for all together."""
        with self._going("apart"):
            yield
        while self._anyone(False):
            self.pass_by()

    @contextmanager
    def alike(self) -> Iterator[None]:
        """Within this context all processes make the same passes."""
        with self._going("alike"):
            yield

    @torch.no_grad()
    def pass_by(self) -> None:
        """A forward pass for the others' sake."""
        with self._going("alike"):
            ids = torch.zeros((1, 1), dtype=torch.long, device=self._decoder.device)
            self._decoder(input_ids=ids, use_cache=False)
