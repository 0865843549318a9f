"""A run in Markdown: what a model card says of it."""

from __future__ import annotations

from srlm_lite.evaluate.judge_figures import SHORT_FIGURES
from srlm_lite.forms import form_in
from srlm_lite.report.answer import Headline, answer, worries
from srlm_lite.report.charts import number
from srlm_lite.report.controls import COLUMNS, comparisons, rows, verdict
from srlm_lite.report.facts import Facts, ModelFacts
from srlm_lite.shipped import short_base


def markdown(facts: Facts) -> str:
    """The answer, the table of models, and the warnings."""
    found: Headline = answer(facts)
    base = short_base(str((facts.settings.get("base") or {}).get("name", "")))
    parts = [
        f"# {facts.name}",
        f"{facts.method} on {base}, seed {facts.settings.get('seed', 0)}; "
        f"{facts.finished} of {facts.planned} iterations.",
        "\n".join(
            [
                f"- **Improved?** {found.headline}",
                *(f"  - {text}" for text in found.by_how_much),
                f"- **Cost:** {'; '.join(found.cost)}",
                f"- **Export:** {' '.join(found.export)}",
            ]
        ),
        "## Measured\n\n" + measured(facts),
    ]
    if facts.controls:
        parts.append(_beside_controls(facts))
    if warned := warned_of(facts):
        parts.append(warned)
    parts.append(f"Recipe digest `{facts.run.get('digest', '')}`. Made with srlm-lite.")
    return "\n\n".join(parts) + "\n"


def measured(facts: Facts) -> str:
    """The table of the run's models, and what its columns mean."""
    gold = facts.gold_name
    names = [
        "model",
        "pairs",
        *(["gold"] if gold else []),
        *(one.short or one.label for one in SHORT_FIGURES),
        *(own := form_in(facts.settings).figures).values(),
    ]
    names.append("mean length, characters")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for model in facts.models:
        judge, policy = model.judge, model.policy
        cells = [model.name, "" if model.n_pairs is None else str(model.n_pairs)]
        if gold:
            cells.append(_gold(model))
        cells += [number(one.of(judge)) for one in SHORT_FIGURES]
        cells += [number(judge.get(key)) for key in own]
        cells.append(number(policy.get("mean_length_chars"), 0))
        lines.append("| " + " | ".join(cells) + " |")
    notes = (
        "Judge accuracy: share of reply pairs that the model, as judge, puts in the right order. "
        "Readable: share of its votes that could be read."
    )
    if gold:
        notes += f" Gold: `{gold}` on sampled answers to held-out prompts, with 95% intervals."
    return "\n".join([*lines, "", notes])


def _beside_controls(facts: Facts) -> str:
    found = comparisons(facts)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(facts)]
    told = "\n".join([verdict(found), "", *(f"- {one.text}" for one in found)])
    return f"## Controls\n\n{told}\n\n" + "\n".join(lines)


def warned_of(facts: Facts) -> str:
    """The section of warnings, or nothing."""
    found = worries(facts)
    return "## Warnings\n\n" + "\n".join(f"- {text}" for text in found) if found else ""


def _gold(model: ModelFacts) -> str:
    gold = model.gold
    if gold is None:
        return ""
    if gold.low is None or gold.high is None:
        return number(gold.value)
    return f"{gold.value:.2f} ({gold.low:.2f} to {gold.high:.2f})"
