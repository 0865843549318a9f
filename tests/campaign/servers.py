"""A judge's server that is late, garbles, refuses, cuts off or is not the one asked for."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

from common import Place, Try, command, difference, iterate, methods, results

WAYS = (
    "late", "429 with Retry-After", "429 without", "500", "not JSON", "another JSON", "cut off",
    "hangs up", "all of it at once", "another model", "gone for a while",
)  # fmt: skip
MOST_STARTS = 12
QUICK = "from srlm_lite.rollout import openai_engine\nopenai_engine.FIRST_WAIT_S = 0.01\n"


@dataclass
class Judge:
    """Answers by what it is asked alone; before that it misbehaves, at random."""

    way: str
    rng: Random
    ill: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    misbehaved: int = 0
    url: str = ""

    def answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self.lock:
            ill = self.rng.random() < self.ill
            self.misbehaved += ill
            way = self.rng.choice(WAYS[:8]) if self.way == "all of it at once" else self.way
            wait = self.rng.uniform(0, 0.5)
        score = int(hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest(), 16)
        said = f"It has {score % 97} words.\nScore: {(score + int(body.get('seed', 0))) % 6}"
        good = json.dumps({
            "choices": [{"message": {"content": said}, "finish_reason": "stop"}],
            "usage": {"completion_tokens": 7},
        }).encode()  # fmt: skip
        if not ill:
            self._send(handler, 200, good)
        elif way == "late":
            time.sleep(wait)
            self._send(handler, 200, good)
        elif way == "429 with Retry-After":
            self._send(handler, 429, b'{"error": "slow down"}', **{"Retry-After": "0"})
        elif way == "429 without":
            self._send(handler, 429, b'{"error": "slow down"}')
        elif way == "500":
            self._send(handler, 500, b"<html>no</html>")
        elif way == "not JSON":
            self._send(handler, 200, good[: len(good) // 2])
        elif way == "another JSON":
            self._send(handler, 200, b'{"choices": []}')
        elif way == "cut off":
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(good)))
            handler.end_headers()
            handler.wfile.write(good[:20])
            handler.close_connection = True
        else:
            handler.close_connection = True

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, status: int, data: bytes, **headers: str) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)


@contextmanager
def serving(judge: Judge, port: int = 0) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            Judge._send(self, 200, b'{"data": [{"id": "judge"}]}')

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if body["model"] != "judge":
                Judge._send(self, 404, b'{"error": "no such model"}')
                return
            judge.answer(self, body)

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        allow_reuse_address = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that was refused may hang up as well

    server = Server(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def tries(place: Place, rng: Random) -> Iterator[Try]:
    ways = [way for way in WAYS if place.wants(way)]
    for number in range(place.count(33)):
        way, seed = ways[number % len(ways)], f"{place.seed}/servers/{number}"
        begin = time.monotonic()
        outcome, told = _attempt(place, way, Random(seed))
        yield Try("servers", way, seed, outcome, told, time.monotonic() - begin)


def _attempt(place: Place, way: str, rng: Random) -> tuple[str, str]:
    recipe, settings = methods()["self-rewarding"]
    settings = (*settings, "iterations=1", "judge.engine=openai", "openai.parallel=3")
    port = _port()
    settings = (*settings, f"openai.url=http://127.0.0.1:{port}/v1", "openai.retries=3")
    good = (*settings, "openai.model=judge")
    reference = place("reference")
    # The port is a part of the run: so the undisturbed one is made beside each.
    shutil.rmtree(reference, ignore_errors=True)
    with serving(Judge("", Random(0), 0.0), port):
        ended = command(*iterate(reference, recipe, *good), prelude=QUICK)
        assert ended.code == 0, ended.short
    out = place("out")
    shutil.rmtree(out, ignore_errors=True)
    judge = Judge(way, rng, rng.uniform(0.05, 0.5))
    if way == "another model":
        with serving(judge, port):
            words = iterate(out, recipe, *settings, "openai.model=another")
            ended = command(*words, prelude=QUICK)
        if ended.line is None or out.exists():
            return "failed", ended.short
        return "named", ended.line[:160]
    words, told, line = iterate(out, recipe, *good), [], ""
    if way == "gone for a while":
        ended = command(*words, prelude=QUICK)
        if ended.line is None or out.exists():
            return "failed", f"with no server: {ended.short}"
        line = ended.line
        judge.ill = 0.0
    for start in range(MOST_STARTS):
        judge.ill /= 1 + start  # it gets better
        with serving(judge, port):
            ended = command(*words, prelude=QUICK)
        if ended.code == 0:
            break
        if "Traceback" in ended.err or ended.code not in (1, 2):
            return "failed", ended.short
        line = ended.err.strip().splitlines()[-1]
        told.append(ended.code)
    else:
        return "failed", f"{MOST_STARTS} starts: {line}"
    differing = difference(results(reference), results(out))
    if differing:
        return "failed", f"{len(told)} stops, other bytes: {differing}"
    said = f"{judge.misbehaved} times, {len(told)} stops{line and ': '}{line[:140]}"
    return ("mended" if line else "survived"), said


def _port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
