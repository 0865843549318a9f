"""Which layers a base has that could carry an adapter, told by names alone and without torch.

Its files have names; so has the code of its family, which is read as text. Where the files call the
layers as memory does, they tell all of them; else only which names there cannot be.
"""

from __future__ import annotations

import importlib.util
import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from srlm_lite.errors import UserError
from srlm_lite.model.gguf_header import read_header
from srlm_lite.model.whereabouts import directory_here, located
from srlm_lite.settings import LORA_TARGETS, Base

SAME_NAMES = frozenset(
    {"gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"}
)
"""Model types, and architectures of GGUF, whose layers have the same last names in the files as in
memory."""

MODEL_TYPES: Mapping[str, str] = {
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "lfm2": "lfm2",
    "llama": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen35": "qwen3_5_text",
    "qwen3moe": "qwen3_moe",
}
"""Model types of transformers, by architecture of GGUF."""

IN_GGUF = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}
"""Layers of a dense model, as GGUF and as memory call them."""

_HEAD = "lm_head"
"""The last layer, which may carry an adapter and is not proposed."""
_OF_A_LAYER = re.compile(r"\.layers\.\d+\..*\.weight$")
_OF_A_BLOCK = re.compile(r"(^|\.)\d+\..*\.weight$")
_NOT_OF_TEXT = re.compile(r"vision|visual|audio")
_OF_AN_EXPERT = re.compile(r"\bexperts\b")
_ASSIGNED = re.compile(r"self\.(\w+)\s*(?::[^=\n]+)?=\s*([\w.]*)")
_WORD = re.compile(r"""["'](\w+)["']""")
_LINEAR = re.compile(r"Linear|Conv1D")
_NOT_LINEAR = re.compile(r"Embedding|Norm|Dropout|Parameter|ACT2FN|^(config|None|True|False)\b|^\d")


Names = tuple[frozenset[str] | None, frozenset[str]]
"""Names that layers may have, None where that is not known, and names to propose."""
_NOTHING: Names = (None, frozenset())


def refuse_absent_layers(
    section: Base, targets: Iterable[str], *, revision: str | None = None
) -> bool:
    """Look for the names of what carries the adapters in a base's files and its family's code.

    Args:
        revision: Commit on the Hub; default: the recipe's.

    Returns:
        Whether they could be asked: the base's files are here, and its family is known.

    Raises:
        UserError: The base has no layer of such a name; says which names it has.
    """
    kind, location = located(section.name)
    folder = directory_here(section, revision=revision)
    known = None
    possible, proposed = _NOTHING
    if kind == "gguf":
        known = layers_in_gguf(Path(location))
        if known is None:
            possible, proposed = _by_code(_types_in_gguf(Path(location)), {})
    elif folder is not None:
        known = layers_in_files(folder)
        if known is None:
            possible, proposed = names_in_code(folder)
    if known is not None:
        _refuse(targets, known, f"It has {_listed(known - {_HEAD})}")
    elif possible is not None:
        _refuse(targets, possible, f"Its layers are {_listed(proposed)}" if proposed else None)
    return not (known is None and possible is None)


def refuse_names_unknown_to(model_type: str, targets: Iterable[str]) -> None:
    """The same of a base that is not here, of which the family is known.

    Raises:
        UserError: No layer of the family has such a name; says which names there are.
    """
    possible, proposed = _by_code([model_type], {})
    if possible is not None:
        _refuse(targets, possible, f"Its layers are {_listed(proposed)}" if proposed else None)


def _refuse(targets: Iterable[str], possible: frozenset[str], way_out: str | None) -> None:
    for target in targets:
        last = target.rpartition(".")[2]
        if last not in possible and not last.isdecimal():
            raise UserError(
                f"the base has no linear layer named {target}", where=LORA_TARGETS, way_out=way_out
            )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def layers_in_files(folder: Path) -> frozenset[str] | None:
    """Last names of the linear layers of a base, by the names in its files.

    Its head is among them, which tied weights leave out of the files. None where the family is not
    one of `SAME_NAMES`, or the files cannot be read so.
    """
    read = _read(folder)
    if read is None or read[0]["model_type"] not in SAME_NAMES:
        return None
    found = {
        _last(name)
        for name, shape in read[1].items()
        if _OF_A_LAYER.search(name) and not _NOT_OF_TEXT.search(name) and len(shape) == 2
    }
    return frozenset({*found, _HEAD}) if found else None


def layers_in_gguf(file: Path) -> frozenset[str] | None:
    """The same of a GGUF file, in which architectures such as Llama's call their layers alike."""
    try:
        header = read_header(file)
    except (OSError, ValueError, struct.error):
        return None
    if header.architecture not in SAME_NAMES:
        return None
    if not {f"blk.0.{name}.weight" for name in IN_GGUF} <= header.tensors.keys():
        return None  # fused, or a mixture's experts
    return frozenset({*IN_GGUF.values(), _HEAD})


def names_in_code(folder: Path) -> Names:
    """Last names that linear layers of any family may have, and those to propose.

    A layer has its name from the code that makes it, or else is called in the files as in memory:
    what stands in neither, no layer is called. The reverse does not hold.
    """
    read = _read(folder)
    if read is None:
        return _NOTHING
    config, shapes = read
    text = config.get("text_config")  # beside it may stand towers, for images or sound
    both = [config, text] if isinstance(text, dict) else [config]
    named = {str(one["model_type"]) for one in both if "model_type" in one}
    if "auto_map" in config:  # the base brings code of its own
        return _NOTHING
    return _by_code(named, shapes)


def _by_code(model_types: Iterable[str], shapes: Mapping[str, list[int]]) -> Names:
    """See `names_in_code`."""
    sources = [_code_of(one) for one in model_types]
    if not sources or None in sources:
        return _NOTHING
    text = "\n".join(filter(None, sources))
    made: dict[str, set[str]] = {}
    for name, by in _ASSIGNED.findall(text):
        made.setdefault(name, set()).add(by)
    in_files = {
        name: _last(name)
        for name, shape in shapes.items()
        if _OF_A_BLOCK.search(name) and not _NOT_OF_TEXT.search(name) and len(shape) == 2
    }
    possible = {name for name, by in made.items() if not all(map(_NOT_LINEAR.search, by))}
    possible.update(in_files.values(), _WORD.findall(text))
    linear = {name for name, by in made.items() if any(map(_LINEAR.search, by))}
    if not shapes:  # of a mixture's layers the code alone does not say which a base has
        return frozenset(possible), frozenset(() if "expert" in text else linear - {_HEAD})
    # Of a mixture the files name each expert, which memory has not.
    alone = {last for name, last in in_files.items() if not _OF_AN_EXPERT.search(name)}
    return frozenset(possible), frozenset(linear & alone)


@cache
def _code_of(model_type: str) -> str | None:
    """The text of transformers' code of a family, which is not imported; None: not found."""
    spec = importlib.util.find_spec("transformers")
    folders = (spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for name in (model_type, model_type.removesuffix("_text")):
            found = sorted((Path(folder) / "models" / name).glob("modeling_*.py"))
            if found:
                return "\n".join(file.read_text(encoding="utf-8") for file in found)
    return None


def _types_in_gguf(file: Path) -> Iterator[str]:
    """The model type that a GGUF file is read as, where it is one of those served."""
    try:
        architecture = read_header(file).architecture
    except (OSError, ValueError, struct.error):
        return
    if architecture in MODEL_TYPES:
        yield MODEL_TYPES[architecture]


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, list[int]]] | None:
    """A base's configuration, and the shapes of the tensors in its files; None: not to be read."""
    shapes: dict[str, list[int]] = {}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config["model_type"], str):
            return None
        for file in folder.glob("*.safetensors"):
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                if length > file.stat().st_size:
                    return None
                header = json.loads(opened.read(length))
            shapes |= {name: one["shape"] for name, one in header.items() if "shape" in one}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (config, shapes) if shapes else None


def _last(name: str) -> str:
    """The last name of a layer, by that of its weight."""
    return name.removesuffix(".weight").rpartition(".")[2]
