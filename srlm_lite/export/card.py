"""The model card: where a model comes from, what was measured on it, and what to be wary of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from srlm_lite.config import Recipe
from srlm_lite.export.source import Source
from srlm_lite.report.facts import gather, public_settings
from srlm_lite.report.markdown import measured, warned_of

CARD = "README.md"
RECIPE = "recipe.yaml"


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
    return public_settings(recipe.model_dump(mode="json"))


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
    facts = gather(source.run, last=source.iteration, texts=False)
    parts = [
        "---\n" + yaml.safe_dump(head, sort_keys=False) + "---",
        f"# {source.name}",
        _about(source, base),
        "## Lineage\n\n" + _lineage(source, base, form=form, onto=onto, dtype=dtype),
        "## Measured\n\n" + measured(facts),
    ]
    if warned := warned_of(facts):
        parts.append(warned)
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
