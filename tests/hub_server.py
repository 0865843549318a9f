"""A Hub on this machine, small: what the client library asks of one to upload and to download.

Endpoints as huggingface_hub 1.x calls them: repos/create, preupload, commit; LFS batch and PUT, or
Xet where it is offered; the tree of a revision, and `resolve` for a file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from xet_server import Cas, XetFile

LARGE = (".safetensors", ".gguf")
"""Files that do not go into a commit themselves."""


@dataclass
class Repo:
    """What a repository holds."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    """The last commit's files, by path; large ones that came by Xet are empty here."""
    large: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the large ones."""
    commits: int = 0

    @property
    def revision(self) -> str:
        return f"{self.commits:040d}"


@dataclass
class Hub:
    """What the server holds, and what it has been asked."""

    token: str
    address: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Uploaded, by SHA-256, whether a commit has followed or not."""
    requests: list[str] = field(default_factory=list)
    cas: Cas | None = None
    """Where Xet is offered."""
    puts_allowed: int = 10**9
    """After so many large files the server fails."""
    dies: bool = False
    """It fails by hanging up, not by saying so."""
    status: int | None = None
    """What it answers to everything, once it is set."""

    def offer_xet(self) -> Cas:
        self.cas = Cas(token="xet-token")
        return self.cas

    def publish(self, repo: str, folder: Path) -> None:
        """A public model of this folder's files, or its next commit."""
        files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        large = {
            name: hashlib.sha256(content).hexdigest()
            for name, content in files.items()
            if name.endswith(LARGE)
        }
        commits = self.repos[repo].commits + 1 if repo in self.repos else 1
        self.repos[repo] = Repo(private=False, files=files, large=large, commits=commits)

    def puts(self) -> list[str]:
        """Names of the large files that were sent."""
        return [one.rpartition("/")[2] for one in self.requests if one.startswith("PUT")]


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
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self._is_down():
            return
        path = urlsplit(self.path).path
        if path.startswith("/cas/"):
            self._read_cas(path.removeprefix("/cas"))
        elif match := re.fullmatch(r"/api/models/(.+)/xet-(?:read|write)-token/.+", path):
            if self._allowed(public=match[1]):
                self._xet_token()
        elif match := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/([^/]+)(/.*)?)?", path):
            if self._allowed(public=match[1]):
                self._describe(match[1], tree=match[2] == "tree", under=match[4])
        elif match := re.fullmatch(r"/(.+)/resolve/[^/]+/(.+)", path):
            if self._allowed(public=match[1]):
                self._resolve(match[1], match[2])
        else:
            self._refuse(404, "no such page")

    def do_PUT(self) -> None:
        if self._is_down():
            return
        body = self._body()
        if self.state.puts_allowed <= 0:
            if self.state.dies:
                self.close_connection = True
            else:
                self._refuse(400, "broken line")
            return
        self.state.puts_allowed -= 1
        name = self.path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != name:
            self._refuse(400, "not these bytes")
            return
        self.state.blobs[name] = body
        self._reply(200, {})

    def do_POST(self) -> None:
        if self._is_down():
            return
        body, path = self._body(), urlsplit(self.path).path
        if path.startswith("/cas/"):
            self._write_cas(path.removeprefix("/cas"), body)
        elif not self._allowed():
            pass
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._reply(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            repo = path.removeprefix("/api/models/").partition("/preupload/")[0]
            files = [self._mode(repo, file) for file in json.loads(body)["files"]]
            self._reply(200, {"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif "/commit/" in path:
            self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)
        else:
            self._refuse(404, f"no {path}")

    # --- what a repository holds

    def _describe(self, name: str, *, tree: bool, under: str | None) -> None:
        if (repo := self.state.repos.get(name)) is None:
            self._refuse(404, "Repository not found", code="RepoNotFound")
        elif not tree:
            siblings = [{"rfilename": file} for file in repo.files]
            facts = {"id": name, "modelId": name, "sha": repo.revision, "private": repo.private}
            self._reply(200, {**facts, "siblings": siblings, "tags": [], "downloads": 0})
        elif under:
            self._refuse(404, "no such folder", code="EntryNotFound")
        else:
            self._reply(200, [self._entry(repo, file) for file in repo.files])

    def _entry(self, repo: Repo, file: str) -> dict[str, Any]:
        row: dict[str, Any] = {"type": "file", "path": file, "oid": _git_oid(repo.files[file])}
        row["size"] = size = self._size(repo, file)
        if file in repo.large:
            row["lfs"] = {"oid": repo.large[file], "size": size, "pointerSize": 134}
            if self.state.cas is not None and (
                xet := self.state.cas.by_sha256.get(repo.large[file])
            ):
                row["xetHash"] = xet.hash
        return row

    def _size(self, repo: Repo, file: str) -> int:
        xet = self._xet(repo, file)
        return len(repo.files[file]) if xet is None else xet.size

    def _xet(self, repo: Repo, file: str) -> XetFile | None:
        """The file, where it has come by Xet."""
        if self.state.cas is None:
            return None
        return self.state.cas.by_sha256.get(repo.large.get(file, ""))

    def _resolve(self, name: str, file: str) -> None:
        repo = self.state.repos.get(name)
        if repo is None or file not in repo.files:
            code = "RepoNotFound" if repo is None else "EntryNotFound"
            self._refuse(404, "not found", code=code)
            return
        sha256 = repo.large.get(file)
        headers = {
            "X-Repo-Commit": repo.revision,
            "ETag": f'"{sha256 or _git_oid(repo.files[file])}"',
            "Accept-Ranges": "bytes",
        }
        if (xet := self._xet(repo, file)) is not None:
            token = f"{self.state.address}/api/models/{name}/xet-read-token/{repo.revision}"
            headers |= {
                "X-Xet-Hash": xet.hash,
                "X-Linked-Size": str(xet.size),
                "Link": f'<{token}>; rel="xet-auth"',
            }
        self._send(repo.files[file], headers)

    # --- uploads

    def _create(self, wish: dict[str, Any]) -> None:
        name = "/".join(filter(None, (wish.get("organization"), wish["name"])))
        known = name in self.state.repos
        visible = wish.get("visibility") == "private" or bool(wish.get("private"))
        self.state.repos.setdefault(name, Repo(private=visible))
        answer = {"url": f"{self.state.address}/{name}", "name": name}
        self._reply(409 if known else 200, {**answer, "error": "exists"} if known else answer)

    def _mode(self, name: str, file: dict[str, Any]) -> dict[str, Any]:
        repo = self.state.repos[name]
        large = file["path"].endswith(LARGE)
        row = {"path": file["path"], "uploadMode": "lfs" if large else "regular"}
        if file["path"] in repo.files:
            row["oid"] = repo.large.get(file["path"]) or _git_oid(repo.files[file["path"]])
        return {**row, "shouldIgnore": False}

    def _batch(self, wish: dict[str, Any]) -> None:
        objects = []
        for each in wish["objects"]:
            row = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.state.blobs:
                row["actions"] = {"upload": {"href": f"{self.state.address}/blobs/{each['oid']}"}}
            objects.append(row)
        self._reply(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, body: bytes) -> None:
        repo, cas = self.state.repos[name], self.state.cas
        files, large = dict(repo.files), dict(repo.large)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                large[value["path"]] = oid = value["oid"]
                if oid not in self.state.blobs and (cas is None or oid not in cas.by_sha256):
                    self._refuse(422, f"{oid} has not been uploaded")
                    return
                files[value["path"]] = self.state.blobs.get(oid, b"")
        repo.files, repo.large = files, large
        repo.commits += 1
        url = f"{self.state.address}/{name}/commit/{repo.revision}"
        answer = {"success": True, "commitUrl": url, "commitOid": repo.revision, "hookOutput": ""}
        self._reply(200, answer)

    # --- Xet

    def _xet_token(self) -> None:
        if self.state.cas is None:
            self._refuse(404, "no Xet here")
            return
        url, expires = f"{self.state.address}/cas", int(time.time()) + 3600
        row = {"accessToken": self.state.cas.token, "casUrl": url, "exp": expires}
        headers = {
            "X-Xet-Cas-Url": url,
            "X-Xet-Access-Token": self.state.cas.token,
            "X-Xet-Token-Expiration": str(expires),
        }
        self._reply(200, row, headers)

    def _write_cas(self, path: str, body: bytes) -> None:
        cas = self.state.cas
        if cas is None or not self._is_cas_s(cas):
            self._refuse(401, "not with this token")
        elif match := re.fullmatch(r"/v1/xorbs/default/([0-9a-f]{64})", path):
            if cas.put_xorb(match[1], body):
                self._reply(200, {"was_inserted": True})
            else:
                self._refuse(400, "broken line")
        elif path == "/v1/shards":
            cas.put_shard(body)
            self._reply(200, {"result": 1})
        else:  # of newer versions of the protocol, which the client can do without
            self._refuse(404, "not spoken here")

    def _read_cas(self, path: str) -> None:
        cas = self.state.cas
        if cas is None:
            self._refuse(404, "no Xet here")
        elif match := re.fullmatch(r"/xorb/([0-9a-f]{64})", path):  # a signed address: no token
            self._send(cas.xorbs[match[1]], {})
        elif not self._is_cas_s(cas):
            self._refuse(401, "not with this token")
        elif match := re.fullmatch(r"/v1/reconstructions/([0-9a-f]{64})", path):
            start, end = self._range(10**15)
            found = cas.reconstruction(match[1], start, end, f"{self.state.address}/cas/xorb")
            if found is None:
                self._refuse(416, "past the end")
            else:
                self._reply(200, found)
        else:
            self._refuse(404, "not spoken here")

    def _is_cas_s(self, cas: Cas) -> bool:
        """Whether the token is the storage's. The Hub's has no business here."""
        return self.headers.get("Authorization") == f"Bearer {cas.token}"

    # --- HTTP

    def _is_down(self) -> bool:
        self.state.requests.append(f"{self.command} {self.path}")
        if self.state.status is None:
            return False
        self._body()
        # An answer that quotes the request, as some do.
        self._refuse(self.state.status, f"no: {self.headers.get('Authorization')}")
        return True

    def _allowed(self, *, public: str | None = None) -> bool:
        repo = self.state.repos.get(public or "")
        if repo is not None and not repo.private:
            return True
        if self.headers.get("Authorization") == f"Bearer {self.state.token}":
            return True
        self._refuse(401, "Invalid credentials")
        return False

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _range(self, size: int) -> tuple[int, int]:
        """The bytes that are asked for, from the first up to the last and one."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            return 0, size
        return int(match[1]), min(size, int(match[2]) + 1 if match[2] else size)

    def _send(self, content: bytes, headers: dict[str, str]) -> None:
        start, end = self._range(len(content))
        if "Range" in self.headers:
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
        self.send_response(206 if "Range" in self.headers else 200)
        self._end(content[start:end], headers)

    def _refuse(self, status: int, why: str, *, code: str | None = None) -> None:
        self._reply(status, {"error": why}, {"X-Error-Code": code} if code else {})

    def _reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        type_ = {"Content-Type": "application/json"}
        self._end(json.dumps(content).encode(), {**type_, **(headers or {})})

    def _end(self, data: bytes, headers: dict[str, str]) -> None:
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
