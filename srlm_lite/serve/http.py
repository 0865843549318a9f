"""The HTTP side: OpenAI's paths and shapes, a thread a connection, everything bounded."""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import queue
import select
import socket
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import TimeoutError as NotYet
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from srlm_lite.errors import SrlmError, UserError
from srlm_lite.serve.request import Ask, Refused, read_ask
from srlm_lite.serve.worker import Answered, Choice, Job, Worker

logger = logging.getLogger(__name__)

MOST_BYTES = 8 << 20
"""The largest body of a request."""
IDLE_S = 60.0
"""How long a connection may be silent."""
POLL_S = 0.25
"""How often it is looked whether a client is still there."""
UNLIKELY = -9999.0
"""What OpenAI gives as the log-probability of a token that is not among the 20 most likely."""


class Server(ThreadingHTTPServer):
    """Serves a worker's models.

    Args:
        key: Which each request has to show; None: none is asked for.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, worker: Worker, *, key: str | None) -> None:
        self.worker, self.key = worker, key
        self.local = is_local(host)
        self.created = int(time.time())
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            said = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"cannot listen there ({said})",
                where=f"--host {host} --port {port}",
                way_out="Choose another port, or 0 for any that is free",
            ) from error

    @property
    def url(self) -> str:
        """Where the API is, up to and including `/v1`."""
        host, port = self.server_address[:2]
        name = host.decode() if isinstance(host, bytes | bytearray) else str(host)
        return f"http://{f'[{name}]' if ':' in name else name}:{port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is no news."""
        logger.info("a connection broke", exc_info=True)


def is_local(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "srlm-lite"
    sys_version = ""
    timeout = IDLE_S
    server: Server

    def do_GET(self) -> None:
        """Models, or whether the server is up."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """A chat completion."""
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """A line of the log a request; what a client sends breaks no line."""
        said = (format % args).encode("unicode_escape").decode()
        logger.info("%s %s", self.address_string(), said)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server refuses by itself, in the shape of all refusals."""
        self._refuse(Refused(message or "the request cannot be read", status=code))

    def _answer(self, answer: Any) -> None:
        self._begun, self._data = False, b""
        try:
            if self.command == "POST":
                self._data = self._read()
            elif self.headers.get("Content-Length", "0") != "0":
                self.close_connection = True  # with what it holds unread
            self._check()
            answer(unquote(urlsplit(self.path).path).rstrip("/"))
        except Refused as refused:
            self._refuse(refused)
        except UserError as error:
            self._refuse(Refused(str(error)))
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:
            kind = str(error) if isinstance(error, SrlmError) else type(error).__name__
            if not isinstance(error, SrlmError):
                logger.error("a request failed", exc_info=True)
            self._refuse(Refused(f"the server failed: {kind}", status=500))

    def _check(self) -> None:
        """Who asks.

        Raises:
            Refused: Without the key; or by a name that this machine does not have, which a page in
                a browser may have been led to.
        """
        name = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        if self.server.local and name and not is_local(name):
            raise Refused(f"the server has no name {name!r}", status=403)
        if self.server.key is not None:
            shown = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(shown.encode(), self.server.key.encode()):
                raise Refused("the API key is wrong or missing", status=401, code="invalid_api_key")

    def _get(self, path: str) -> None:
        names = list(self.server.worker.stacks)
        if path == "/health":
            self._send(200, {"status": "ok"})
        elif path == "/v1/models":
            self._send(200, {"object": "list", "data": [self._model(name) for name in names]})
        elif path.startswith("/v1/models/"):
            self._send(200, self._model(self._known(path.removeprefix("/v1/models/"))))
        else:
            raise self._no_path(path)

    def _post(self, path: str) -> None:
        if path == "/v1/completions":
            raise Refused(
                "the models are spoken to in the base's chat template: use /v1/chat/completions",
                status=404,
            )
        if path != "/v1/chat/completions":
            raise self._no_path(path)
        ask = read_ask(self._body())
        self._known(ask.model)
        (self._stream if ask.stream else self._whole)(ask)

    def _no_path(self, path: str) -> Refused:
        known = "POST /v1/chat/completions, GET /v1/models"
        return Refused(f"no {self.command} {path or '/'} here; there is {known}", status=404)

    def _model(self, name: str) -> dict[str, Any]:
        made = self.server.created
        return {"id": name, "object": "model", "created": made, "owned_by": "srlm-lite"}

    def _known(self, name: str) -> str:
        names = self.server.worker.stacks
        if name not in names:
            raise Refused(
                f"no model {name!r}; there are {', '.join(names)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return name

    def _read(self) -> bytes:
        """The body, whatever the answer is going to be: else a client may not get to read that."""
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdecimal()):
            self.close_connection = True
            raise Refused("Content-Length has to be given", status=411)
        if int(length) > MOST_BYTES:
            self.close_connection = True
            for _ in range(MOST_BYTES >> 16):
                self.rfile.read(1 << 16)
            raise Refused(f"the body has more than {MOST_BYTES:,} bytes", status=413)
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise ConnectionError
        return data

    def _body(self) -> Any:
        kind = self.headers.get_content_type()
        if kind != "application/json":  # which no page of another site can send unasked
            raise Refused(f"the body is {kind}, not application/json", status=415)
        try:
            return json.loads(self._data)
        except (ValueError, RecursionError) as error:
            raise Refused(f"the body is not JSON ({error})") from error

    def _whole(self, ask: Ask) -> None:
        job = Job(ask)
        self.server.worker.put(job)
        answered = self._wait(job)
        choices = [
            {
                "index": number,
                "message": _message(choice),
                "logprobs": _logprobs(ask, choice),
                "finish_reason": choice.finish_reason,
            }
            for number, choice in enumerate(answered.choices)
        ]
        head = self._head(ask, "chat.completion")
        self._send(200, {**head, "choices": choices, "usage": _usage(answered)})

    def _stream(self, ask: Ask) -> None:
        pieces: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        job = Job(ask, show=lambda number, piece: pieces.put((number, piece)))
        self.server.worker.put(job)
        head = self._head(ask, "chat.completion.chunk")
        usage: dict[str, Any] = {"usage": None} if ask.stream_usage else {}
        shown = [""] * ask.n

        def send(number: int, delta: dict[str, Any], **more: Any) -> None:
            one = {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}
            self._event({**head, "choices": [{**one, **more}], **usage})

        def flush() -> None:
            while not pieces.empty():
                number, piece = pieces.get()
                shown[number] += piece
                send(number, {"content": piece})

        answered = None
        while answered is None:
            try:
                answered = job.future.result(POLL_S)
            except NotYet:
                if job.future.done():
                    raise
            if (self._begun or not pieces.empty()) or answered is not None:
                if not self._begun:
                    self._begin_stream()
                    for number in range(ask.n):
                        send(number, {"role": "assistant", "content": ""})
                try:
                    flush()
                except OSError:
                    job.left.set()
                    raise
            if answered is None and self._is_gone():
                job.left.set()
                raise ConnectionError
        for number, choice in enumerate(answered.choices):
            rest: dict[str, Any] = {}
            if choice.thought:
                rest["reasoning_content"] = choice.thought
            if text := choice.text[len(shown[number]) :]:
                rest["content"] = text
            if rest:
                send(number, rest)
            send(number, {}, finish_reason=choice.finish_reason, logprobs=_logprobs(ask, choice))
        if ask.stream_usage:
            self._event({**head, "choices": [], "usage": _usage(answered)})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _wait(self, job: Job) -> Answered:
        """The replies, unless the client goes away in the meantime."""
        while True:
            try:
                return job.future.result(POLL_S)
            except NotYet:
                if job.future.done():
                    raise
            if self._is_gone():
                job.left.set()
                raise ConnectionError

    def _is_gone(self) -> bool:
        """Whether the client has closed the connection."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def _head(self, ask: Ask, kind: str) -> dict[str, Any]:
        name = f"chatcmpl-{uuid.uuid4().hex}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": ask.model}

    def _begin_stream(self) -> None:
        self._begun = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _event(self, value: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _refuse(self, refused: Refused) -> None:
        if getattr(self, "_begun", False):  # too late for a status: the stream says it
            try:
                self._event(refused.body)
                self._chunk(b"")
            except OSError:
                pass
            self.close_connection = True
            return
        self._send(refused.status, refused.body)

    def _send(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True


def _message(choice: Choice) -> dict[str, Any]:
    thought = {} if choice.thought is None else {"reasoning_content": choice.thought}
    return {"role": "assistant", "content": choice.text, "refusal": None, **thought}


def _usage(answered: Answered) -> dict[str, int]:
    prompt, drawn = answered.prompt_tokens, answered.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}


def _logprobs(ask: Ask, choice: Choice) -> dict[str, Any] | None:
    """Each token with the log-probability that the model itself gave it, at temperature 1."""
    if not ask.logprobs:
        return None
    return {"content": list(_tokens(ask, choice)), "refusal": None}


def _tokens(ask: Ask, choice: Choice) -> Iterator[dict[str, Any]]:
    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}

    for token in choice.tokens:
        own = next((p for text, p in token.alternatives if text == token.text), UNLIKELY)
        others = [entry(*one) for one in token.alternatives[: ask.top_logprobs]]
        yield {**entry(token.text, own), "top_logprobs": others}
