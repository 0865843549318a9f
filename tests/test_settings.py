"""Marks on settings: each is found, and the settings that they are on are named here once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from srlm_lite.forms import FORMS, sections_of_other_forms
from srlm_lite.methods import METHODS, sections_of_others
from srlm_lite.recipe import Recipe, paths_in
from srlm_lite.settings import (
    Before,
    DecidesNothing,
    FormName,
    IsPath,
    Section,
    Shared,
    marked,
    sections_of,
)
from srlm_lite.shipped import CHAT_TEMPLATES, PRINCIPLES, RUBRICS, TEMPLATES


def test_settings_that_may_be_paths() -> None:
    assert dict(marked(Shared, IsPath)) == {
        "base.name": IsPath(by_content=False),
        "base.chat_template": IsPath(shipped=CHAT_TEMPLATES),
        "data.dir": IsPath(),
        "data.extra": IsPath(),
        "data.ranked": IsPath(),
        "anchor.disturb_template": IsPath(shipped=TEMPLATES),
        "anchor.init": IsPath(words=("base",)),
        "prompts.file": IsPath(),
        "judge.rubric": IsPath(shipped=RUBRICS),
        "evaluate.ifeval": IsPath(),
        "evaluate.tasks_dir": IsPath(),
        "compare.template": IsPath(shipped=TEMPLATES),
        "mt_bench.template": IsPath(shipped=TEMPLATES),
    }


def test_settings_that_decide_nothing() -> None:
    trainings = ("anchor", "dpo")
    assert {name for name, _ in marked(Shared, DecidesNothing)} == {
        "name",
        "checkpoint_minutes",
        "description",
        "iterations",
        "tracking",
        "compare",
        "mt_bench",
        "evaluate.gate",
        "pairing.min_pairs",
        "openai.key_variable",
        "openai.parallel",
        "openai.timeout_s",
        "openai.retries",
        "rollout.batch_rows",
        "vllm.memory",
        *(f"{section}.micro_batch_size" for section in trainings),
        *(f"{section}.micro_batch_tokens" for section in trainings),
        *(f"{section}.gradient_checkpointing" for section in trainings),
    }


def test_settings_that_came_later() -> None:
    assert {name: mark.value for name, mark in marked(Shared, Before)} == {
        "anchor.disturb_template": "disturb",
        "anchor.micro_batch_tokens": "auto",
        "base.attention": "sdpa",
        "base.chat_template_kwargs": {},
        "base.system": None,
        "dpo.loss": "sigmoid",
        "dpo.micro_batch_tokens": "auto",
        "dpo.target_margin": 0.5,
        "evaluate.best_of": None,
        "judge.adaptive_votes": False,
        "judge.form": "grade",
        "judge.rationale": True,
        "pairing.accumulate": False,
        "pairing.older_order": "keep",
        "pairing.older_steps": "more",
        "pairing.weight": "equal",
        "rollout.max_thought_tokens": 1024,
        "mt_bench.top_p": None,
    }


def test_marks_on_the_settings_of_methods() -> None:
    """Beside these, a method that comes may have marks on its own."""
    assert (
        dict(marked(Recipe, IsPath)).items()
        >= {
            "dno.teacher": IsPath(words=("server",)),
            "dno.template": IsPath(shipped=TEMPLATES),
            "meta_rewarding.template": IsPath(shipped=TEMPLATES),
            "rlaif.principles": IsPath(shipped=PRINCIPLES),
        }.items()
    )
    assert {name for name, _ in marked(Recipe, DecidesNothing)} >= {
        f"{section}.{key}"
        for section in ("rlaif.sft", "rlhf.reward")
        for key in ("micro_batch_size", "gradient_checkpointing")
    }


def test_sections_that_one_method_alone_reads() -> None:
    own = {kind.section for kind in METHODS.values() if kind.section}
    of_forms = {kind.section for kind in FORMS.values() if kind.section}
    shared = list(Shared.model_fields)
    assert list(Recipe.model_fields)[: len(shared)] == shared
    assert set(Recipe.model_fields) - set(shared) == own | of_forms
    assert (own, of_forms) == (sections_of_others(""), sections_of_other_forms(""))
    assert set(FORMS) == set(get_args(FormName))
    assert own - sections_of_others("dpo") == {"offline"}


def marks_in(hint: Any) -> list[Any]:
    """The marks anywhere in a type hint."""
    own = [mark for mark in getattr(hint, "__metadata__", ()) if is_mark(mark)]
    return own + [mark for part in get_args(hint) for mark in marks_in(part)]


def is_mark(thing: Any) -> bool:
    return isinstance(thing, Before | DecidesNothing | IsPath)


def all_sections(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for below in sections_of(section).values():
        yield from all_sections(below)


def test_no_mark_is_where_nobody_looks() -> None:
    """One on a part of a setting, as on `str` in `str | None`, would count for nothing."""
    for section in all_sections(Recipe):
        hints = get_type_hints(section, include_extras=True)
        for name, field in section.model_fields.items():
            assert marks_in(hints[name]) == [mark for mark in field.metadata if is_mark(mark)]


def test_paths_are_found_in_what_is_half_a_recipe() -> None:
    raw = {"data": {"dir": "here"}, "judge": 3, "prompts": None, "base": {"name": 7}, "rlaif": {}}
    assert list(paths_in(raw)) == [({"dir": "here"}, "dir", IsPath())]
