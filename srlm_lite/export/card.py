"""The model card: where a model comes from, what was measured on it, and what to be wary of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from srlm_lite.export.source import FinishedModel
from srlm_lite.methods import METHODS, method_of, sections_of_others
from srlm_lite.recipe import Recipe
from srlm_lite.report.facts import gather, public_settings
from srlm_lite.report.markdown import measured, warned_of
from srlm_lite.shipped import short_base

CARD = "README.md"
RECIPE = "recipe.yaml"

_PLACE = 'place = "..."  # this repository, or a directory with its files\n'


def write_card(
    folder: Path,
    source: FinishedModel,
    *,
    base: dict[str, Any],
    form: str,
    onto: str,
    dtype: str,
    rank: int,
    named: tuple[str, str | None] | None = None,
    file: str = "",
) -> None:
    """Write the card and the recipe beside the weights.

    Args:
        named: Of an adapter, the base's name and commit on the Hub; None: nobody finds it there.
        file: The GGUF file's name.
    """
    text = card(
        source, base=base, form=form, onto=onto, dtype=dtype, rank=rank, named=named, file=file
    )
    (folder / CARD).write_text(text, encoding="utf-8")
    settings = yaml.safe_dump(public_recipe(source.recipe), sort_keys=False, allow_unicode=True)
    (folder / RECIPE).write_text(settings, encoding="utf-8")


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as run, without the sections of other methods.

    Files and directories have their names in place of their paths.
    """
    others = sections_of_others(recipe.method)
    return public_settings(recipe.model_dump(mode="json", exclude=others))


def card(
    source: FinishedModel,
    *,
    base: dict[str, Any],
    form: str,
    onto: str,
    dtype: str,
    rank: int,
    named: tuple[str, str | None] | None = None,
    file: str = "",
) -> str:
    """The card as Markdown, with the Hub's metadata on top."""
    libraries = {"adapter": "peft", "merged": "transformers", "gguf": "gguf"}
    head: dict[str, Any] = {
        "library_name": libraries[form],
        "pipeline_tag": "text-generation",
        "tags": _tags(source, form),
    }
    on_hub = named[0] if named else base["location"] if base["kind"] == "hub" else None
    if on_hub is not None:
        relation = "adapter" if form == "adapter" else "finetune"
        head |= {"base_model": on_hub, "base_model_relation": relation}
    facts = gather(source.run, last=source.iteration, texts=False)
    parts = [
        "---\n" + yaml.safe_dump(head, sort_keys=False) + "---",
        f"# {source.name}",
        _about(source, base),
        "## Lineage\n\n" + _lineage(source, base, form=form, onto=onto, dtype=dtype),
        "## Measured\n\n" + measured(facts) + _measured_on(source, form, onto),
    ]
    if warned := warned_of(facts):
        parts.append(warned)
    use = _use_gguf(source, file) if form == "gguf" else _use(source, base, form, rank, named)
    parts.append("## Use\n\n" + use)
    return "\n\n".join(parts) + "\n"


def _tags(source: FinishedModel, form: str) -> list[str]:
    method = METHODS[source.recipe.method]
    tags = ["self-rewarding"] if method.is_self_rewarding else []
    tags += [method.trainer] if source.iteration else ["sft"]
    return [*tags, *{"adapter": ["lora"], "gguf": ["gguf"]}.get(form, [])]


def _about(source: FinishedModel, base: dict[str, Any]) -> str:
    method = METHODS[source.recipe.method]
    cited = method.cited()
    n, anchor = source.iteration, f"the anchor, {_anchor_from(source.recipe)}"
    of = f"of a run of the method `{method.name}` on {_base_name(base)}"
    if not n:
        return f"M1 {of}: {anchor}. Made with srlm-lite."
    return (
        f"M{n + 1} {of}. M1 is {anchor}; {n} iteration{'s' if n > 1 else ''} followed, of "
        f"{method.made_by}{f' ({cited})' if cited else ''}. Made with srlm-lite."
    )


def _anchor_from(recipe: Recipe) -> str:
    section = recipe.anchor
    if section.init != "base":
        # What it learned from is not known here; of a path on somebody's disk the name will do.
        return f"an adapter trained before and taken as it was (`{Path(section.init).name}`)"
    kinds = [("instruction", section.use_ift), ("judge", section.use_eft)]
    return f"made by SFT on {' and '.join(kind for kind, used in kinds if used)} data"


def _base_name(base: dict[str, Any]) -> str:
    return str(base["location"]) if base["kind"] == "hub" else short_base(base["name"])


def _lineage(
    source: FinishedModel, base: dict[str, Any], *, form: str, onto: str, dtype: str
) -> str:
    recipe, facts = source.recipe, source.run.facts()
    quantization = "" if recipe.base.quantization == "none" else f", trained in {_nf4(recipe)}"
    commit = (
        f"revision `{base['revision']}`" if "revision" in base else f"sha256 `{base['sha256']}`"
    )
    kind = {"hub": "on the Hub", "gguf": "a GGUF file", "directory": "a directory"}[base["kind"]]
    weights = "one LoRA, " if form == "adapter" else f"merged onto the {onto} weights, "
    rows = [
        ("base", f"{_base_name(base)} ({kind}), {commit}{quantization}"),
        ("stack", _stack(source)),
        ("method", f"{recipe.method}, seed {recipe.seed}{_pairs_by(recipe)}"),
        ("recipe", f"`{recipe.name}`, digest `{facts['digest']}`; as run in `{RECIPE}`"),
        ("weights", f"{weights}{dtype}; held against the stack, see `parity.json`"),
    ]
    if kwargs := recipe.base.chat_template_kwargs:
        given = yaml.safe_dump(kwargs, default_flow_style=True, allow_unicode=True, width=10**6)
        rows.append(("chat template", f"with `{given.strip()}` written into it"))
    if system := recipe.base.system:
        rows.append(
            (
                "system message",
                f"{json.dumps(system, ensure_ascii=False)}, under which it was trained and "
                "measured; the chat template does not hold it, so give it",
            )
        )
    return "\n".join(f"- **{name}:** {text}" for name, text in rows)


def _stack(source: FinishedModel) -> str:
    if not source.iteration:
        return "the anchor alone"
    dpo = source.recipe.dpo
    goes_on = dpo.init == "previous" and source.iteration > 1
    begins = f"which {'went on from the one before' if goes_on else 'began at zero on the anchor'}"
    reference = {"init": "the model it began as", "anchor": "the anchor"}[dpo.reference]
    if source.iteration > 1 and method_of(source.recipe).accumulates:
        begins += " and learned the pairs of all iterations so far"
    return (
        f"the anchor and delta {source.iteration}, {begins}; the reference of its training was "
        f"{reference}"
    )


def _pairs_by(recipe: Recipe) -> str:
    if not METHODS[recipe.method].is_self_rewarding:
        return ""
    return {
        "judge": "",
        "random": ", pairs drawn blindly",
        "flipped": ", the judge's pairs turned round",
        "gold": ", pairs by the gold scorer",
    }[recipe.pairing.source]


def _measured_on(source: FinishedModel, form: str, onto: str) -> str:
    if source.recipe.base.quantization == "none" or form == "adapter" or onto != "original":
        return ""
    return (
        "\n\nThese are figures of the stack on the base in NF4, as it was trained. The "
        "weights here are merged onto what NF4 had rounded; how far their answers are from that "
        "is in `parity.json` (`against_nf4`)."
    )


def _nf4(recipe: Recipe) -> str:
    return recipe.base.quantization.upper()


def _use(
    source: FinishedModel,
    base: dict[str, Any],
    form: str,
    rank: int,
    named: tuple[str, str | None] | None,
) -> str:
    if form == "adapter":
        room = next(size for size in (8, 16, 32, 64, 128, 256, 320, 512, rank) if size >= rank)
        return (
            f"{_load_adapter(base, named)}\n\n"
            "Its layers are named as `AutoModelForCausalLM` names them, whatever the base's files "
            "say; of a base with vision, that may be the text model alone.\n\n"
            f"Its rank is {rank}: vLLM needs `max_lora_rank={room}`."
        )
    return (
        "```python\nfrom transformers import pipeline\n\n"
        f'{_PLACE}chat = pipeline("text-generation", place)\n'
        'print(chat([{"role": "user", "content": "Hello"}])[0]["generated_text"][-1]["content"])\n'
        "```"
    )


def _load_adapter(base: dict[str, Any], named: tuple[str, str | None] | None) -> str:
    """What loads an adapter on its base, and what is to be said of the base."""
    if named is not None:
        said = (
            "The base is the one that `adapter_config.json` names, at the commit there."
            if named[1]
            else "The base is the one that `adapter_config.json` names; no commit of it is known."
        )
        if base["kind"] != "hub":
            said += (
                f" The run had it from {_local(base)}; that these are the same weights was said, "
                "not looked at."
            )
        return (
            "```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
            f"{_PLACE}model = AutoPeftModelForCausalLM.from_pretrained(place)\n```\n\n{said}"
        )
    imports = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
    opened, more = "base", ""
    if base["kind"] == "gguf":
        imports += (
            "\nfrom srlm_lite.model.base import base_files\nfrom srlm_lite.settings import Base\n"
        )
        opened = "base_files(Base(name=base)).folder"
        more = (
            " It was trained on what that file expands to, which srlm-lite makes a directory of; "
            "on the 16-bit weights that the file was made from it answers a little otherwise."
        )
    return (
        f'```python\n{imports}\nbase = "..."  # where you have {short_base(base["name"])}\n'
        f"{_PLACE}model = AutoModelForCausalLM.from_pretrained({opened})\n"
        "model = PeftModel.from_pretrained(model, place)\n```\n\n"
        f"The base was {_local(base)}.{more} `adapter_config.json` has its name alone, by which no "
        "library finds it."
    )


def _local(base: dict[str, Any]) -> str:
    return f"`{short_base(base['name'])}` with the sha256 `{base['sha256']}`"


def _use_gguf(source: FinishedModel, file: str) -> str:
    return (
        f"```\nllama-server --model {file}\nollama create {source.name.lower()} -f Modelfile\n"
        "```\n\nThe chat template and the tokens that end a reply are in the file; for Ollama, in "
        "`Modelfile`."
    )
