"""Servers that speak the OpenAI protocol: a real one, and one that does as a test says."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
from forked import Program


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(command: Sequence[str], port: int, log: Path) -> Iterator[str]:
    """The URL of a server that is up, until the end of the block."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    with _up(process, port, log.read_text) as url:
        yield url


@contextmanager
def transformers_serve(model: Path) -> Iterator[str]:
    """The same of `transformers serve` with a model."""
    port = free_port()
    code = "from transformers.cli.transformers import main; main()"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    process = Program("-c", code, "serve", model, *options)
    with _up(process, port, lambda: str(process.communicate())) as url:
        yield url


@contextmanager
def _up(
    process: subprocess.Popen[bytes] | Program, port: int, said: Callable[[], str]
) -> Iterator[str]:
    try:
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                    break
            except httpx.TransportError:
                assert process.poll() is None, said()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


Reply = tuple[int, dict[str, str], Any]
"""Status, headers, body; a body of None drops the connection."""


def completion(text: str | None, reason: str | None = "stop", **choice: Any) -> Reply:
    body = {
        "choices": [{"message": {"content": text}, "finish_reason": reason, **choice}],
        "usage": {"completion_tokens": 7},
    }
    return 200, {}, body


@dataclass
class Server:
    """Answers each request by `reply(number, body)`; remembers what it was asked."""

    reply: Callable[[int, dict[str, Any]], Reply]
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    busy: int = 0
    most_busy: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.times.append(time.monotonic())
            self.bodies.append(body)
            self.headers.append(dict(handler.headers.items()))
            number = len(self.bodies)
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        try:
            status, headers, answer = self.reply(number, body)
        finally:
            with self.lock:
                self.busy -= 1
        if answer is None:
            handler.close_connection = True
            return
        data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)


MODELS = ("j", "judge", "m", "org/judge")
"""What a scripted server lists, so that nobody has to ask it for a token of them."""


@contextmanager
def scripted(reply: Callable[[int, dict[str, Any]], Reply]) -> Iterator[Server]:
    server = Server(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            data = json.dumps({"data": [{"id": name} for name in MODELS]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            server.answer(self)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server.url = f"http://127.0.0.1:{http.server_port}/v1"
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server
        finally:
            http.shutdown()
