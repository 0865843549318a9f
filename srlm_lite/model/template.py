"""A chat template put to use: what it writes around replies and thoughts, found by rendering."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
import jinja2.nodes

from srlm_lite.errors import UserError

Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`."""


class Thought(NamedTuple):
    """What stands before and behind a thought, whitespace included."""

    open: str
    close: str

    @property
    def marks(self) -> tuple[str, str]:
        return self.open.strip(), self.close.strip()


WHERE = "base.chat_template"

_MARK = "qzjxq"
_THOUGHT = "qvwkv"
_THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message under which templates look for its thought."""
_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates let a model think."""
_THOUGHTS = (
    Thought("<think>\n", "\n</think>\n\n"),
    Thought("<thinking>\n", "\n</thinking>\n\n"),
    Thought("<thought>\n", "\n</thought>\n\n"),
    Thought("<reasoning>\n", "\n</reasoning>\n\n"),
    Thought("<seed:think>", "</seed:think>"),
    Thought("◁think▷", "◁/think▷"),
    Thought("[THINK]", "[/THINK]"),
    Thought("<|begin_of_thought|>\n", "\n<|end_of_thought|>\n\n"),
    Thought("<|START_THINKING|>", "<|END_THINKING|>"),
    Thought("<|channel>thought\n", "\n<channel|>"),
)
"""How makers of models begin and end a thought."""
THOUGHT_MARKS = frozenset(mark for thought in _THOUGHTS for mark in thought.marks)
_TAG = re.compile(
    r"\[/?[A-Z_]+\]|<</?[A-Z_]+>>|<[|\uff5c][^\s<>]*>|<[^\s<>|\uff5c]+[|\uff5c]>|</?[a-z_]+>"
)
"""What template authors write as turn marks where they have no special tokens."""
_MARKUP = re.compile(r"</?[a-z]+[0-9]?>|<0x[0-9A-F]{2}>")
"""Tags that text needs, and single bytes."""
_NAME = re.compile(r"[<\[◁|\uff5c](?=.*[^\W\d_]{2}).*[>\]▷|\uff5c]")
_TURN_WORDS = re.compile(r"(?=.*[^\W\d_])(?:[^\w\s].*|.*[^\w\s.!?,;])")
"""A line of letters that begins or ends as no sentence does: `USER:`, `### Response:`."""
_OPENING_TAG = re.compile(r"(<([A-Za-z_:]+)>|\[([A-Z_]+)\])\s*\Z")
_STRFTIME = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_CLOCK = re.compile(r"\bstrftime_now\s*\(")
"""A template asks for the time, in a format that is not written right there."""
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
"""A block that transformers adds to Jinja; it changes nothing of what is written."""
_ENVIRONMENT = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
"""Reads templates, and renders none."""
_SUPPLIED = {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}
"""Variables that a rendering gets without being asked."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template writes around a reply."""

    context: str
    """A conversation up to where the reply is sampled, `header` included."""
    header: str
    """The end of it that the template writes before each reply and not where it prompts for one."""
    opened: str
    """The end of it that has opened a thought; empty where a reply has to open its own."""
    before: str
    """Between the context and a reply without a thought."""
    thought: Thought | None
    """None: the model is not to think. `open` holds `opened`, or what comes behind the context."""
    after: str
    """Between the reply and the end of its turn."""
    end: str
    """The token that ends the turn."""
    ends_turns: bool
    """Whether the template writes that token itself."""
    thought_key: str | None
    """Under which the template looks for a message's thought; None: in the content."""


class Template:
    """A template with its settings and a tokenizer's special tokens.

    Args:
        settings: `base.chat_template_kwargs`.

    Raises:
        UserError: It is no template, or does not read one of the settings.
    """

    def __init__(self, tokenizer: Any, source: str, settings: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self.source = source
        self.settings = dict(settings)
        self._wants_parts = False
        self._variables = self._read_variables()
        self._dated = _with_fixed_date(source)
        for name in settings:
            if name not in self._variables:
                read = ", ".join(sorted(self._variables)) or "none"
                raise UserError(
                    f"the chat template reads no {name}",
                    where="base.chat_template_kwargs",
                    way_out=f"Variables that it reads: {read}",
                )

    def _read_variables(self) -> set[str]:
        try:
            tree = _ENVIRONMENT.parse(_GENERATION.sub("", self.source))
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template fails: {error}", where=WHERE) from error
        read = jinja2.meta.find_undeclared_variables(tree)
        return (
            read - _SUPPLIED - set(self._tokenizer.special_tokens_map) - set(_ENVIRONMENT.globals)
        )

    def render(
        self,
        messages: Sequence[Message],
        *,
        generation: bool,
        source: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation.

        Raises:
            UserError: The template fails on it.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                [self._as_wanted(message) for message in messages] if source is None else messages,
                tokenize=False,
                add_generation_prompt=generation,
                chat_template=self._dated if source is None else source,
                **(self.settings if settings is None else settings),
            )
        except Exception as error:  # a template runs code of its own, which raises what it likes
            raise UserError(f"the chat template fails: {error}", where=WHERE) from error
        return text

    def _as_wanted(self, message: Message) -> dict[str, Any]:
        if self._wants_parts:
            return {**message, "content": [{"type": "text", "text": message["content"]}]}
        return dict(message)

    def learn(self, is_control: re.Pattern[str]) -> Frame:
        """What it writes around replies.

        Args:
            is_control: Finds tokens that can end a turn.

        Raises:
            UserError: It leaves out a side, or what is sampled could not be learned in its place.
        """
        context = self.render([USER], generation=True)
        if USER["content"] not in context:  # it may know content as lists alone, as for images
            self._wants_parts = True
            context = self.render([USER], generation=True)
        if USER["content"] not in context:
            raise UserError("the chat template leaves out what the user says", where=WHERE)
        whole = self.render([USER, REPLY], generation=False)
        base, opened, closes, closed = self._opening(context, whole)
        turn = whole.removeprefix(base)
        if turn == whole or turn.count(_MARK) != 1:
            raise UserError(
                "the chat template writes a reply otherwise than where it asks for one, so a reply "
                "could not be learned where it is sampled",
                where=WHERE,
                way_out="Name another template (plain, chatml, llama-2, or a .jinja file)",
            )
        before, rest = turn.split(_MARK)
        thought: Thought | None = None
        header = ""
        if opened:
            thought = self._opened_thought(context, opened, closes, before)
            before = before.removeprefix(opened)
            if closes not in before or not whole.startswith(context):
                before = thought.close
        elif closed:  # the prompt holds an empty block; past turns may have another or none
            block = context[len(base) :]
            before = before.removeprefix(block).rpartition(closes)[2]
            before = "" if block.rstrip().endswith(before.strip()) and before.strip() else before
        elif self._may_think():
            thought = self._own_thought(context, before)
        if thought is None and before.strip():
            header, before = before, ""
        found = is_control.search(rest)
        after, end = (rest[: found.start()], found[0]) if found else ("", self._tokenizer.eos_token)
        if end is None:
            raise UserError(
                "neither the chat template nor the tokenizer says how a reply ends", where=WHERE
            )
        return Frame(
            context=context + header,
            header=header,
            opened=opened,
            before=before,
            thought=thought,
            after=after,
            end=end,
            ends_turns=found is not None,
            thought_key=None if thought is None else self._thought_key(),
        )

    def _opening(self, context: str, whole: str) -> tuple[str, str, str, bool]:
        """The context before a block of thought, what opens it, its closing mark, if it is closed.

        The block is what a template may leave out where it writes past turns.
        """
        start = context.rindex(USER["content"]) + len(USER["content"])
        tail = context[start:]
        for open_, close in (known.marks for known in self._known()):
            at, end = tail.rfind(open_), tail.rfind(close)
            if end > at and tail.rstrip().endswith(close):  # it need not say what opens the block
                return context[: start + (at if at >= 0 else end)], "", close, True
            if at > end and tail.rstrip().endswith(open_):
                return context[: start + at], tail[at:], close, False
        tag = _OPENING_TAG.search(tail)
        if tag is not None and not whole.removeprefix(context).lstrip().startswith(_MARK):
            close = f"</{tag[2]}>" if tag[2] else f"[/{tag[3]}]"
            if close in self.source:
                return context[: start + tag.start()], tail[tag.start() :], close, False
        return context, "", "", False

    def _opened_thought(self, context: str, opened: str, close: str, before: str) -> Thought:
        usual = next((mark for mark in _THOUGHTS if mark.open == opened), None)
        usual = usual or Thought(opened, f"\n{close}\n\n" if opened.endswith("\n") else close)
        for around in self._around_thoughts(context, [usual]):
            if not around.open.strip():
                return Thought(opened, around.close)
        if before.strip().startswith(close):  # of a reply without a thought
            return Thought(opened, before)
        return usual

    def _own_thought(self, context: str, before: str) -> Thought | None:
        """How a reply opens and closes a thought by itself; None: it knows none.

        Args:
            before: What stands before a reply without a thought.
        """
        known = self._known()
        for around in self._around_thoughts(context, known):
            if around.open.strip():
                return around
        # A block that stands before a reply with a thought as well is no place for one.
        return known[0] if known and known[0].marks[1] not in before else None

    def _around_thoughts(self, context: str, known: Iterable[Thought]) -> Iterator[Thought]:
        """What stands around the thought of a reply that has one, by each way to say it."""
        for key in _THOUGHT_KEYS:
            yield from self._around({**REPLY, key: _THOUGHT}, context)
        for thought in known:
            content = thought.open + _THOUGHT + thought.close + _MARK
            for around in self._around({**REPLY, "content": content}, context):
                if around.open.count(thought.marks[0]) <= 1:  # not one in another
                    yield around

    def _around(self, reply: Message, context: str) -> Iterator[Thought]:
        try:
            whole = self.render([USER, reply], generation=False)
        except UserError:
            return
        turn = whole.removeprefix(context)
        if turn == whole or (turn.count(_THOUGHT), turn.count(_MARK)) != (1, 1):
            return
        open_, rest = turn.split(_THOUGHT)
        close, told, _ = rest.partition(_MARK)
        if told and close.strip():
            yield Thought(open_, close)

    def _known(self) -> list[Thought]:
        """The ways to think of which the template knows a mark."""
        return [known for known in _THOUGHTS if any(mark in self.source for mark in known.marks)]

    def _may_think(self) -> bool:
        """Whether no switch of the template keeps the model from thinking."""
        for name in self._variables.intersection(_SWITCHES):
            with suppress(UserError):
                on, off = (
                    self.render([USER], generation=True, settings={**self.settings, name: value})
                    for value in (True, False)
                )
                if on != off:
                    return self.render([USER], generation=True) != off
        return True

    def _thought_key(self) -> str | None:
        for key in _THOUGHT_KEYS:
            with suppress(UserError):
                if _THOUGHT in self.render([USER, {**REPLY, key: _THOUGHT}], generation=False):
                    return key
        return None

    def marks(self, thought: Thought | None) -> set[str]:
        """What it writes around turns that ordinary text can spell."""
        written = [self.render([USER, REPLY], generation=False)]
        with suppress(UserError):  # many templates know no system message
            system = {"role": "system", "content": _MARK}
            written.append(self.render([system, USER], generation=True))
        found = set(_TAG.findall("".join(written)))
        found |= {tag for tag in _TAG.findall(self.source) if not _MARKUP.fullmatch(tag)}
        found |= {mark for known in self._known() for mark in known.marks}
        if thought is not None and _OPENING_TAG.fullmatch(thought.open):
            found |= {*thought.marks}
        with suppress(UserError):
            turns = self.render([USER, REPLY, USER, REPLY], generation=False)
            for piece in re.split(f"(?:{_MARK})+", turns)[1:]:  # the first is the system's
                lines = (line.strip() for part in _TAG.split(piece) for line in part.split("\n"))
                found |= {line for line in lines if _TURN_WORDS.fullmatch(line)}
        return found

    def portable(self, frame: Frame, *, bos: bool) -> str:
        """A template that writes by itself what this one does with its settings and frame.

        Args:
            bos: Whether the tokenizer puts a BOS in front of text.
        """
        source = self._dated
        sets = "".join(
            f"{{% set {name} = {_literal(value)} %}}\n" for name, value in self.settings.items()
        )
        content = "message['content']"
        if not frame.ends_turns:
            ended = f"{content} | trim + {_literal(frame.end)}"
            content = f"({ended} if message['role'] == 'assistant' else {content})"
        if self._wants_parts:
            content = f"[{{'type': 'text', 'text': {content}}}]"
        if self._wants_parts or not frame.ends_turns:
            sets += _REWRITES.replace("CONTENT", content)
        if frame.header:
            # Jinja itself drops a newline at the very end.
            source = source.removesuffix("\n")
            source += f"{{{{ {_literal(frame.header)} if add_generation_prompt else '' }}}}"
        return sets + ("{{ bos_token }}" if bos else "") + source


USER: dict[str, str] = {"role": "user", "content": _MARK * 2}
REPLY: dict[str, str] = {"role": "assistant", "content": _MARK}

_REWRITES = (
    "{% set given = namespace(messages=[]) %}\n"
    "{% for message in messages %}\n"
    "{% set given.messages = given.messages + [dict(message, content=CONTENT) "
    "if message['content'] is string else message] %}\n"
    "{% endfor %}\n"
    "{% set messages = given.messages %}\n"
)
"""Jinja that gives each message the content that a template gets here."""


def is_control(token: str) -> bool:
    """Whether a token that is not marked as special can begin or end a turn or a thought.

    It can if it is a name in brackets. Words, whitespace, bytes and simple tags such as `<b>` or
    `</table>`, which tokenizers also hold as added tokens, are text.
    """
    token = token.strip()
    return token in THOUGHT_MARKS or bool(_NAME.fullmatch(token) and not _MARKUP.fullmatch(token))


def _literal(value: Any) -> str:
    """A setting as Jinja reads it."""
    return json.dumps(value, ensure_ascii=False)


def fixed_date(pattern: str) -> str:
    """Stands in for the clock, so that a template with a date renders alike when a run resumes."""
    return datetime(2024, 7, 26).strftime(pattern)


_FIXED_CLOCK = (
    "{%- macro strftime_now(format) -%}"
    "{%- set known = KNOWN -%}"
    "{{- known[format] if format in known else "
    "raise_exception('it asks for a date in a format that is not written in it: ' ~ format) -}}"
    "{%- endmacro +%}"
)
"""Jinja that says `fixed_date` in the formats that stand in a template."""


def _with_fixed_date(source: str) -> str:
    """A template with a fixed date where it asks for the time.

    It is written into the template, as transformers from 5.22 on hands no functions to one.
    """
    source = _STRFTIME.sub(lambda call: repr(fixed_date(call[2])), source)
    if not _CLOCK.search(source):
        return source
    tree = _ENVIRONMENT.parse(_GENERATION.sub("", source))
    formats = {one.value for one in tree.find_all(jinja2.nodes.Const) if isinstance(one.value, str)}
    known = {format_: fixed_date(format_) for format_ in sorted(formats) if "%" in format_}
    return _FIXED_CLOCK.replace("KNOWN", json.dumps(known)) + source
