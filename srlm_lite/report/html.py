"""The report as one HTML file that needs nothing else: no network, no other file.

Templates escape all they are given. Beyond that, the page's own policy lets no script run but the
one it was written with, and nothing be loaded from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from importlib import resources
from typing import Any

import yaml

from srlm_lite.errors import UserError
from srlm_lite.evaluate.gold import Gold, load_gold
from srlm_lite.evaluate.judge_figures import JUDGE_FIGURES, JudgeFigure
from srlm_lite.evaluate.reading import KINDS, first_loss
from srlm_lite.forms import DEFAULT_FORM, form_in
from srlm_lite.methods import METHODS, own_settings
from srlm_lite.report.answer import answer, duration, hardware
from srlm_lite.report.charts import groups, number
from srlm_lite.report.controls import COLUMNS, comparisons, rows, verdict
from srlm_lite.report.draw import svg
from srlm_lite.report.facts import Duel, Estimate, Facts, ModelFacts, used_settings
from srlm_lite.report.pack import Packed, pack
from srlm_lite.telling import without_secrets_in

MOST_BYTES = 5_000_000
"""No report is larger."""

GENERATOR = "srlm-lite report"
"""By this name a file is known to be a report, which another report may replace."""

KEY_SETTINGS = (
    ("method", "method"),
    ("base.name", "base"),
    ("base.quantization", "quantization"),
    ("base.system", "system message"),
    ("seed", "seed"),
    ("prompts.per_iteration", "prompts an iteration"),
    ("rollout.n", "candidates a prompt"),
    ("rollout.temperature", "temperature of candidates"),
    ("judge.form", "judged by"),
    ("judge.rubric", "rubric"),
    ("judge.votes", "votes a candidate"),
    ("pairing.source", "pairs by"),
    ("dpo.init", "each delta starts from"),
    ("dpo.reference", "reference"),
    ("dpo.loss", "loss"),
    ("dpo.beta", "beta"),
    ("dpo.learning_rate", "learning rate"),
    ("dpo.epochs", "epochs"),
)
"""The settings of all methods; one's own are its `labels`."""


def html(facts: Facts) -> str:
    """The whole page."""
    page = _page(facts)
    empty = _render(page, Packed("", 0, 0, None), "")
    room = MOST_BYTES - len(empty.encode()) - 20_000  # for the notes on pairs
    gold, note = _gold(facts)
    told = form_in(facts.settings).told
    packed = pack(facts.pairs, room=room, gold=gold.total if gold else None, told=told)
    return _render(page, packed, note)


def _gold(facts: Facts) -> tuple[Gold | None, str]:
    """The recipe's gold scorer; it may be gone by now, and the report goes on without."""
    name = facts.gold_name
    if name is None or not facts.pairs:
        return None, ""
    try:
        gold = load_gold(name)
        first = facts.pairs[0].record
        gold.total(first.prompt, first.chosen)
    except UserError as error:
        return None, f"Without gold scores, for the scorer cannot be used here: {error}"
    return gold, ""


def _page(facts: Facts) -> dict[str, Any]:
    """All that the template shows but the pairs."""
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {
        "generator": GENERATOR,
        "policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"base-uri 'none'; form-action 'none'; script-src 'sha256-{digest}'",
        "style": _asset("report.css"),
        "script": script,
        "facts": facts,
        "words": facts.words,
        "answer": answer(facts),
        "state": _state(facts),
        "columns": ["model", *(name for name, _ in _columns(facts))],
        "models": [
            [model.title, *(text(model) for _, text in _columns(facts))] for model in facts.models
        ],
        "others": [row for model in facts.models for row in _others(model)],
        "duels": [_duel(one) for one in facts.duels],
        "controls": _controls(facts),
        "groups": [
            (group, [(chart, svg(chart)) for chart in group.charts]) for group in groups(facts)
        ],
        "settings": _key_settings(facts),
        "recipe": yaml.safe_dump(used_settings(facts), sort_keys=False, allow_unicode=True),
        "command": without_secrets_in(facts.run.get("command")),
        "versions": facts.run.get("versions") or {},
        "hardware": hardware(facts),
        "digest": facts.run.get("digest"),
        "show_command": f"srlm-lite show pairs --adapters {shlex.quote(facts.where.name or '.')} "
        "--limit 0 --iteration T",
    }


def _render(page: dict[str, Any], packed: Packed, note: str) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_asset),
    )
    return environment.get_template("report.html.jinja").render(page, packed=packed, gold_note=note)


@cache
def _asset(name: str) -> str:
    folder = resources.files("srlm_lite.report") / "templates"
    return (folder / name).read_text(encoding="utf-8")


def _state(facts: Facts) -> str:
    """How far an unfinished run is."""
    if facts.is_finished:
        return ""
    going = [model for model in facts.models if not model.is_done and model.number is not None]
    text = f"Not finished: {facts.finished} of {facts.planned} iterations are done"
    if going:
        stages = ", ".join(going[-1].stages) or "no stage yet"
        place = f"iteration {going[-1].number}" if going[-1].number else "the anchor"
        text += f"; of {place}: {stages}"
    return text + ". Run the report again later for the rest."


Cell = Callable[[ModelFacts], str]
_HYPHEN = "\N{NON-BREAKING HYPHEN}"


def _columns(facts: Facts) -> list[tuple[str, Cell]]:
    """Columns of the table of models: a name, and the cell of a model."""

    def judged(one: JudgeFigure) -> Cell:
        return lambda model: number(one.of(model.judge))

    columns: list[tuple[str, Cell]] = []
    if facts.gold_name:
        columns += [("gold", lambda m: _with_bounds(m.gold))]
        columns += [("gold, greedy", lambda m: _with_bounds(m.greedy_gold))]
    if several := next((m.policy["best_of"]["n"] for m in facts.models if m.best_of_gold), None):
        name = f"gold, best of {several} by its judge"
        columns += [(name, lambda m: _with_bounds(m.best_of_gold))]
    columns += [
        *((one.label.replace("-", _HYPHEN), judged(one)) for one in JUDGE_FIGURES),
        *(
            (label, lambda m, key=key: number(m.judge.get(key)))
            for key, label in form_in(facts.settings).figures.items()
            if any(key in model.judge for model in facts.models)
        ),
        ("characters", lambda m: number(m.policy.get("mean_length_chars"), 0)),
        ("cut off", lambda m: number(m.policy.get("truncated_rate"))),
        *([] if facts.words.why_no_pairs else [("pairs", _pairs)]),
        ("time", lambda m: duration(m.seconds) if m.stages else ""),
    ]
    return columns


def _pairs(model: ModelFacts) -> str:
    return f"{len(model.iteration.pairs):,}" if model.iteration else ""


def _with_bounds(estimate: Estimate | None, digits: int = 2) -> str:
    if estimate is None:
        return ""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.{digits}f}"
    ends = f"{estimate.low:.{digits}f} to {estimate.high:.{digits}f}"
    return f"{estimate.value:.{digits}f} ({ends})"


def _duel(duel: Duel) -> tuple[str, ...]:
    """A row of the table of head to heads."""
    result = duel.result
    counts = [str((result.get(key) or {}).get("count", "")) for key in ("wins", "ties", "losses")]
    gold = ((result.get("gold") or {}).get("win_rate") or {}).get("value")
    return (
        f"{duel.model} against {duel.baseline}",
        duel.judge,
        str(result.get("source", "")),
        " / ".join(counts),
        _with_bounds(duel.win_rate, 1),
        "lengths do not tell"
        if result.get("lengths_do_not_tell")
        else _with_bounds(duel.length_controlled, 1),
        number(gold, 1),
    )


def _controls(facts: Facts) -> dict[str, Any] | None:
    """What stands beside the run's controls; None where none was named."""
    if not facts.controls:
        return None
    found = comparisons(facts)
    told = [one.text for one in found]
    return {"verdict": verdict(found), "told": told, "columns": COLUMNS, "rows": rows(facts)}


def _others(model: ModelFacts) -> list[tuple[str, str, str]]:
    """What an evaluation has beside the judge's and the policy's figures."""
    found: list[tuple[str, str, str]] = []

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, below in value.items():
                walk(f"{name}, {key}", below)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((model.name, name.replace("_", " "), f"{value:.4g}"))

    for key, value in model.evaluation.items():
        if key not in ("judge", "policy"):
            walk(key, value)
    return [*_read(model), *found]


def _read(model: ModelFacts) -> Iterator[tuple[str, str, str]]:
    """What the anchor began from: how the base reads its data, and the losses of its training."""
    for what in KINDS:
        if measured := model.stages.get("base", {}).get(what):
            mixed = measured["shuffled"]["bits_per_byte"]
            yield ("base", f"bits a byte of {what}", f"{measured['bits_per_byte']:.4g}")
            yield ("base", f"bits a byte of {what}, letters shuffled", f"{mixed:.4g}")
    training = model.stages.get("anchor", {})
    if "last_loss" in training and model.number == 0:
        yield (model.name, "first loss, nats a token", f"{first_loss(training):.4g}")
        yield (model.name, "last loss, nats a token", f"{training['last_loss']:.4g}")


def _key_settings(facts: Facts) -> list[tuple[str, str]]:
    settings, found = used_settings(facts), []
    kind, unused, own = METHODS.get(facts.method), set[str](), dict[str, str]()
    if kind is not None:
        unread = kind.unread(own_settings(kind, facts.settings))
        unused = {*kind.unshown, *(name for name in unread if not unread[name])}
        own = {f"{kind.section}.{key}": name for key, name in kind.labels.items()}
    form = form_in(facts.settings)
    if form.name == DEFAULT_FORM:
        unused.add("judge.form")
    else:
        unused |= set(form.unshown)
        own |= {f"{form.section}.{key}": name for key, name in form.labels.items()}
    if facts.words.why_no_votes:
        unused.add("judge.votes")
        if (facts.settings.get("pairing") or {}).get("source") == "judge":
            unused.add("pairing.source")  # there is none whose order it could be
    for key, name in (*KEY_SETTINGS, *own.items()):
        if key in unused:
            continue
        value: Any = settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            found.append((name, text))
    return found
