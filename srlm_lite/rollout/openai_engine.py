"""The engine `openai`: any server that speaks the OpenAI protocol, through chat completions.

httpx sends the requests, which the package has anyway. The client library of that name would bring
seven more packages for one endpoint, and waits at most a minute where a server asks for longer.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import httpx

from srlm_lite.conversation import Message
from srlm_lite.errors import SrlmError, UserError, same_command, shorten
from srlm_lite.records import FinishReason
from srlm_lite.rollout.protocol import Limits, Request, Sample, StopRule, Token
from srlm_lite.settings import OpenAI
from srlm_lite.telling import hide, secret_in_url, without_secrets

if TYPE_CHECKING:
    from srlm_lite.model.stack import Adapter

logger = logging.getLogger(__name__)

FIRST_WAIT_S = 1.0
"""Before the first retry; it doubles with each one."""
LONGEST_WAIT_S = 60.0
REACH_TIMEOUT_S = 10.0
"""How long the question whether a server is there may take."""
LONGEST_RETRY_AFTER_S = 600.0
"""A server that asks for more will not answer this run."""

NO_KEY = "none"
"""Sent where there is no key; local servers want the header, not the key."""

NEUTRAL = {"top_k": -1, "repetition_penalty": 1.0}
"""Settings beyond the protocol's that would bend what is drawn. Servers such as vLLM take them from
the model's own generation config where a request does not name them; others refuse to hear of
them, and are asked without."""

TELLING_WORDS = 8
"""A reply so long is not given to every seed by chance."""

UNTOLD = "the server gives no log-probabilities"

_RETRIED = {408, 409, 425, 429}
_WHERE = "engine openai"


class OpenAIEngine:
    """Samples from a server's own model; each seed is a request of its own.

    The server gets the messages and puts its own template around them. It never sees what
    the run learns. `n_tokens` is what the server counts, which may include the stop token, and
    `token_ids` are empty.

    Args:
        settings: The recipe's section; url and model are given.
    """

    def __init__(self, settings: OpenAI) -> None:
        self._settings = settings
        self._client: httpx.Client | None = None
        self._neutral = Neutral()
        self._seeds_seen = False

    def load(self, stack: Sequence[Adapter]) -> None:
        """See `Engine.load`. Without effect: a server samples from its own model."""

    def close(self) -> None:
        """See `Engine.close`. Closes the connections."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def sample(
        self,
        requests: Sequence[Request],
        limits: Limits,
        *,
        on_samples: Callable[[int], None] = lambda count: None,
    ) -> list[list[Sample]]:
        """See `Engine.sample`.

        Raises:
            UserError: The server refuses the request, or does not speak the protocol.
            SrlmError: It cannot be reached, or fails, after all retries.
        """
        if self._client is None:
            self._client = self._connected()
        caller = _Caller(self._client, self._settings.retries, self._neutral)
        pool = ThreadPoolExecutor(self._settings.parallel)
        futures = {
            pool.submit(caller.answer, self._body(request, seed, limits)): (number, place)
            for number, request in enumerate(requests)
            for place, seed in enumerate(request.seeds)
        }
        found: dict[tuple[int, int], Sample] = {}
        try:
            for future in as_completed(futures):
                found[futures[future]] = _sample(future.result(), limits)
                on_samples(1)
        except BaseException:
            caller.given_up.set()
            self.close()  # ends the requests under way
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        samples = [
            [found[number, place] for place in range(len(request.seeds))]
            for number, request in enumerate(requests)
        ]
        self._look_at_seeds(samples, limits)
        return samples

    def _look_at_seeds(self, samples: Sequence[Sequence[Sample]], limits: Limits) -> None:
        """Warn, once, of a server that answers every seed alike."""
        several = [row for row in samples if len(row) > 1]
        if self._seeds_seen or not several or not limits.temperature:
            return
        self._seeds_seen = True
        alike = all(len({sample.text for sample in row}) == 1 for row in several)
        if alike and any(len(row[0].text.split()) >= TELLING_WORDS for row in several):
            logger.warning(
                "%s gives the same reply to every seed at temperature %g: it samples greedily, or "
                "by settings of its own. `transformers serve` does unless the model's "
                "generation_config.json says do_sample: true; vLLM takes the request's settings "
                "with --generation-config vllm",
                self._settings.url,
                limits.temperature,
            )

    def _connected(self) -> httpx.Client:
        parallel, key = self._settings.parallel, key_of(self._settings)
        try:
            return httpx.Client(
                base_url=(self._settings.url or "").rstrip("/"),
                headers={"Authorization": authorization(key)},
                timeout=self._settings.timeout_s,
                limits=httpx.Limits(max_connections=parallel, max_keepalive_connections=parallel),
            )
        except httpx.InvalidURL as error:
            raise UserError(f"not a URL ({error})", where="openai.url") from error

    def _body(self, request: Request, seed: int, limits: Limits) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._settings.model,
            "messages": list(request.messages),
            "max_tokens": limits.max_new_tokens,
            "temperature": limits.temperature,
            **NEUTRAL,
        }
        if limits.temperature > 0:
            # Some servers hold a seed in 32 bits.
            body |= {"top_p": limits.top_p, "seed": seed % 2**31}
        if limits.alternatives:
            body |= {"logprobs": True, "top_logprobs": limits.alternatives}
        if limits.ignore_end:
            body["ignore_eos"] = True  # vLLM and SGLang know it
        return body


def key_of(settings: OpenAI) -> str:
    """The server's key, from the environment.

    Raises:
        UserError: No header can carry it.
    """
    key = os.environ.get(settings.key_variable, "").strip() or NO_KEY
    if key != NO_KEY:
        hide(key)
    if not (key.isascii() and key.isprintable()):
        raise UserError("holds characters that no key has", where=f"${settings.key_variable}")
    return key


def refuse_secret_url(settings: OpenAI) -> None:
    """Have nobody put a key into a URL: that goes to run.json, reports and cards.

    Raises:
        UserError: There is one in it; says of what kind, and not which.
    """
    found = secret_in_url(settings.url or "")
    if found is not None:
        raise UserError(
            f"holds {found}, and what a recipe says goes to run.json and to reports",
            where="openai.url",
            way_out="Leave it out of the URL, and put it into the environment variable "
            f"{settings.key_variable}; what a server wants otherwise than as `Bearer KEY` stands "
            "there in full, such as `Basic …`",
        )


def authorization(key: str) -> str:
    """The header that carries a key: `Bearer KEY`, or a key that names its own scheme as it is."""
    return key if " " in key else f"Bearer {key}"


@dataclass(slots=True)
class Neutral:
    """Whether the server is sent `NEUTRAL`."""

    sent: bool = True


class _Caller:
    """Sends requests and tries again where that may help; shared by all threads of a call."""

    def __init__(self, client: httpx.Client, retries: int, neutral: Neutral) -> None:
        self._client, self._retries, self._neutral = client, retries, neutral
        self.given_up = threading.Event()
        """Set when one request has failed for good, so that none waits any longer."""

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """The server's answer to one request, as JSON."""
        if not self._neutral.sent:
            body = {key: value for key, value in body.items() if key not in NEUTRAL}
        for attempt in range(self._retries + 1):
            wait = random.uniform(0.8, 1.0) * min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt)
            try:
                response = self._client.post("/chat/completions", json=body)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise UserError(f"not a URL ({error})", where="openai.url") from error
            except httpx.RequestError as error:
                problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            else:
                if response.is_success:
                    return self._json(response)
                problem = f"{response.status_code}: {said(response)}"
                if _knows_no_neutral(response) and NEUTRAL.keys() & body.keys():
                    self._neutral.sent = False
                    return self.answer(body)
                if response.status_code not in _RETRIED and response.status_code < 500:
                    raise self._refusal(response.status_code, problem)
                wait = max(wait, self._wanted_wait(response, problem))
            if attempt < self._retries:
                logger.info("%s; trying again in %.0f s", problem, wait)
                if self.given_up.wait(wait):
                    break
        raise self._stopped(f"{problem}, after {attempt + 1} tries")

    def _json(self, response: httpx.Response) -> dict[str, Any]:
        try:
            return dict(response.json())
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{response.url} does not answer with JSON; is openai.url right?", where=_WHERE
            ) from error

    def _refusal(self, status: int, problem: str) -> UserError:
        hints = {
            401: "Put the key into the environment variable that openai.key_variable names",
            403: "Put the key into the environment variable that openai.key_variable names",
            404: "Check openai.url, up to and including /v1, and openai.model",
        }
        url = self._client.base_url
        return UserError(f"{url} refuses with {problem}", where=_WHERE, way_out=hints.get(status))

    def _wanted_wait(self, response: httpx.Response, problem: str) -> float:
        wait = _retry_after(response.headers.get("Retry-After", ""))
        if wait > LONGEST_RETRY_AFTER_S:
            raise self._stopped(f"{problem}; it asks to wait for {wait:.0f} s")
        return wait

    def _stopped(self, why: str) -> SrlmError:
        return SrlmError(
            f"{_WHERE}: {self._client.base_url} does not answer ({why}). "
            f"What it has answered is kept: {same_command()} goes on from here"
        )


def said(response: httpx.Response) -> str:
    """The server's own words, in one short line, without the key."""
    text = response.text
    try:
        found = json.loads(text)
        for name in ("error", "message", "detail"):
            found = found.get(name, found) if isinstance(found, dict) else found
        text = found if isinstance(found, str) else json.dumps(found)
    except (ValueError, RecursionError):
        pass
    return shorten(without_secrets(" ".join(text.split())) or response.reason_phrase)


def _knows_no_neutral(response: httpx.Response) -> bool:
    """Whether the server refuses a request for the sake of `NEUTRAL`, by what it says."""
    return response.status_code in (400, 422) and any(key in response.text for key in NEUTRAL)


def _retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for: a number, or a date; 0 without one."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _sample(answer: dict[str, Any], limits: Limits) -> Sample:
    try:
        choice = answer["choices"][0]
        text = _whole(choice["message"].get("content") or "")
        drawn = (choice.get("logprobs") or {}).get("content") or []
        tokens = [_token(entry, limits.alternatives) for entry in drawn]
        count = int((answer.get("usage") or {}).get("completion_tokens") or 0)
        reason = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(
            f"the server's answer is no chat completion ({type(error).__name__}: {error})",
            where=_WHERE,
        ) from error
    if limits.alternatives and text and not tokens:
        raise UserError(
            UNTOLD,
            where=_WHERE,
            way_out="Set judge.score=sampled, or take a server that has them, such as vLLM",
        )
    # Whatever else it says (length, content_filter, tool_calls), the text did not come to its end.
    finish: FinishReason = "stop" if reason in ("stop", None) else "length"
    ruled = _up_to_rule(text, limits.stop)
    kept = text if ruled is None else ruled
    if ruled is not None:
        finish = "stop"
    if limits.alternatives:
        tokens = _covering(tokens, kept)
        count = len(tokens)
    return Sample(
        text=kept.strip(),
        token_ids=(),
        finish_reason=finish,
        n_tokens=count,
        tokens=tuple(tokens) if limits.alternatives else (),
    )


def _whole(text: Any) -> str:
    """The text as a file can hold it: half a character, which JSON can spell, is U+FFFD.

    Raises:
        TypeError: It is no text, but a list of parts, say.
    """
    if not isinstance(text, str):
        raise TypeError(f"content is a {type(text).__name__}")
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _token(entry: dict[str, Any], count: int) -> Token:
    others = [(str(one["token"]), float(one["logprob"])) for one in entry["top_logprobs"]]
    others.sort(key=lambda other: -other[1])
    return Token(str(entry["token"]), tuple(others[:count]))


def _up_to_rule(text: str, rule: StopRule | None) -> str | None:
    """The text up to the end of the first line at which the rule holds, if it does at any."""
    if rule is None:
        return None
    ends = (at + 1 for at, character in enumerate(text) if character == "\n")
    return next((text[:end] for end in ends if rule(text[:end])), None)


def _covering(tokens: Sequence[Token], text: str) -> list[Token]:
    """The tokens that spell the text: without the stop token, or what the rule has cut off."""
    covered = 0
    for place, token in enumerate(tokens):
        if covered >= len(text):
            return list(tokens[:place])
        covered += len(token.text)
    return list(tokens)


def reach(settings: OpenAI) -> str:
    """Ask a server whether it is there, takes the key and has the model; what it says, in words.

    It is asked for its list of models, and where that does not name this one for a few tokens of
    it: some know names that they do not list, and some have no list. What the run would be refused
    for after hours of training it is refused for here.

    Raises:
        UserError: It cannot be reached, refuses the key, does not know the model, or does not speak
            the protocol.
    """
    url, model = (settings.url or "").rstrip("/"), settings.model
    # A connection for each question: a server may close one after an answer that was an error.
    headers = {"Authorization": authorization(key_of(settings)), "Connection": "close"}

    def wrong(what: str, way_out: str) -> UserError:
        return UserError(what, where=f"openai.url = {url}", way_out=way_out)

    try:
        with httpx.Client(base_url=url, headers=headers, timeout=REACH_TIMEOUT_S) as client:
            listed = _listed(client.get("/models"))
            if listed is not None and model in listed:
                return f"{url} has {model}"
            body = {
                "model": model,
                "messages": [{"role": "user", "content": "Say yes."}],
                "max_tokens": 16,
                "temperature": 0,
            }
            answer = client.post("/chat/completions", json={**body, **NEUTRAL})
            if _knows_no_neutral(answer):
                answer = client.post("/chat/completions", json=body)
    except httpx.ReadTimeout:
        return f"{url} is there, and slow"
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise UserError(f"not a URL ({error})", where="openai.url") from error
    except httpx.RequestError as error:
        told = str(error) or type(error).__name__
        raise wrong(
            f"cannot be reached ({told})", "Start the server, or correct openai.url"
        ) from error
    status = answer.status_code
    if status in (401, 403):
        raise wrong(
            f"refuses the key ({status})",
            f"Put the key into the environment variable {settings.key_variable}",
        )
    if status == 404:
        known = f"; it lists {', '.join(sorted(listed)[:5])}" if listed else ""
        raise wrong(
            f"knows no model {model} (404){known}",
            "Correct openai.model, or openai.url up to and including /v1",
        )
    if status in _RETRIED or status >= 500:
        return f"{url} is there, and busy ({status})"
    if not answer.is_success:
        raise wrong(
            f"refuses a question to {model} with {status}: {said(answer)}",
            "Correct openai.model and openai.url, or ask whoever runs the server",
        )
    try:
        _sample(answer.json(), Limits(max_new_tokens=16, temperature=0, top_p=1))
    except (UserError, ValueError, RecursionError) as error:
        raise wrong(
            "does not answer with a chat completion",
            "Correct openai.url, up to and including /v1",
        ) from error
    return f"{url} answers"


def refuse_untold(settings: OpenAI, *, way_out: str) -> None:
    """Ask a server for a token with its log-probabilities.

    Args:
        way_out: What to do about a server that has none.

    Raises:
        UserError: It gives none.
    """
    message: Message = {"role": "user", "content": "Say yes."}
    limits = Limits(temperature=0.0, top_p=1.0, max_new_tokens=1, alternatives=2)
    engine = OpenAIEngine(settings)
    try:
        [[sample]] = engine.sample([Request((), (0,), (message,))], limits)
    except UserError as error:
        if error.what != UNTOLD:
            raise
        raise UserError(UNTOLD, where=error.where, way_out=way_out) from error
    finally:
        engine.close()
    if not sample.tokens:
        raise UserError(UNTOLD, where=_WHERE, way_out=way_out)


def _listed(response: httpx.Response) -> set[str] | None:
    """Names of a server's models; None where it does not list them."""
    try:
        return {str(one["id"]) for one in response.json()["data"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
