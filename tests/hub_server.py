"""A Hub on this machine, small: what `create_repo`, `repo_info` and `upload_folder` ask of one.

Endpoints as huggingface_hub 1.x calls them: repos/create, preupload, LFS batch and PUT, commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What the server holds, and what it has been asked."""

    token: str
    address: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    """Repositories by name."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Of the last commit, by path."""
    commits: int = 0
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Uploaded, by SHA-256, whether a commit has followed or not."""
    requests: list[str] = field(default_factory=list)
    puts_allowed: int = 10**9
    """After so many large files the server fails."""


@contextmanager
def serving(token: str) -> Iterator[Hub]:
    """A server while the context lasts."""
    hub = Hub(token)

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if not self._allowed("GET"):
            return
        repo = self.path.split("?")[0].removeprefix("/api/models/").removesuffix("/revision/main")
        if repo not in self.state.private:
            self._reply(404, {"error": "Repository not found"})
            return
        siblings = [{"rfilename": name} for name in self.state.files]
        facts = {"id": repo, "private": self.state.private[repo], "siblings": siblings}
        self._reply(200, {**facts, "modelId": repo, "sha": "0" * 40, "tags": [], "downloads": 0})

    def do_PUT(self) -> None:
        self.state.requests.append(f"PUT {self.path}")
        body = self._body()
        if self.state.puts_allowed <= 0:
            self._reply(400, {"error": "broken line"})
            return
        self.state.puts_allowed -= 1
        name = self.path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != name:
            self._reply(400, {"error": "not these bytes"})
            return
        self.state.blobs[name] = body
        self._reply(200, {})

    def do_POST(self) -> None:
        if not self._allowed("POST"):
            return
        body = self._body()
        if self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._reply(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [self._mode(file) for file in json.loads(body)["files"]]
            self._reply(200, {"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif "/commit/" in self.path:
            self._commit(body)
        else:
            self._reply(404, {"error": f"no {self.path}"})

    def _create(self, wish: dict[str, Any]) -> None:
        repo = "/".join(filter(None, (wish.get("organization"), wish["name"])))
        known = repo in self.state.private
        visible = wish.get("visibility") == "private" or bool(wish.get("private"))
        self.state.private.setdefault(repo, visible)
        url = f"{self.state.address}/{repo}"
        answer = {"url": url, "name": repo}
        self._reply(409 if known else 200, {**answer, "error": "exists"} if known else answer)

    @staticmethod
    def _mode(file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(".safetensors")
        mode = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _batch(self, wish: dict[str, Any]) -> None:
        objects = []
        for each in wish["objects"]:
            row = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.state.blobs:
                row["actions"] = {"upload": {"href": f"{self.state.address}/blobs/{each['oid']}"}}
            objects.append(row)
        self._reply(200, {"transfer": "basic", "objects": objects})

    def _commit(self, body: bytes) -> None:
        files = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.state.blobs[value["oid"]]
        self.state.files = files
        self.state.commits += 1
        oid = f"{self.state.commits:040d}"
        repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
        url = f"{self.state.address}/{repo}/commit/{oid}"
        self._reply(200, {"success": True, "commitUrl": url, "commitOid": oid, "hookOutput": ""})

    def _allowed(self, verb: str) -> bool:
        self.state.requests.append(f"{verb} {self.path}")
        if self.headers.get("Authorization") == f"Bearer {self.state.token}":
            return True
        self._body()
        self._reply(401, {"error": "Invalid credentials"})
        return False

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
