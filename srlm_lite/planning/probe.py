"""A base's shape, from its configuration: a model on the meta device, no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from srlm_lite.config import Base
from srlm_lite.errors import UserError
from srlm_lite.planning.memory import Linear, Shape
from srlm_lite.planning.shapes import SHAPES, config_of, shape_of


def shape_of_base(section: Base) -> Shape:
    """The shape of the base that a recipe names.

    Raises:
        UserError: Its configuration is neither here, nor on the Hub, nor in the table of shapes.
    """
    return probe(base_config(section))


def base_config(section: Base) -> Any:
    """The configuration of a base: of the shipped table, or of its own files.

    Raises:
        UserError: It cannot be had.
    """
    from srlm_lite.model.base import read_config

    known = shape_of(section.name)
    if known is not None and not Path(section.name).exists():
        return config_of(known)
    try:
        return read_config(section)
    except UserError as error:
        raise UserError(
            f"cannot plan for {section.name}: {error.what}",
            where="base.name",
            way_out=f"{error.way_out or 'Name a base that is here'}. Without any file the shapes "
            f"of these are known: {', '.join(sorted(SHAPES))}",
        ) from error


def probe(settings: Any) -> Shape:
    """The shape that a configuration of transformers describes.

    Raises:
        UserError: transformers makes no causal language model of it.
    """
    import torch
    import transformers

    from srlm_lite.model.merge import nf4_modules

    hf: Any = transformers
    try:
        with torch.device("meta"):
            model = hf.AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    except (ValueError, KeyError, AttributeError, ImportError) as error:
        raise UserError(
            f"transformers makes no causal language model of it ({str(error).splitlines()[0]})",
            where="base.name",
        ) from error
    model.tie_weights()
    quantized = nf4_modules(model)
    linears = tuple(
        Linear(name, module.in_features, module.out_features, f"{name}.weight" in quantized)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    )
    text = settings.get_text_config()
    heads = text.num_attention_heads
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_width=getattr(text, "head_dim", None) or text.hidden_size // heads,
        linears=linears,
        largest=max(parameter.numel() for parameter in model.parameters()),
    )
