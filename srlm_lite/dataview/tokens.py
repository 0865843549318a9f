"""Lengths in the tokens of a base, counted as a run on it counts them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from srlm_lite.dataview.rows import DataFile, DataRow
from srlm_lite.engines import kind_of
from srlm_lite.judging import load_rubric
from srlm_lite.recipe import Recipe

if TYPE_CHECKING:
    from srlm_lite.model.chat import ChatFormat


class RecipeTokens:
    """Counts for a recipe: its base's tokenizer and template, its window, what it writes.

    Raises:
        UserError: The tokenizer is not to be had, or cannot be spoken to.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.window = recipe.base.window
        self._chat = _chat(recipe)
        self.thinks = self._chat.thinks
        self._rubric = load_rubric(recipe.judge.rubric)
        thought = recipe.rollout.max_thought_tokens if self._chat.thinks else 0
        self._answer = recipe.rollout.max_new_tokens + thought
        self._judgement = recipe.judge.max_new_tokens + thought
        self._judged_here = not kind_of(recipe, "judge").remote
        self._targets = recipe.anchor.eft_targets

    def prompt(self, row: DataRow) -> int:
        """See `Tokens.prompt`."""
        return len(self._chat.policy_ids(row))

    def reply(self, row: DataRow) -> int:
        """See `Tokens.reply`."""
        return len(self._chat.target_ids(row.response or ""))

    def whole(self, file: DataFile, row: DataRow, prompt: int, reply: int) -> int:
        """See `Tokens.whole`: an answer is learned behind its prompt, a prompt is answered, a
        ranked reply stands in the judge's question, which is answered or learned with its target.
        """
        if file.kind == "answers":
            return prompt + reply
        if file.kind == "prompts":
            return prompt + self._answer
        if file.held_out and not self._judged_here:  # a server has a window of its own
            return 0
        question = self._rubric.render(prompt=row.prompt, response=row.response or "")
        return len(self._chat.prompt_ids(question)) + self._target(file, row)

    def _target(self, file: DataFile, row: DataRow) -> int:
        """What is written behind the judge's question, or learned."""
        if file.held_out or self._targets in ("self", "disturbed"):
            return self._judgement
        text = row.target if self._targets == "given" else f"Score: {self._rubric.max:g}"
        return len(self._chat.target_ids(text or ""))


def _chat(recipe: Recipe) -> ChatFormat:
    from srlm_lite.model.base import tokenizer_of
    from srlm_lite.model.chat import ChatFormat

    section = recipe.base
    return ChatFormat(
        tokenizer_of(section),
        template=section.chat_template,
        settings=section.chat_template_kwargs,
        system=section.system,
    )
