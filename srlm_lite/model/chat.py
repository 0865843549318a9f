"""Conversations as token ids: one template, rendered once, that content cannot break out of."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from srlm_lite.config import shipped_text
from srlm_lite.errors import UserError
from srlm_lite.model.base import LoadedBase

Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`."""

_MARK = "qzjxq"
_STRFTIME = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_TAG = re.compile(r"\[/?[A-Z_]+\]|<</?[A-Z_]+>>|<\|[^\s|<>]+\|>|</?[a-z_]+>")
"""What template authors write as turn marks where they have no special tokens."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """What a template writes around a reply, learned by rendering one."""

    context: str
    """A conversation up to where the reply starts."""
    before: str
    after: str
    """Between the reply and the end of its turn."""
    end: str
    """The special token that ends the turn."""
    tags: frozenset[str]
    """Turn marks that the template writes, ordinary text included."""


class ChatFormat:
    """How a base is spoken to.

    Training and sampling both see `prompt_ids(user) + target_ids(reply)`, split at the same place,
    so a reply is learned with the very ids after which it will be sampled.

    Text of users and candidates cannot end its own turn: where it spells a special token, or in
    system and user turns a tag that the template writes, a space is put after the first character
    (`< |im_end|>`). All other text stays as it is.
    """

    template: str
    """Jinja source in use."""
    stop_ids: tuple[int, ...]
    """Ids that end a reply, ascending: end of turn and every end of sequence."""
    end_id: int
    """The one of them that ends every target."""
    pad_id: int

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | None = None,
        stop_ids: Iterable[int] = (),
    ) -> None:
        """Learn the format from the template by rendering it once.

        Args:
            tokenizer: Of the base; it is not changed.
            template: Name of a shipped template or a path; None takes the tokenizer's own.
            stop_ids: Ends of text known from elsewhere, such as the generation config.

        Raises:
            UserError: There is no template, it fails, or nothing ends a reply.
        """
        tokens: Any = tokenizer
        self._tokenizer = tokens
        self.template = self._template(template)
        self._bos_id = self._own_bos() if template is not None else None
        ending = {int(i) for i in stop_ids}
        if tokens.eos_token_id is not None:
            ending.add(int(tokens.eos_token_id))
        special = {str(token) for token in tokens.added_tokens_decoder.values() if token.special}
        special |= {*tokens.all_special_tokens, *map(tokens.convert_ids_to_tokens, ending)}
        self._special = _alternation(special)
        self._frame = self._learn_frame()
        self._context_ids = self._encode(self._frame.context)
        self._tags = _alternation(self._frame.tags)
        self.end_id = int(tokens.convert_tokens_to_ids(self._frame.end))
        self.stop_ids = tuple(sorted(ending | {self.end_id}))
        self.pad_id = self.end_id if tokens.pad_token_id is None else int(tokens.pad_token_id)

    @classmethod
    def of(cls, base: LoadedBase, *, template: str | None = None) -> Self:
        """The format of a loaded base; `template` is the recipe's `base.chat_template`."""
        return cls(base.tokenizer, template=template, stop_ids=base.eos_ids)

    def render(self, messages: Sequence[Message], *, generation: bool) -> list[int]:
        """Ids of a conversation; with `generation`, up to where the assistant's reply starts."""
        ids = self._encode(self._text([self._safe(message) for message in messages], generation))
        if self._bos_id is None or ids[:1] == [self._bos_id]:
            return ids
        return [self._bos_id, *ids]

    def prompt_ids(self, user_text: str) -> list[int]:
        """Ids after which the reply to one user message starts."""
        return self.render([{"role": "user", "content": user_text}], generation=True)

    def target_ids(self, reply: str) -> list[int]:
        """Ids of a reply as the model is to write it, up to and including its end of turn.

        Whitespace around the reply is not part of it. `prompt_ids(u) + target_ids(r)` begins the
        rendered conversation of the two; what a template writes after the end of turn is left out.
        """
        frame = self._frame
        text = frame.before + self._without(self._special, reply.strip()) + frame.after + frame.end
        ids = self._encode(frame.context + text)
        # In context, because SentencePiece tokenizers encode the start of a text differently.
        if ids[: len(self._context_ids)] == self._context_ids:
            return ids[len(self._context_ids) :]
        return self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a reply: up to the first stop id, without special tokens, stripped."""
        end = next((at for at, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return self.spell(ids[:end]).strip()

    def spell(self, ids: Sequence[int]) -> str:
        """Text of any ids as it is, without special tokens."""
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    @property
    def portable_template(self) -> str:
        """A template with which `apply_chat_template` alone gives the ids of `render`.

        The BOS that the tokenizer adds, and the date that stands in for today's, are part of it.
        """
        template = _STRFTIME.sub(lambda call: repr(_fixed_date(call[2])), self.template)
        if self._bos_id is None or self._context_ids[:1] == [self._bos_id]:
            return template
        return "{{ bos_token }}" + template

    def neutralise(self, text: str) -> str:
        """The text as it enters a user turn: unable to end it."""
        return self._without(self._tags, self._without(self._special, text))

    def _template(self, name: str | None) -> str:
        if name is not None:
            return shipped_text("chat_templates", ".jinja", name=name)
        try:
            own: str = self._tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(
                "the base has no chat template",
                where="base.chat_template",
                way_out="Name a shipped one (plain, chatml, llama-2) or a .jinja file",
            ) from error
        return own

    def _own_bos(self) -> int | None:
        """The BOS that the tokenizer puts in front of plain text by itself, if it does.

        A template from a recipe serves many bases, so it leaves that to the tokenizer.
        """
        ids = self._tokenizer("x").input_ids
        bos: int | None = self._tokenizer.bos_token_id
        return bos if bos is not None and ids and ids[0] == bos else None

    def _learn_frame(self) -> _Frame:
        user = {"role": "user", "content": _MARK * 2}
        reply = {"role": "assistant", "content": _MARK}
        try:
            context = self._text([user], generation=True)
            whole = self._text([user, reply], generation=False)
        except TemplateError as error:
            raise UserError(
                f"the chat template fails: {error}", where="base.chat_template"
            ) from error
        if _MARK * 2 not in context:
            raise UserError(
                "the chat template leaves out what the user says", where="base.chat_template"
            )
        written = [whole]
        with contextlib.suppress(TemplateError):  # many templates know no system message
            system = {"role": "system", "content": _MARK}
            written.append(self._text([system, user], generation=True))
        turn = whole.removeprefix(context)
        if turn == whole or turn.count(_MARK) != 1:
            # The template rewrites replies, or opens past turns otherwise: go by the opening.
            turn = _MARK
        before, rest = turn.split(_MARK)
        found = self._special.search(rest)
        after, end = (rest[: found.start()], found[0]) if found else ("", self._tokenizer.eos_token)
        if end is None:
            raise UserError(
                "neither the chat template nor the tokenizer says how a reply ends",
                where="base.chat_template",
            )
        tags = frozenset(_TAG.findall("".join(written)))
        return _Frame(context=context, before=before, after=after, end=end, tags=tags)

    def _text(self, messages: Sequence[Message], generation: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=generation,
            chat_template=self.template,
            strftime_now=_fixed_date,
        )
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _safe(self, message: Message) -> dict[str, str]:
        content = message["content"]
        if message["role"] == "assistant":
            content = self._without(self._special, content)
        else:
            content = self.neutralise(content)
        return {**message, "content": content}

    @staticmethod
    def _without(pattern: re.Pattern[str], text: str) -> str:
        # Again until nothing is left: taking one apart may put another together.
        while pattern.search(text):
            text = pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return text


def _alternation(strings: Iterable[str]) -> re.Pattern[str]:
    """Any of the strings, the longest first; of none, a pattern that never matches.

    A single character cannot be taken apart and is no turn mark, so it is left out.
    """
    bare = {string.strip() for string in strings}
    ordered = sorted((s for s in bare if len(s) > 1), key=lambda s: (-len(s), s))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _fixed_date(pattern: str) -> str:
    """Stands in for the clock, so that a template with a date renders alike when a run resumes."""
    return datetime(2024, 7, 26).strftime(pattern)
