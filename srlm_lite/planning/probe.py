"""A base's shape, from its configuration: a model on the meta device, no weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srlm_lite.conversation import Answerable
from srlm_lite.errors import UserError
from srlm_lite.planning.memory import Linear, Shape
from srlm_lite.planning.shapes import SHAPES, config_of, shape_of
from srlm_lite.rollout.sizes import attention_of, widest
from srlm_lite.settings import Base

if TYPE_CHECKING:
    from srlm_lite.model.chat import ChatFormat


def shape_of_base(section: Base, targets: Iterable[str] = ()) -> Shape:
    """The shape of the base that a recipe names.

    Raises:
        UserError: Its configuration is neither here, nor on the Hub, nor in the table of shapes;
            or as `probe`.
    """
    return probe(base_config(section), targets)


def thinks(section: Base) -> bool:
    """Whether a base thinks before it answers; False where its tokenizer is not here to tell."""
    chat = _chat_here(section.model_dump_json(include=set(_OF_TEMPLATES)))
    return chat is not None and chat.thinks


def prompt_tokens(section: Base, prompts: Iterable[Answerable]) -> list[int] | None:
    """Tokens of prompts in the base's template, each up to where the reply starts.

    None where its tokenizer is not here.

    Raises:
        UserError: The template does not write one of their turns.
    """
    chat = _chat_here(section.model_dump_json(include=set(_OF_TEMPLATES)))
    return None if chat is None else [len(chat.policy_ids(prompt)) for prompt in prompts]


def question_tokens(section: Base, texts: Iterable[str]) -> list[int] | None:
    """The same of questions to a judge."""
    chat = _chat_here(section.model_dump_json(include=set(_OF_TEMPLATES)))
    return None if chat is None else [len(chat.prompt_ids(text)) for text in texts]


@lru_cache
def _chat_here(of_templates: str) -> ChatFormat | None:
    from transformers import AutoTokenizer

    from srlm_lite.model.base import spoken_here
    from srlm_lite.model.chat import ChatFormat
    from srlm_lite.model.whereabouts import located

    found = json.loads(of_templates)
    try:
        tokenizer: Any
        if located(found["name"])[0] == "gguf":
            tokenizer, _ = spoken_here(Base(name=found["name"])) or (None, ())
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                found["name"],
                revision=found["revision"],
                local_files_only=True,
                trust_remote_code=False,
            )
        settings = found["chat_template_kwargs"]
        return ChatFormat(
            tokenizer,
            template=found["chat_template"],
            settings=settings,
            system=found["system"],
        )
    except Exception:  # whatever is wrong with it: a run says so
        return None


_OF_TEMPLATES = ("name", "revision", "chat_template", "chat_template_kwargs", "system")
"""Settings of a base that decide how it is spoken to."""


def base_config(section: Base) -> Any:
    """The configuration of a base: of the shipped table, or of its own files.

    Raises:
        UserError: It cannot be had.
    """
    refuse_unknown(section)
    known = shape_in_table(section)
    if known is not None:
        return config_of(known)
    from srlm_lite.model.base import read_config

    with _about_shapes(section):
        return read_config(section)


def refuse_unknown(section: Base) -> None:
    """Ask for the configuration of a base, without torch: of an absent Hub once, and not for long.

    Raises:
        UserError: It is neither here, nor on the Hub, nor in the table of shapes.
    """
    from srlm_lite.model.whereabouts import is_here

    if shape_in_table(section) is None:
        with _about_shapes(section):
            is_here(section)


def shape_in_table(section: Base) -> str | None:
    """The name of the shape of a base whose files are not here, where it is known."""
    return None if Path(section.name).exists() else shape_of(section.name)


@contextmanager
def _about_shapes(section: Base) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(
            f"cannot plan for {section.name}: {error.what}",
            where="base.name",
            way_out=f"{error.way_out or 'Name a base that is here'}. Without any file the shapes "
            f"of these are known: {', '.join(sorted(SHAPES))}",
        ) from error


def probe(settings: Any, targets: Iterable[str] = ()) -> Shape:
    """The shape that a configuration of transformers describes.

    Raises:
        UserError: transformers makes no causal language model of it, or one of the LoRA targets
            names no layer that can carry an adapter.
    """
    told = settings.to_json_string(use_diff=False)
    return _probed(_Described(type(settings), told, settings), tuple(targets))


@dataclass(frozen=True, slots=True)
class _Described:
    """A configuration that can be looked up: by all that it says."""

    kind: type
    told: str
    settings: Any = field(compare=False)


@lru_cache(maxsize=32)
def _probed(described: _Described, targets: tuple[str, ...]) -> Shape:
    from srlm_lite.model.base import empty_model
    from srlm_lite.model.nf4 import nf4_modules
    from srlm_lite.model.targets import (
        adaptable,
        check_targets,
        fused_experts,
        is_linear,
        sizes,
        text_model,
    )

    settings = described.settings
    try:
        model = empty_model(settings)
    except (ValueError, KeyError, AttributeError, ImportError) as error:
        raise UserError(
            f"transformers makes no causal language model of it ({str(error).splitlines()[0]})",
            where="base.name",
        ) from error
    check_targets(model, targets)
    experts = sum(parameter.numel() for parameter in fused_experts(model).values())
    quantized, layers = nf4_modules(model), adaptable(model)
    linears = tuple(
        Linear(name, *sizes(module), f"{name}.weight" in quantized, name in layers)
        for name, module in model.named_modules()
        if is_linear(module)
    )
    text = settings.get_text_config()
    heads, head_width, kv_width = attention_of(text)
    embedding, head = model.get_input_embeddings(), text_model(model)[1:]
    ends = {p: p.numel() for end in (embedding, *head) for p in end.parameters()}
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        intermediate=_widest(text, mixture=bool(experts)),
        layers=text.num_hidden_layers,
        heads=heads,
        head_width=head_width,
        kv_width=kv_width,
        linears=linears,
        largest=max(parameter.numel() for parameter in model.parameters()),
        embedded=sum(ends.values()),
        windows=_windows(text),
        experts=experts,
        lean_norms=_lean_norms(model),
    )


def _lean_norms(model: Any) -> bool:
    from srlm_lite.training.norms import keeps_its_input_alone

    norms = {type(one) for one in model.modules() if type(one).__name__.endswith("RMSNorm")}
    return bool(norms) and all(keeps_its_input_alone(kind) for kind in norms)


def _windows(text: Any) -> tuple[int, ...]:
    """Tokens of the window of each layer that sees one."""
    from transformers import DynamicCache

    layers = DynamicCache(config=text).layers
    return tuple(window for one in layers if (window := getattr(one, "sliding_window", None)))


def _widest(text: Any, *, mixture: bool) -> int:
    """What a token takes in the widest MLP: of a mixture, the experts that it goes through."""

    dense = widest(text, "intermediate_size", "n_inner", "ffn_dim") or 4 * text.hidden_size
    if not mixture:
        return dense
    of_one = widest(text, "moe_intermediate_size", "intermediate_size") or dense
    chosen = widest(text, "num_experts_per_tok", "moe_k", "moe_topk") or 1
    return max(dense, chosen * of_one + widest(text, "shared_expert_intermediate_size"))
