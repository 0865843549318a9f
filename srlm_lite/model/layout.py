"""Which tensors of a directory's files make up which parameter of the model in memory.

Files and memory differ: the files of GPT-NeoX call the head `embed_out`, those of a mixture of
experts have one tensor an expert where memory has one of three dimensions for all. transformers
knows how each family is converted; here its own rules are followed, forwards to read a parameter
from the files, and backwards to write one into them.

Backwards, its rules are not asked: a parameter is a rearrangement of the files' elements, so
numbering those and converting the numbers says where each one went.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from srlm_lite.errors import UserError
from srlm_lite.model.checkpoint import Checkpoint

Read = Callable[[str], Tensor]


@dataclass(slots=True)
class TensorGroup:
    """Tensors of the files that become parameters of the model together."""

    first: str
    """What transformers calls the group by: the name of its first parameter."""
    converter: Any = None
    """transformers' way to convert them; None where one tensor is one parameter as it is."""
    sources: dict[str, list[str]] = field(default_factory=dict)
    """Names in the files, by the pattern of the converter that they match."""
    parameters: list[str] = field(default_factory=list)
    """Names in memory."""

    @property
    def files(self) -> list[str]:
        """The names in the files, in the order in which they are converted."""
        return [name for names in self.sources.values() for name in names]


class Layout:
    """The files of a checkpoint, and the model that transformers makes of them.

    Args:
        model: On the meta device will do. Parameters and persistent buffers are what it is read
            from; both are called parameters here.

    Raises:
        UserError: transformers' rules do not fit the files.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self.checkpoint = checkpoint
        self._model: Any = model
        self._inside = model.state_dict()
        named = dict(model.named_parameters(remove_duplicate=False))
        keys = model.all_tied_weights_keys.items()
        self.tied = {alias: one for alias, one in keys if named.get(alias) is named.get(one)}
        """Parameters that are another one under a second name; files have one of the two."""
        rules: list[Any] = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        of_pattern = {p: rule for rule in self._converters for p in rule.source_patterns}
        groups: dict[str, TensorGroup] = {}
        self.strays: list[str] = []
        """Tensors of the files that the model does not have, such as a vision tower's."""
        for name in sorted(checkpoint.names, key=dot_natural_key):
            inside, pattern = self._renamed(name)
            if inside not in self._inside:
                self.strays.append(name)
                continue
            converter = None if pattern is None else of_pattern[pattern]
            if converter is None and inside in groups:  # transformers keeps the first
                self.strays.append(name)
                continue
            group = groups.setdefault(inside, TensorGroup(inside, converter))
            group.sources.setdefault(pattern or name, []).append(name)
        self._groups: dict[str, TensorGroup] = {}
        for group in groups.values():
            group.parameters = self._checked_names(group)
            self._groups.update(dict.fromkeys(group.parameters, group))
        self._of_file = {name: group for group in groups.values() for name in group.files}

    def __contains__(self, name: str) -> bool:
        return name in self._groups

    @property
    def parameters(self) -> list[str]:
        """Names of all parameters that the files have."""
        return list(self._groups)

    def held_as(self, name: str) -> str:
        """A parameter's name of those that it is tied under: the one that the files have."""
        others = [one for pair in self.tied.items() if name in pair for one in pair]
        return next((one for one in (name, *others) if one in self._groups), name)

    def is_one_module(self, name: str, other: str) -> bool:
        """Whether two names of a tied parameter are of one module, which lies in two places."""
        a, b = (self._model.get_submodule(one.rpartition(".")[0]) for one in (name, other))
        return a is b

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter of the model."""
        return tuple(self._inside[name].shape)

    def is_transposed(self, module: str) -> bool:
        """Whether a layer's weight is (in, out), as of GPT-2's Conv1D; a linear one's is not."""
        return isinstance(self._model.get_submodule(module), Conv1D)

    def group(self, name: str) -> TensorGroup:
        """What a parameter is made from; KeyError where the files do not have it."""
        return self._groups[name]

    def group_of_file(self, name: str) -> TensorGroup | None:
        """What a tensor of the files takes part in; None for a stray one."""
        return self._of_file.get(name)

    def read(self, name: str) -> Tensor:
        """One parameter; KeyError where the files do not have it."""
        group = self._groups[name]
        return self._converted(group, {file: self.checkpoint.read(file) for file in group.files})[
            name
        ]

    def written(self, group: TensorGroup, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What parameters of a group are in the files: tensors in float32, by their names there.

        Elements whose parameter is not among `values` are zero.
        """
        infos = [self.checkpoint.info(name) for name in group.files]
        sizes = [math.prod(info.shape) for info in infos]
        dtype = torch.int32 if sum(sizes) < 1 << 31 else torch.int64
        numbers = torch.split(torch.arange(sum(sizes), dtype=dtype), sizes)
        parts = zip(infos, numbers, strict=True)
        went = self._converted(group, {info.name: n.view(info.shape) for info, n in parts})
        flat = torch.zeros(sum(sizes))
        for name, value in values.items():
            flat[went[name].reshape(-1).long()] = value.float().reshape(-1)
        parts = zip(infos, torch.split(flat, sizes), strict=True)
        return {info.name: part.view(info.shape) for info, part in parts}

    def name_in_files(self, name: str) -> str:
        """What to call a parameter that the files do not have yet, so that it is read back."""
        backwards: list[Any] = [
            rule.reverse_transform() for rule in self._renamings[::-1] if rule.was_used()
        ]
        published, _ = rename_source_key(name, backwards, [], reverse=True)
        return published if self._renamed(published)[0] == name else name

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """As transformers 5.17 does it in `convert_and_load_state_dict_in_model`."""
        prefix = self._model.base_model_prefix
        inside, pattern = rename_source_key(
            name, self._renamings, self._converters, prefix, self._inside
        )
        if inside not in self._inside and name in self._inside:
            return rename_source_key(name, [], [], prefix, self._inside)
        return inside, pattern

    def _converted(self, group: TensorGroup, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if group.converter is None:
            return {group.first: tensors[group.files[0]]}
        converter = copy.deepcopy(group.converter)
        for pattern, names in group.sources.items():
            for name in names:
                converter.add_tensor(group.first, name, pattern, tensors[name])
        # Its operations ask the model for shapes alone, and asking it may be what reads a weight.
        shapes = SimpleNamespace(get_parameter=self._inside.__getitem__)
        made = converter.convert(group.first, model=shapes, config=self._model.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }

    def _checked_names(self, group: TensorGroup) -> list[str]:
        """Names of the group's parameters, whose shapes are those of the model."""
        empty = {
            name: torch.empty(self.checkpoint.info(name).shape, device="meta")
            for name in group.files
        }
        try:
            made = self._converted(group, empty)
        except Exception as error:  # its operations meet other tensors with whatever they trip over
            raise self._misfit(group, " ".join(str(error).split())[:200]) from error
        for name, value in made.items():
            there = self._inside.get(name)
            if there is None or tuple(value.shape) != tuple(there.shape):
                wants = "no such parameter" if there is None else f"{[*there.shape]}"
                raise self._misfit(group, f"{[*value.shape]} for {name}, the model has {wants}")
        return list(made)

    def _misfit(self, group: TensorGroup, why: str) -> UserError:
        return UserError(
            f"{group.files[0]} cannot be read as {group.first} ({why})",
            where=str(self.checkpoint.folder),
            way_out="Weights and config.json do not belong together: get both again",
        )
