"""What a client asks for, read from its JSON: every word of it is followed, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from srlm_lite.conversation import Message, problem_of
from srlm_lite.settings import known_temperature
from srlm_lite.telling import without_secrets_in

MOST_CHOICES = 128
MOST_ALTERNATIVES = 20
"""The largest `top_logprobs`, as OpenAI has it."""
MOST_STOPS = 4

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Parameters that are not supported, with the values at which they change nothing."""

MEANS_NOTHING = frozenset(
    {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
"""They name a request to its server, and change no reply."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Refused(Exception):
    """A request that is not answered; as OpenAI's clients expect to be told of it."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer; what it quotes, a client's words or an error's, is no secret."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        server = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = kinds.get(self.status, server)
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": without_secrets_in(told)}


@dataclass(frozen=True, slots=True)
class Ask:
    """A chat completion as it is asked for."""

    model: str
    messages: tuple[Message, ...]
    temperature: float | None = None
    """None: the recipe's; so for `top_p` and `max_tokens`."""
    top_p: float | None = None
    max_tokens: int | None = None
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    stream: bool = False
    stream_usage: bool = False
    bare: bool = False
    """An empty system message: the recipe's is left out, too."""


def read_ask(body: Any) -> Ask:
    """A request's JSON, checked.

    Raises:
        Refused: It is none, or asks for something that is not done here; names the parameter.
    """
    if not isinstance(body, dict):
        raise Refused("the body is not a JSON object")
    given = {key: value for key, value in body.items() if value is not None}
    known = _Given(given)
    messages, bare = _messages(given.get("messages"))
    stream = known.flag("stream")
    ask = Ask(
        model=known.text("model"),
        messages=messages,
        bare=bare,
        temperature=known.number("temperature", check=known_temperature),
        top_p=known.number("top_p", check=_is_share),
        max_tokens=_max_tokens(known),
        n=known.whole("n", 1, MOST_CHOICES) or 1,
        seed=known.whole("seed", -(2**63), 2**63 - 1),
        stop=_stops(given.get("stop")),
        logprobs=known.flag("logprobs"),
        top_logprobs=known.whole("top_logprobs", 0, MOST_ALTERNATIVES) or 0,
        stream=stream,
        stream_usage=_stream_usage(given.get("stream_options"), stream=stream),
    )
    if ask.top_logprobs and not ask.logprobs:
        raise Refused("goes with logprobs: true", param="top_logprobs")
    _refuse_others(given)
    return ask


_KNOWN = frozenset(
    {
        *("model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens"),
        *("n", "seed", "stop", "logprobs", "top_logprobs", "stream", "stream_options"),
    }
)


def _refuse_others(given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if key in _KNOWN or key in MEANS_NOTHING:
            continue
        if key in NEUTRAL:
            # `True == 1`, and a flag is no number.
            if any(
                value == one and isinstance(value, bool) == isinstance(one, bool)
                for one in NEUTRAL[key]
            ):
                continue
            raise Refused(f"{key} is not supported", param=key, code="unsupported_parameter")
        raise Refused(f"{key} is no parameter known here", param=key, code="unknown_parameter")


class _Given:
    """Values of a request by name, each of the type that it has to have."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    def text(self, name: str) -> str:
        """A text that has to be there."""
        value = self._given.get(name)
        if not isinstance(value, str) or not value:
            raise Refused(f"{name} has to be given, as a text", param=name)
        return value

    def flag(self, name: str) -> bool:
        """True or false; false where it is left out."""
        value = self._given.get(name, False)
        if not isinstance(value, bool):
            raise Refused(f"{name} is true or false", param=name)
        return value

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number within its bounds."""
        value = self._given.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise Refused(f"{name} is a whole number from {low} to {high}", param=name)
        return value

    def number(self, name: str, *, check: Any) -> float | None:
        """A number that passes a check, which raises ValueError."""
        value = self._given.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Refused(f"{name} is a number", param=name)
        try:
            check(float(value))
        except (ValueError, OverflowError) as error:
            raise Refused(f"{name}: {error}", param=name) from error
        return float(value)


def _is_share(value: float) -> None:
    if not (math.isfinite(value) and 0 < value <= 1):
        raise ValueError("is more than 0, and 1 at most")


def _max_tokens(known: _Given) -> int | None:
    old = known.whole("max_tokens", 1, 2**31)
    new = known.whole("max_completion_tokens", 1, 2**31)
    if old is not None and new is not None and old != new:
        raise Refused("differs from max_tokens, its older name", param="max_completion_tokens")
    return old if new is None else new


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
        raise Refused("stop is a text or a list of texts", param="stop")
    if len(found) > MOST_STOPS:
        raise Refused(f"stop has {MOST_STOPS} texts at most", param="stop")
    return tuple(found)


def _stream_usage(value: Any, *, stream: bool) -> bool:
    if value is None:
        return False
    if not stream:
        raise Refused("goes with stream: true", param="stream_options")
    if not isinstance(value, dict) or value.keys() - {"include_usage", "include_obfuscation"}:
        raise Refused("stream_options knows include_usage alone", param="stream_options")
    return value.get("include_usage") is True


def _messages(value: Any) -> tuple[tuple[Message, ...], bool]:
    """The conversation, and whether it says that there is to be no system message at all."""
    if not isinstance(value, list) or not value:
        raise Refused("messages has to be given, as a list of messages", param="messages")
    found = [_message(one, f"messages[{i}]") for i, one in enumerate(value)]
    bare = found[0]["role"] == "system" and not found[0]["content"].strip()
    if bare:
        del found[0]
    if problem := problem_of(found):
        raise Refused(f"the conversation {problem}", param="messages")
    return tuple(found), bare


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise Refused(f"{where} is not an object", param=where)
    role = value.get("role")
    if role not in _ROLES:
        raise Refused(f"{where} has a role {role!r}: known are {', '.join(_ROLES)}", param=where)
    for key in value.keys() - {"role", "content", "reasoning_content", "refusal"}:
        if value[key]:  # clients send back what a reply had, in empty
            raise Refused(f"{where}.{key} is not supported", param=f"{where}.{key}")
    content = value.get("content")
    if isinstance(content, list):
        content = "".join(_part(one, f"{where}.content") for one in content)
    if not isinstance(content, str):
        raise Refused(f"{where}.content is not a text", param=f"{where}.content")
    if content != content.encode("utf-8", "replace").decode():
        raise Refused(f"{where}.content holds half a character", param=f"{where}.content")
    return {"role": _ROLES[role], "content": content}


def _part(value: Any, where: str) -> str:
    if isinstance(value, dict) and value.get("type") == "text":
        text = value.get("text")
        if isinstance(text, str):
            return text
    raise Refused(f"{where} holds a part that is no text", param=where)
