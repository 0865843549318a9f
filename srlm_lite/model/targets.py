"""Which layers of a model can carry an adapter, and which of them a recipe names.

A linear layer of the text model can, where the model calls it: an adapter acts on what goes through
its layer. Where code of the model takes a layer's weight and multiplies by itself, as Mamba's does,
an adapter on that layer is passed over. The experts of a mixture are no layers in memory: all of
them lie in one parameter of three dimensions.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D

from srlm_lite.errors import UserError
from srlm_lite.settings import LORA_TARGETS, is_targeted

_ASKED = ("dtype", "device", "shape")
"""What code may ask a weight for without its numbers."""
_CHANGES = ("data", "clamp", "clamp_")
_KERNELS = ("kernels", "mamba_ssm")
"""Packages with the kernels that transformers hands weights to."""
_PLAIN = LoraConfig()


@dataclass(frozen=True, slots=True)
class Reads:
    """What the code of a class of modules does with the weights of the layers that it holds."""

    used: tuple[tuple[str, tuple[ast.expr, ...]], ...]
    """Layers whose weight it computes with in a place, without calling them; and on what
    conditions."""
    handed: frozenset[str]
    """Layers whose weight it hands to a function, which is a kernel where one is installed; else it
    calls them."""
    not_in_4_bits: frozenset[str]
    """Layers that it never calls, whose weight it changes, or whose dtype it casts to: packed into
    4 bits they would fail, or compute something else."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x W + b; GPT-2's `Conv1D` does, with W transposed."""
    return isinstance(module, nn.Linear | Conv1D)


def sizes(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
        return int(inputs), int(outputs)
    return int(module.in_features), int(module.out_features)


def text_model(model: Any) -> tuple[nn.Module, ...]:
    """What text goes through: embedding and layers, and the head; no tower for images or sound."""
    return model.get_decoder(), *filter(None, [model.get_output_embeddings()])


def adaptable(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers that can carry an adapter, by their names, in the model's order."""
    passed_over = _layers_where(model, _used)
    if any(map(importlib.util.find_spec, _KERNELS)):
        passed_over += _layers_where(model, lambda module, reads: reads.handed)
    return {
        name: module
        for name, module in _of_the_text(model)
        if is_linear(module) and name not in passed_over and _peft_takes(model, name)
    }


def _peft_takes(model: PreTrainedModel, name: str) -> bool:
    """PEFT refuses layers of models like Mamba whose weight their kernels read."""
    try:
        _check_lora_target_modules_mamba(_PLAIN, model, name.rpartition(".")[2])
    except ValueError:
        return False
    return True


def not_in_4_bits(model: nn.Module) -> list[str]:
    """Names of the layers that the model's code has no use for in 4 bits."""
    return _layers_where(model, lambda module, reads: reads.not_in_4_bits)


def targeted(model: PreTrainedModel, targets: Iterable[str]) -> list[str]:
    """Names of the layers that a recipe's targets put an adapter on."""
    targets = tuple(targets)
    return [name for name in adaptable(model) if is_targeted(name, targets)]


def check_targets(model: PreTrainedModel, targets: Iterable[str]) -> None:
    """Make sure that every LoRA target names at least one layer that can carry an adapter.

    Args:
        model: On the meta device will do.

    Raises:
        UserError: A target names none; says why, and lists the names that do.
    """
    layers = adaptable(model)
    for target in targets:
        if any(is_targeted(name, (target,)) for name in layers):
            continue
        known = sorted({name.rpartition(".")[2] for name in layers} - {"lm_head", "embed_out"})
        raise UserError(
            _why_not(model, target),
            where=LORA_TARGETS,
            way_out=f"It has {', '.join(known)}" if known else None,
        )


def experts_left_out(model: PreTrainedModel, targets: Iterable[str]) -> list[str]:
    """The targets that name projections of a mixture's experts, which no adapter reaches."""
    named = {name.rpartition(".")[2] for name in _names_of_experts(model)}
    return sorted(named.intersection(target.rpartition(".")[2] for target in targets))


def fused_experts(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Parameters of three dimensions, each with a weight of all experts of a layer."""
    return {
        f"{name}.{key}": parameter
        for name, module in _of_the_text(model)
        if "expert" in f"{name} {type(module).__name__}".lower()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def _why_not(model: PreTrainedModel, target: str) -> str:
    fused = fused_experts(model)
    if fused and (
        experts_left_out(model, [target]) or any(is_targeted(name, (target,)) for name in fused)
    ):
        return (
            f"{target} is of the base's experts, which lie fused in memory, where no adapter here "
            "reaches them"
        )
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    found = next((name for name in linear if is_targeted(name, (target,))), None)
    if found is None:
        return f"the base has no linear layer named {target}"
    if found in {name for name, _ in _of_the_text(model)}:
        return f"the base's code computes with the weight of {target}, past any adapter on it"
    return f"the base has no linear layer named {target} in its text model, only in another part"


def _names_of_experts(model: PreTrainedModel) -> Iterator[str]:
    """Names in the files of what is fused in memory, by transformers' own rules."""
    if fused_experts(model):
        for rule in get_model_conversion_mapping(model):
            for pattern in rule.source_patterns:
                if "experts" in pattern:
                    yield pattern.removesuffix("$").removesuffix(".weight")


def _of_the_text(model: Any) -> Iterator[tuple[str, nn.Module]]:
    inside = {id(module) for part in text_model(model) for module in part.modules()}
    for name, module in model.named_modules():
        if id(module) in inside:
            yield name, module


def _layers_where(
    model: nn.Module, which: Callable[[nn.Module, Reads], Collection[str]]
) -> list[str]:
    """Names of the layers of which something is so in the code of what holds them."""
    found = []
    for name, module in model.named_modules():
        kind: Any = type(module)
        children = which(module, code_reads(kind))
        for child, layer in module.named_children():
            if child in children and is_linear(layer):
                found.append(f"{name}.{child}" if name else child)
    return found


def _used(module: nn.Module, reads: Reads) -> set[str]:
    """Layers whose weight the code takes where its conditions may hold for this module."""
    return {
        child
        for child, conditions in reads.used
        if not any(_never_holds(condition, module) for condition in conditions)
    }


def _never_holds(condition: ast.expr, module: nn.Module) -> bool:
    """Whether one part of a condition is a setting of the module that is off."""
    parts = condition.values if isinstance(condition, ast.BoolOp) else [condition]
    if isinstance(condition, ast.BoolOp) and not isinstance(condition.op, ast.And):
        return False
    named = (_child(part) for part in parts)
    return any(getattr(module, name, None) is False for name in named if name != "training")


@functools.cache
def code_reads(kind: type[nn.Module]) -> Reads:
    """What the code of a class, or of those it inherits from, does with its layers' weights.

    What makes and initialises them is left out.
    """
    used: list[tuple[str, tuple[ast.expr, ...]]] = []
    handed: set[str] = set()
    cast: set[str] = set()
    changed: set[str] = set()
    called: set[str] = set()
    for node, above in _code(kind):
        if isinstance(node, ast.Call) and (child := _child(node.func)):
            called.add(child)
        if not (isinstance(node, ast.Attribute) and node.attr == "weight"):
            continue
        child = _child(node.value)
        if not child:
            continue
        asked = above[-1].attr if isinstance(above[-1], ast.Attribute) else None
        if asked not in _ASKED:
            if _is_plain_call(above):
                handed.add(child)
            else:
                used.append((child, tuple(_conditions(node, above))))
            if asked in _CHANGES:
                changed.add(child)
        elif asked == "dtype" and isinstance(above[-2], ast.Call) and _is_cast(above[-2]):
            cast.add(child)
    uncalled = ({child for child, _ in used} | handed) - called
    always = tuple((child, ()) for child in handed & uncalled)
    return Reads((*used, *always), frozenset(handed), frozenset(uncalled | cast | changed))


def _conditions(node: ast.AST, above: list[ast.AST]) -> Iterator[ast.expr]:
    """The conditions of the `if`s in whose first branch a node lies."""
    for outer, inner in zip(above, [*above[1:], node], strict=True):
        if isinstance(outer, ast.If) and inner in outer.body:
            yield outer.test


def _code(kind: type[nn.Module]) -> Iterator[tuple[ast.AST, list[ast.AST]]]:
    """The nodes of a class's methods, each with those that it lies in."""
    for each in kind.__mro__:
        if not each.__module__.startswith("transformers.models."):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(each)))
        except (OSError, SyntaxError):  # a class without a file
            continue
        yield from _nodes(tree, [])


def _nodes(node: ast.AST, above: list[ast.AST]) -> Iterator[tuple[ast.AST, list[ast.AST]]]:
    if isinstance(node, ast.FunctionDef) and "init" in node.name:
        return
    yield node, above
    for child in ast.iter_child_nodes(node):
        yield from _nodes(child, [*above, node])


def _child(node: ast.AST) -> str:
    """`x` of `self.x`, else nothing."""
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    return node.attr if is_own and node.value.id == "self" else ""  # type: ignore[attr-defined]


def _is_plain_call(above: list[ast.AST]) -> bool:
    """Whether a node is an argument of a function that is called by its bare name."""
    call = above[-2] if isinstance(above[-1], ast.keyword) else above[-1]
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name)


def _is_cast(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr == "to"
