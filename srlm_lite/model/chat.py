"""Conversations as token ids: one template, rendered once, that content cannot break out of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from srlm_lite.conversation import Answerable, Asked, messages_of, with_system
from srlm_lite.errors import UserError
from srlm_lite.model.base import LoadedBase
from srlm_lite.model.template import REPLY, USER, WHERE, Message, Template, is_control
from srlm_lite.shipped import CHAT_TEMPLATES, shipped_text


@dataclass(frozen=True, slots=True)
class ReplyParts:
    """A reply taken apart."""

    thought: str | None
    """None: it has none."""
    answer: str | None
    """None: a thought has begun and never closes."""


class ChatFormat:
    """How a base is spoken to.

    Training and sampling both see `policy_ids(prompt) + target_ids(reply)`, or with a judge's
    question `prompt_ids(question) + target_ids(reply)`, split at the same place, so a reply is
    learned with the very ids after which it will be sampled.

    Text of users and candidates cannot end its own turn: where it spells a special token, or in
    system and user turns a mark that the template writes around turns and thoughts, or an added
    token that could be one (`is_control`), a space is put after the first character
    (`< |im_end|>`). All other text stays as it is.
    """

    template: str
    """Jinja source in use."""
    system: str | None
    """The recipe's system message, before every prompt that has none of its own."""
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
        settings: Mapping[str, Any] | None = None,
        system: str | None = None,
        stop_ids: Iterable[int] = (),
    ) -> None:
        """Learn the format from the template by rendering it, and prove it.

        Args:
            tokenizer: Of the base; it is not changed.
            template: Name of a shipped template or a path; None takes the tokenizer's own.
            settings: Variables for the template, `base.chat_template_kwargs`.
            system: What the policy is told before its prompts, `base.system`.
            stop_ids: Ends of text known from elsewhere, such as the generation config.

        Raises:
            UserError: There is no template, it fails, nothing ends a reply, or a reply could not be
                learned as it is sampled.
        """
        tokens: Any = tokenizer
        self._tokenizer = tokens
        self.system = system
        self._proven: set[tuple[str, ...]] = set()
        self.template = self._template(template)
        self._bos_id = self._own_bos() if template is not None else None
        ending = {int(i) for i in stop_ids}
        if tokens.eos_token_id is not None:
            ending.add(int(tokens.eos_token_id))
        added = tokens.added_tokens_decoder
        special = {str(token) for token in added.values() if token.special}
        special |= {*tokens.all_special_tokens, *map(tokens.convert_ids_to_tokens, ending)}
        controls = special | {text for text in map(str, added.values()) if is_control(text)}
        self._special = _alternation(special)
        self._jinja = Template(tokens, self.template, settings or {})
        self._frame = frame = self._jinja.learn(_alternation(controls))
        self._turns = _alternation(controls, words=self._jinja.marks(frame.thought))
        self._context_ids = self._encode(frame.context)
        number = {token: int(tokens.convert_tokens_to_ids(token)) for token in special}
        marks = "\n".join((frame.before, *frame.thought)) if frame.thought else ""
        self._visible = frozenset(at for token, at in number.items() if token in marks)
        self._hidden = frozenset(number.values()) - self._visible
        self.end_id = int(tokens.convert_tokens_to_ids(frame.end))
        # What ends a thought ends no reply, even where generation stops at it for want of tools.
        self.stop_ids = tuple(sorted(ending - self._visible | {self.end_id}))
        self.pad_id = self.end_id if tokens.pad_token_id is None else int(tokens.pad_token_id)
        self._prove()

    @classmethod
    def of(
        cls,
        base: LoadedBase,
        *,
        template: str | None = None,
        settings: Mapping[str, Any] | None = None,
        system: str | None = None,
    ) -> Self:
        """The format of a loaded base.

        Args:
            template: The recipe's `base.chat_template`.
            settings: The recipe's `base.chat_template_kwargs`.
            system: The recipe's `base.system`.
        """
        return cls(
            base.tokenizer,
            template=template,
            settings=settings,
            system=system,
            stop_ids=base.eos_ids,
        )

    @property
    def thinks(self) -> bool:
        """Whether replies may hold a thought; if not, all of a reply is its answer."""
        return self._frame.thought is not None

    @property
    def thought_close(self) -> str:
        """What in a reply ends its thought; empty where the model does not think."""
        return "" if self._frame.thought is None else self._frame.thought.marks[1]

    def split(self, reply: str) -> ReplyParts:
        """A reply's thought and its answer, without the marks and space around them."""
        thought = self._frame.thought
        if thought is None:
            return ReplyParts(None, reply)
        opening, closing = thought.marks
        text = reply.strip()
        if not text.startswith(opening) and not (self._frame.opened and closing in text):
            return ReplyParts(None, reply)
        inner, closed, answer = text.removeprefix(opening).partition(closing)
        return ReplyParts(inner.strip(), answer.strip() if closed else None)

    def render(self, messages: Sequence[Message], *, generation: bool) -> list[int]:
        """Ids of a conversation; with `generation`, up to where the assistant's reply starts.

        A reply stands in it as the template writes past replies, which may leave out a thought.
        """
        text = self._jinja.render([self._safe(one) for one in messages], generation=generation)
        return self._whole_ids(text + self._frame.header if generation else text)

    def _whole_ids(self, text: str) -> list[int]:
        ids = self._encode(text)
        if self._bos_id is None or ids[:1] == [self._bos_id]:
            return ids
        return [self._bos_id, *ids]

    def prompt_ids(self, question: Asked) -> list[int]:
        """Ids after which the reply to a question starts, as it stands: a judge's, for one.

        What the policy is to answer has the recipe's system message before it: `policy_ids`.

        Raises:
            UserError: The template does not write all of its turns.
        """
        messages = messages_of(question)
        if len(messages) == 1:
            return self.render(messages, generation=True)
        return self._ids_of_turns(messages)

    def policy_ids(self, row: Answerable) -> list[int]:
        """Ids after which the reply to a prompt starts: its turns, under the system message.

        Raises:
            UserError: The template does not write all of them.
        """
        return self.prompt_ids(self.policy_turns(row))

    def policy_turns(self, row: Answerable) -> list[Message]:
        """The messages behind `policy_ids`, for a server that has a template of its own."""
        return messages_of(with_system(row.asked, self.system))

    def target_ids(self, reply: str) -> list[int]:
        """Ids of a reply as the model is to write it, up to and including its end of turn.

        Whitespace around the reply is not part of it. `prompt_ids(u) + target_ids(r)` begins the
        rendered conversation of the two; what a template writes after the end of turn is left out.
        Where the template opens a thought and drops it from past turns, the target is what follows
        the prompt: the thought, what closes it, and the answer.
        """
        frame = self._frame
        text = self._target(reply.strip()) + frame.after + frame.end
        ids = self._encode(frame.context + text)
        # In context, because SentencePiece tokenizers encode the start of a text differently.
        if ids[: len(self._context_ids)] == self._context_ids:
            return ids[len(self._context_ids) :]
        alone = self._encode(text)
        for other in (alone, self._encode(text.removeprefix(" "))):  # they add that space
            if self._spell_all([*self._context_ids, *other]) == self._spell_all(ids):
                return other
        return alone

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a reply: up to the first stop id, without special tokens, stripped.

        A thought stands in it with its marks, the one included that the prompt has opened. An empty
        thought is left out if it is written as the template writes it.
        """
        end = next((at for at, token in enumerate(ids) if token in self.stop_ids), len(ids))
        if not self.thinks:
            return self.spell(ids[:end]).strip()
        text = self._frame.opened + self._spell_with_marks(ids[:end])
        without = (self._frame.opened + self._frame.before).lstrip()
        if without and text.lstrip().startswith(without):
            answer = text.lstrip().removeprefix(without).strip()
            if self.split(answer).thought is None:
                return answer
        return text.strip()

    def spell(self, ids: Sequence[int]) -> str:
        """Text of any ids as it is, without special tokens."""
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _spell_with_marks(self, ids: Sequence[int]) -> str:
        """The same with the special tokens that marks of thoughts consist of."""
        if not self.thinks or self._visible.isdisjoint(ids):
            return self.spell(ids)
        return self._spell_all([token for token in ids if token not in self._hidden])

    def _spell_all(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _target(self, reply: str) -> str:
        """What the model writes behind the context, up to the end of the answer."""
        frame, thought = self._frame, self._frame.thought
        if thought is None or self.split(reply).thought is None:
            return frame.before + self._without(self._special, reply)
        opening, closing = thought.marks
        if frame.opened:
            lead = ""
            if reply.startswith(frame.opened):
                reply = reply.removeprefix(frame.opened)
            elif reply.startswith(opening):
                reply = reply.removeprefix(opening).lstrip()
        else:
            space = thought.open[: -len(thought.open.lstrip())]
            lead, reply = space + opening, reply.removeprefix(opening)
        inner, closed, answer = reply.partition(closing)
        return (
            lead
            + self._without(self._special, inner)
            + closed
            + self._without(self._special, answer)
        )

    @property
    def portable_template(self) -> str:
        """A template with which `apply_chat_template` alone gives the ids of `render`.

        The BOS that the tokenizer adds, and the date that stands in for today's, are part of it.
        """
        adds_bos = self._bos_id is not None and self._context_ids[:1] != [self._bos_id]
        return self._jinja.portable(self._frame, bos=adds_bos)

    def neutralise(self, text: str) -> str:
        """The text as it enters a user turn: unable to end it."""
        return self._without(self._turns, text)

    def _template(self, name: str | None) -> str:
        if name is not None:
            return shipped_text(CHAT_TEMPLATES, name=name)
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

    def _prove(self) -> None:
        """Hold the format to its promise on replies of each kind.

        Raises:
            UserError: One would be learned otherwise than it is sampled or rendered.
        """
        frame = self._frame
        drops = not self._jinja.render([USER, REPLY], generation=False).startswith(frame.context)
        for answer in ("Yes.", "One.\n\n  Two: <b>three</b>\nFour"):
            replies = [answer]
            if frame.thought is not None:
                replies.append(
                    f"{frame.thought.open.lstrip()}Well.\nSo{frame.thought.close}{answer}"
                )
            for reply in replies:
                whole = self._jinja.render(
                    [USER, self._safe({"role": "assistant", "content": reply})], generation=False
                )
                told = frame.context + self._target(reply) + frame.after
                if drops or (reply != answer and "Well." not in whole):
                    told = answer + frame.after
                target = self.target_ids(reply)
                spellable = self.spell(self._encode(answer)).strip() == answer
                back = self.decode(target) if spellable else reply
                if told not in whole or back != reply or self.target_ids(back) != target:
                    raise _refused()
        portable = self.portable_template
        if portable != self.template:
            conversation = [USER, REPLY, USER]
            ours = self._jinja.render([*map(self._safe, conversation)], generation=True)
            theirs = self._jinja.render(conversation, generation=True, source=portable, settings={})
            bos = self._tokenizer.bos_token or ""
            if theirs.removeprefix(bos) != (ours + frame.header).removeprefix(bos):
                raise UserError(
                    "the chat template cannot be exported with what it is given here, because it "
                    "writes something else when its variables are set in itself",
                    where="base.chat_template_kwargs",
                )

    def _ids_of_turns(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation that is to be answered, all of whose turns stand in it.

        A template may refuse a system message, or leave it or an earlier turn out without a word.
        """
        roles = tuple(one["role"] for one in messages)
        if roles not in self._proven:
            self._written([{"role": r, "content": _TURN.format(i)} for i, r in enumerate(roles)])
            self._proven.add(roles)
        return self._whole_ids(self._written(messages) + self._frame.header)

    def _written(self, messages: Sequence[Message]) -> str:
        """The text up to where the reply starts.

        Raises:
            UserError: Of one of the turns it does not hold what is said, or not in its place. The
                system message may stand anywhere before what the user says last.
        """
        try:
            text = self._jinja.render([self._safe(one) for one in messages], generation=True)
        except UserError as error:
            raise _not_written(messages, error.what) from error
        system, end = -1, 0
        for one in messages:
            said = self._said(one)
            at = text.find(said, 0 if one["role"] == "system" else end)
            if not said and one["content"].strip():
                raise _not_written(messages, "an earlier reply is a thought without an answer")
            if at < 0:
                raise _not_written(messages, f"it does not write {_WHOSE[one['role']]} as it is")
            if one["role"] == "system":
                system = at
            else:
                end = at + len(said)
        if system > text.rfind(said):  # a short turn may stand by chance in what is around turns
            raise _not_written(messages, "it writes the system message behind what the user says")
        return text

    def _said(self, message: Message) -> str:
        """What of a message a template writes: of a reply with a thought, the answer."""
        content = message["content"]
        if message["role"] != "assistant":
            return self.neutralise(content).strip()
        return self._without(self._special, self.split(content).answer or "").strip()

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _safe(self, message: Message) -> dict[str, str]:
        if message["role"] != "assistant":
            return {**message, "content": self.neutralise(message["content"])}
        frame, content = self._frame, message["content"].strip()
        reply = self.split(content)
        end = "" if frame.ends_turns else frame.end
        if reply.thought is None:
            return {**message, "content": self._without(self._special, content) + end}
        answer = self._without(self._special, reply.answer or "") + end
        thought = self._without(self._special, reply.thought)
        if frame.thought_key is not None:
            return {**message, frame.thought_key: thought, "content": answer}
        opening, closing = frame.thought or ("", "")
        return {**message, "content": opening.lstrip() + thought + closing + answer}

    @staticmethod
    def _without(pattern: re.Pattern[str], text: str) -> str:
        # Again until nothing is left: taking one apart may put another together.
        while pattern.search(text):
            text = pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return text


_TURN = "Turn {} stands.\n\n  Two: <b>three</b>\nFour"
"""What is said in turns that show how a template writes them."""

_WHOSE = {
    "system": "the system message",
    "user": "what the user says",
    "assistant": "an earlier reply",
}


def _not_written(messages: Sequence[Message], why: str) -> UserError:
    """Why a conversation cannot be put to the base."""
    system = messages[0]["role"] == "system"
    what = "a system message" if system else "earlier turns"
    if system and len(messages) > 2:
        what += " and earlier turns"
    return UserError(
        f"the base cannot be given {what}: {why.removeprefix('the chat template fails: ')}",
        where=WHERE,
        way_out="Name another template (plain, chatml, llama-2, or a .jinja file), or leave such "
        "messages out (base.system, `messages` in the data)",
    )


def _refused() -> UserError:
    return UserError(
        "the chat template or the tokenizer rewrites replies, so they could not be learned as they "
        "are sampled",
        where=WHERE,
        way_out="Name another template (plain, chatml, llama-2, or a .jinja file)",
    )


def _alternation(strings: Iterable[str], *, words: Iterable[str] = ()) -> re.Pattern[str]:
    """Any of the strings, the longest first; without any, a pattern that never matches.

    A single character cannot be taken apart and is no turn mark, so it is left out.

    Args:
        words: More of them, which are not found in the middle of a word.
    """
    found = {string.strip(): re.escape(string.strip()) for string in words}
    found = {string: rf"\b{at}" if string[0].isalnum() else at for string, at in found.items()}
    found |= {string.strip(): re.escape(string.strip()) for string in strings}
    ordered = sorted((s for s in found if len(s) > 1), key=lambda s: (-len(s), s))
    return re.compile("|".join(map(found.__getitem__, ordered)) or r"(?!)")
