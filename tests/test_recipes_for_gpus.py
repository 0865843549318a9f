"""The recipes for bases of today: their templates, and a tiny base of each family through them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from commands import Cli
from driving import iterate, stages
from families import build_family
from test_chat_templates import FAMILIES as MARKS
from test_chat_templates import tokenizer_of, trl_templates

from srlm_lite.model.chat import ChatFormat
from srlm_lite.planning.machine import plan_for
from srlm_lite.planning.plan import parse_gpus
from srlm_lite.recipe import load_recipe
from srlm_lite.run.files import read_jsonl
from srlm_lite.shipped import recipes_dir

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "'[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content|trim + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
SMOLLM3 = (
    "{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}"
    "{{- '<|im_start|>system\n## Metadata\n\nToday Date: ' + strftime_now('%d %B %Y') }}"
    "{{- '\nReasoning Mode: ' + ('/think' if enable_thinking else '/no_think') + '<|im_end|>\n' }}"
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{%- if enable_thinking -%}"
    "{{ '<|im_start|>assistant\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}{%- else -%}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}"
    "{%- endif -%}{%- else -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if not enable_thinking -%}{{ '<think>\n\n</think>\n' }}{%- endif -%}{%- endif -%}"
)
"""What the templates of Mistral-7B-Instruct-v0.3 and SmolLM3-3B render, of system blocks and tools
only what a question and a reply meet. TRL ships those of the other two."""

RECIPES = {
    "qwen3-8b": ("qwen3", "qwen3"),
    "gemma3-4b": ("gemma3", "gemma"),
    "mistral-7b": ("mistral", "llava"),
    "smollm3-3b": ("smollm3", "qwen"),
}
"""Each recipe's family in `families.py`, and whose marks its tokenizer has."""


def tokenizer_for(recipe: str) -> Any:
    family, marks = RECIPES[recipe]
    template = {"mistral": MISTRAL, "smollm3": SMOLLM3}.get(family)
    made = tokenizer_of(marks, template or trl_templates()[family])
    if made.bos_token is None:
        made.bos_token = made.eos_token
    made.pad_token = made.eos_token
    return made


def test_marks_are_known_for_every_recipe() -> None:
    assert all(any(marks.startswith(key) for key in MARKS) for _, marks in RECIPES.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_reply_is_learned_where_its_recipe_samples_it(recipe: str) -> None:
    base, tokenizer = load_recipe(recipe).base, tokenizer_for(recipe)
    chat = ChatFormat(tokenizer, settings=base.chat_template_kwargs)
    for reply in ("Yes.", "One.\n\n  * two\n\tthree", "Score: 4"):
        target = chat.target_ids(reply)
        assert chat.decode(target) == reply
        spoken = tokenizer.decode(chat.prompt_ids("What is it?") + target)
        # No thought is open where a reply is sampled, and none is part of what is learned.
        assert "<think>" not in tokenizer.decode(target)
        whole = chat.render(
            [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": reply}],
            generation=False,
        )
        assert tokenizer.decode(whole).startswith(spoken)


def test_the_readme_says_what_a_plan_of_each_says() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    rows = re.findall(r"\| `([\w.-]+)` \| .* \| one (\d+) GB GPU \(([\d.]+) GB\)", text)
    assert {name for name, *_ in rows} >= {*RECIPES, "llama3.1-8b", "llama2-7b", "llama2-70b"}
    for name, gpu, said in rows:
        plan = plan_for(load_recipe(name), parse_gpus(f"{gpu}GB"))
        assert f"{plan.peak / 1e9:.1f}" == said, name
        assert all(plan.fits(phase) for phase in plan.phases), name


@pytest.mark.parametrize(
    "recipe",
    [
        name if name in ("qwen3-8b", "gemma3-4b") else pytest.param(name, marks=pytest.mark.slow)
        for name in RECIPES
    ],
)
def test_a_tiny_base_of_the_family_goes_through_the_recipe(
    recipe: str, cli: Cli, tmp_path: Path
) -> None:
    tokenizer = tokenizer_for(recipe)
    base = build_family(RECIPES[recipe][0], tmp_path / "bases", tokenizer)
    settings = (
        f"data.dir={recipes_dir() / 'toy' / 'data'}",
        "judge.rubric=toy",
        "anchor.eft_targets=given",
        "prompts.source=file",
    )
    done = iterate(cli, base, tmp_path / "run", settings, recipe=recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    made = stages(tmp_path / "run")
    assert made["delta"]["step0_loss"] == pytest.approx(math.log(2), abs=1e-3)
    answers = read_jsonl(tmp_path / "run" / "iter_001" / "candidates.jsonl")
    assert len(answers) == 4 and not any("<think>" in row["text"] for row in answers)
    out = tmp_path / "merged"
    done = cli("export", "--adapters", tmp_path / "run", "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
