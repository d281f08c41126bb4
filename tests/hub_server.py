"""A model hub on loopback that answers over real HTTP as huggingface.co does, and that can be told to misbehave.

Two servers: the hub with its API, its redirects and its small files, and the store ("CDN") that large files are redirected
to. What the hub's client asks was read off huggingface_hub's source.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LARGE = (".safetensors", ".bin")


@dataclass
class Repository:
    """commits: files by name, by commit; main: the commit that the branch stands for."""

    commits: dict[str, dict[str, bytes]]
    main: str
    licence: str = "apache-2.0"
    gated: bool = False


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(json.dumps([[name, git_hash(files[name])] for name in sorted(files)]).encode()).hexdigest()


@dataclass
class Hub:
    """repositories: by name; moved: old name to new; requests: "METHOD PATH" as they came, with the range asked for.

    cut: by file, how many bytes each next answer sends before the connection is closed; reset: whether it is closed with
    a reset. wrong: bytes sent in the place of a file's. stall: seconds before any answer. writers: the owner that a
    token writes for; uploads: what was put into the store, by its SHA-256.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    cut: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    reset: bool = False
    wrong: dict[str, bytes] = field(default_factory=dict)
    stall: float = 0.0
    token: str = ""
    writers: dict[str, str] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)

    def publish(self, name: str, folder: Path, licence: str = "apache-2.0", gated: bool = False) -> str:
        """The files of a folder, and of those in it, as a new commit of a repository's main branch."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        files["README.md"] = f"---\nlicense: {licence}\n---\n# {name}\n".encode()
        commit = commit_of(files)
        before = self.repositories[name].commits if name in self.repositories else {}
        self.repositories[name] = Repository({**before, commit: files}, commit, licence, gated)
        return commit

    def __enter__(self) -> Hub:
        self.servers = [_Server(("127.0.0.1", 0), kind) for kind in (_HubHandler, _StoreHandler)]
        for server in self.servers:
            server.daemon_threads = True
            server.hub = self  # type: ignore[attr-defined]
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.url, self.store = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def forget(self) -> None:
        """No faults, no requests."""
        self.requests.clear()
        self.cut.clear()
        self.wrong.clear()
        self.reset, self.stall, self.token = False, 0.0, ""
        for repository in self.repositories.values():
            repository.gated = False


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        # Clients that hang up are what some of the tests are about.
        return


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        return

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {self.path}{f' {wanted}' if wanted else ''}")
        if self.hub.stall:
            time.sleep(self.hub.stall)
        self.respond()

    def respond(self) -> None:
        raise NotImplementedError

    def reply(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.reply(status, {"X-Error-Code": code, "X-Error-Message": message}, json.dumps({"error": message}).encode())

    def send_file(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        """With ranges, and with whatever fault was asked for."""
        length = len(content)
        content = self.hub.wrong.get(name, content)
        content = content + bytes(max(0, length - len(content)))
        start = int(range_match[1]) if (range_match := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        status = 206 if start else 200
        if start:
            headers = {**headers, "Content-Range": f"bytes {start}-{length - 1}/{length}"}
        content = content[start:length]
        cuts = self.hub.cut.get(name)
        if self.command == "HEAD" or not cuts:
            self.reply(status, headers, content)
            return
        self.send_response(status)
        for header, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(content[: cuts.pop(0)])
        self.wfile.flush()
        if self.hub.reset:
            time.sleep(0.2)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close() if self.hub.reset else self.connection.shutdown(socket.SHUT_RDWR)


class _HubHandler(_Handler):
    def respond(self) -> None:
        path = self.path.partition("?")[0].replace("%2F", "/")
        api = re.fullmatch(r"/api/models/(.+?)(?:/revision/([^/]+))?", path)
        small = re.fullmatch(r"/api/resolve-cache/models/(.+)/([0-9a-f]{40})/(.+)", path)
        resolve = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        match = small or resolve or api
        if match is None:
            self.refuse(404, "NotFound", "no such page")
            return
        name, revision = match[1], match[2] or "main"
        if new := self.hub.moved.get(name):
            self.reply(307, {"Location": path.replace(f"/{name}", f"/{new}", 1) + ("?blobs=True" if api else "")})
            return
        repository = self.hub.repositories.get(name)
        if repository is None:
            # What the hub answers to somebody whom it does not know, since it may be a private one.
            self.refuse(401, "RepoNotFound", "Invalid username or password.")
            return
        if self.headers.get("Authorization") == "Bearer expired":
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return
        commit = repository.main if revision == "main" else revision
        if commit not in repository.commits:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files = repository.commits[commit]
        if match is api:
            self.reply(200, {"Content-Type": "application/json"}, json.dumps(self.info(name, commit)).encode())
            return
        if repository.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.refuse(401, "GatedRepo", f"Access to model {name} is restricted. Please log in.")
            return
        file = match[3]
        if file not in files:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        content = files[file]
        if file.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            self.reply(302, {
                "X-Repo-Commit": commit, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)),
                "ETag": f'"{git_hash(content)}"', "Location": f"{self.hub.store}/{digest}/{file}",
            })  # fmt: skip
        elif match is resolve:
            self.reply(307, {
                "X-Repo-Commit": commit, "ETag": f'"{git_hash(content)}"',
                "Location": f"/api/resolve-cache/models/{name}/{commit}/{file}",
            })  # fmt: skip
        else:
            self.send_file(file, content, {"X-Repo-Commit": commit, "ETag": f'"{git_hash(content)}"'})

    def info(self, name: str, commit: str) -> dict[str, object]:
        repository = self.hub.repositories[name]
        siblings = []
        for file, content in repository.commits[commit].items():
            sibling: dict[str, object] = {"rfilename": file, "size": len(content), "blobId": git_hash(content)}
            if file.endswith(LARGE):
                digest = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            siblings.append(sibling)
        return {
            "_id": "0", "id": name, "modelId": name, "sha": commit, "private": False, "disabled": False,
            "gated": "auto" if repository.gated else False, "downloads": 1, "likes": 0, "siblings": siblings,
            "tags": ["pytorch", f"license:{repository.licence}"], "cardData": {"license": repository.licence},
        }  # fmt: skip

    # --- writing: a repository, which files are large, where those go, the commit ---

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"POST {path}")
        if path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
            return
        owner = self.hub.writers.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or owner}/{wanted['name']}"
        else:
            match = re.fullmatch(
                r"/(?:api/models/)?(.+?)(?:\.git/info/lfs/objects/batch|/(?:preupload|commit)/main)", path
            )
            assert match is not None, path
            name = match[1]
        if owner is None or name.partition("/")[0] != owner:
            self.refuse(403, "", f"You don't have the rights to write to {name}")
        elif path == "/api/repos/create":
            if name in self.hub.repositories:
                content = {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
                self.reply(409, {"X-Error-Message": content["error"]}, json.dumps(content).encode())
                return
            files = {".gitattributes": b""}
            self.hub.repositories[name] = Repository({commit_of(files): files}, commit_of(files))
            self.answer({"url": f"{self.hub.url}/{name}", "name": name})
        elif path.endswith("/preupload/main"):
            files_to_come = json.loads(body)["files"]
            modes = {each["path"]: "lfs" if each["path"].endswith(LARGE) else "regular" for each in files_to_come}
            self.answer(
                {"files": [{"path": key, "uploadMode": mode, "shouldIgnore": False} for key, mode in modes.items()]}
            )
        elif path.endswith("/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.store}/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        else:
            self.commit(name, [json.loads(line) for line in body.splitlines()])

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repository = self.hub.repositories[name]
        files = dict(repository.commits[repository.main])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.main = commit_of(files)
        repository.commits[repository.main] = files
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{repository.main}", "commitOid": repository.main})

    def answer(self, document: object) -> None:
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(document).encode())


class _StoreHandler(_Handler):
    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.requests.append(f"PUT {self.path}")
        if hashlib.sha256(content).hexdigest() != self.path.strip("/"):
            self.refuse(400, "", "checksum")
            return
        self.hub.uploads[self.path.strip("/")] = content
        self.reply(200, {})

    def respond(self) -> None:
        # A signed URL: whoever has it may read, and an account's token has no business here.
        assert "Authorization" not in self.headers
        digest, _, name = self.path.strip("/").partition("/")
        for repository in self.hub.repositories.values():
            for files in repository.commits.values():
                if name in files and hashlib.sha256(files[name]).hexdigest() == digest:
                    self.send_file(name, files[name], {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"})
                    return
        self.refuse(404, "", "no such object")
