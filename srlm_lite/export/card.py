"""The model card: where a model comes from, what was measured on it, and what to be wary of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from srlm_lite.config import PATH_KEYS, Recipe
from srlm_lite.export.source import Source
from srlm_lite.run_dir import StageDir, read_json
from srlm_lite.stages.evaluation import warnings

CARD = "README.md"
RECIPE = "recipe.yaml"

LENGTH_GROWTH = 1.3
"""Answers longer than the anchor's by this factor are told: judges like length for its own sake."""


def write_card(
    folder: Path,
    source: Source,
    *,
    base: dict[str, Any],
    form: str,
    onto: str,
    dtype: str,
    rank: int,
) -> None:
    """Write the card and the recipe beside the weights."""
    text = card(source, base=base, form=form, onto=onto, dtype=dtype, rank=rank)
    (folder / CARD).write_text(text, encoding="utf-8")
    settings = yaml.safe_dump(public_recipe(source.recipe), sort_keys=False, allow_unicode=True)
    (folder / RECIPE).write_text(settings, encoding="utf-8")


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as run, with the names of files and directories in place of their paths."""
    settings: dict[str, Any] = recipe.model_dump(mode="json")
    for section, key in PATH_KEYS:
        value = settings[section][key]
        if isinstance(value, str) and Path(value).is_absolute():
            settings[section][key] = Path(value).name
    return settings


def card(
    source: Source, *, base: dict[str, Any], form: str, onto: str, dtype: str, rank: int
) -> str:
    """The card as Markdown, with the Hub's metadata on top."""
    head: dict[str, Any] = {
        "library_name": "peft" if form == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["self-rewarding", "dpo", *(["lora"] if form == "adapter" else [])],
    }
    if base["kind"] == "hub":
        relation = "adapter" if form == "adapter" else "finetune"
        head |= {"base_model": base["location"], "base_model_relation": relation}
    parts = [
        "---\n" + yaml.safe_dump(head, sort_keys=False) + "---",
        f"# {source.name}",
        _about(source, base),
        "## Lineage\n\n" + _lineage(source, base, form=form, onto=onto, dtype=dtype),
        "## Measured\n\n" + _measured(source),
    ]
    if found := _warnings(source):
        parts.append("## Warnings\n\n" + "\n".join(f"- {text}" for text in found))
    parts.append("## Use\n\n" + _use(form, rank))
    return "\n\n".join(parts) + "\n"


def _about(source: Source, base: dict[str, Any]) -> str:
    what = f"{source.iteration} iterations" if source.iteration != 1 else "one iteration"
    if not source.iteration:
        return (
            f"The anchor (M1) of a self-rewarding run on {_base_name(base)}: SFT on instruction "
            "and judge data. Made with srlm-lite."
        )
    return (
        f"M{source.iteration + 1} of a self-rewarding run on {_base_name(base)}: after {what} of "
        "answering prompts, grading its own answers and DPO on the pairs "
        "([Yuan et al. 2024](https://arxiv.org/abs/2401.10020)). Made with srlm-lite."
    )


def _base_name(base: dict[str, Any]) -> str:
    name: str = base["location"] if base["kind"] == "hub" else Path(base["name"]).name
    return name


def _lineage(source: Source, base: dict[str, Any], *, form: str, onto: str, dtype: str) -> str:
    recipe, facts = source.recipe, source.run.facts()
    quantization = "" if recipe.base.quantization == "none" else f", trained in {_nf4(recipe)}"
    commit = (
        f"revision `{base['revision']}`" if "revision" in base else f"sha256 `{base['sha256']}`"
    )
    stack = "anchor" + (f" + delta {source.iteration}" if source.iteration else "")
    delta = f"each delta starts from the {recipe.dpo.init}, reference: {recipe.dpo.reference}"
    weights = f"one LoRA, {dtype}" if form == "adapter" else f"merged, {dtype}, onto {onto} weights"
    rows = [
        ("base", f"{_base_name(base)} ({base['kind']}), {commit}{quantization}"),
        ("stack", f"{stack}; {delta}" if source.iteration else stack),
        ("method", f"{recipe.method}, seed {recipe.seed}, pairs by {recipe.pairing.source}"),
        ("recipe", f"`{recipe.name}`, digest `{facts['digest']}`; as run in `{RECIPE}`"),
        ("weights", weights),
    ]
    return "\n".join(f"- **{name}:** {text}" for name, text in rows)


def _nf4(recipe: Recipe) -> str:
    return recipe.base.quantization.upper()


def _measured(source: Source) -> str:
    gold = source.recipe.evaluate.gold
    names = ["model", "pairs", *(["gold"] if gold else []), "judge accuracy", "ties", "readable"]
    names.append("mean length, characters")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for number, place in enumerate(source.places):
        result = _evaluation(place)
        judge, policy = result["judge"], result["policy"]
        cells = [f"M{number + 1}", _pairs(place)]
        if gold:
            cells.append(_number(policy.get("gold_mean")))
        cells += [
            _number(judge.get(key)) for key in ("pairwise_accuracy", "tie_rate", "parse_rate")
        ]
        cells.append(_number(policy.get("mean_length_chars"), digits=0))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Judge accuracy: share of reply pairs that the model, as judge, puts in the"]
    lines[-1] += " right order. Readable: share of its votes that could be read."
    if gold:
        lines[-1] += f" Gold: `{gold}` on sampled answers to held-out prompts."
    return "\n".join(lines)


def _evaluation(place: StageDir) -> dict[str, Any]:
    empty: dict[str, Any] = {"judge": {}, "policy": {}}
    return read_json(place.evaluation) if place.evaluation.is_file() else empty


def _pairs(place: StageDir) -> str:
    if not place.is_done:
        return ""
    return str(read_json(place.done).get("counts", {}).get("pairs", {}).get("pairs", ""))


def _warnings(source: Source) -> list[str]:
    measured = [(place, _evaluation(place)) for place in source.places]
    found = []
    before = None
    for number, (_, now) in enumerate(measured):
        if now["judge"]:
            found += [f"M{number + 1}: {text}" for text in warnings(before, now)]
            before = now
    lengths = [now["policy"].get("mean_length_chars") for _, now in measured]
    if lengths[0] and lengths[-1] and lengths[-1] > LENGTH_GROWTH * lengths[0]:
        found.append(
            f"answers grew from {lengths[0]:.0f} to {lengths[-1]:.0f} characters on average: part "
            "of what a judge prefers here may be length"
        )
    if source.recipe.pairing.source == "random":
        found.append("the pairs were drawn blindly: this is a control, not a self-rewarding model")
    return found


def _use(form: str, rank: int) -> str:
    if form == "adapter":
        room = next(size for size in (8, 16, 32, 64, 128, 256, 320, 512, rank) if size >= rank)
        return (
            "```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
            'model = AutoPeftModelForCausalLM.from_pretrained("PATH")\n```\n\n'
            f"Its rank is {rank}: vLLM needs `max_lora_rank={room}`."
        )
    return (
        "```python\nfrom transformers import pipeline\n\n"
        'chat = pipeline("text-generation", "PATH")\n'
        'chat([{"role": "user", "content": "Hello"}])\n```'
    )


def _number(value: Any, *, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
