"""A small local server that answers as the Hugging Face hub does, as far as loading and pushing a model go.

Models are public, writing needs any token, and ``.safetensors`` are LFS files: uploaded apart from the commit, and
downloaded by a redirect to another host.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

Files = dict[str, bytes]
OWNER = "me"
"""Whose the token is."""


class Request(NamedTuple):
    """One request that the server got."""

    method: str
    path: str
    token: str | None


class HubServer:
    """Serves its repositories at :attr:`url` between ``__enter__`` and ``__exit__``.

    Attributes:
        repos: repository -> commit or branch -> its files.
        gated: repositories whose files need a permission that nobody has.
        private: repositories that were made as private.
        requests: all requests so far.
        cut: how downloads of LFS files go wrong. "whole": a shorter file is sent as if it were whole; "shorter": so,
            but its real size was announced; "dropped": the connection breaks half-way, whenever it is tried.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Files]] = {}
        self.blobs: Files = {}
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.requests: list[Request] = []
        self.cut: Literal["whole", "shorter", "dropped"] | None = None
        hub = self

        class BoundHandler(_Handler):
            server_state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage_url = f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Refuse connections from now on."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def commit(self, repo_id: str, files: Files, branch: str = "main") -> str:
        """Add files to a branch, made if need be; returns the hash of the commit."""
        repo = self.repos.setdefault(repo_id, {})
        content = repo.get(branch, {}) | files
        oid = hashlib.sha1(repr((len(repo), sorted(content.items()))).encode()).hexdigest()
        repo[oid] = repo[branch] = content
        return oid

    def downloads(self) -> list[str]:
        """Names of the files whose content was asked for, in order."""
        gets = [request.path for request in self.requests if request.method == "GET"]
        return [path.split("/")[-1] for path in gets if "/resolve/" in path]


class _Handler(BaseHTTPRequestHandler):
    server_state: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _respond(self, status: int = 200, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _respond_json(self, answer: Any, status: int = 200) -> None:
        self._respond(status, json.dumps(answer).encode(), Content_Type="application/json")

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        token = self.headers.get("Authorization")
        self.server_state.requests.append(Request(self.command, path, token))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for methods, pattern, answer in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods:
                if self.command == "POST" and token is None:
                    return self._respond(401, X_Error_Message="Invalid username or password.")
                return answer(self, *match.groups())
        return self._respond(404)

    do_HEAD = do_GET = do_POST = do_PUT = _answer

    def _resolve(self, repo_id: str, revision: str, filename: str) -> None:
        repo = self.server_state.repos.get(repo_id)
        if repo is None:
            return self._respond(404 if self.headers.get("Authorization") else 401, X_Error_Code="RepoNotFound")
        if repo_id in self.server_state.gated:
            return self._respond(403, X_Error_Code="GatedRepo")
        if revision not in repo:
            return self._respond(404, X_Error_Code="RevisionNotFound")
        files = repo[revision]
        commit = next(oid for oid, content in repo.items() if content is files and len(oid) == 40)
        if filename not in files:
            return self._respond(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = files[filename]
        if not filename.endswith(".safetensors"):
            return self._respond(body=content, X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
        oid = hashlib.sha256(content).hexdigest()
        self.server_state.blobs[oid] = content
        size = len(content) // 2 if self.server_state.cut == "whole" else len(content)
        return self._respond(
            302,
            Location=f"{self.server_state.storage_url}/lfs/{oid}",
            X_Repo_Commit=commit,
            X_Linked_ETag=f'"{oid}"',
            X_Linked_Size=str(size),
        )

    def _storage(self, oid: str) -> None:
        content = self.server_state.blobs[oid]
        if self.server_state.cut is None:
            return self._respond(body=content)
        half = len(content) // 2
        if self.server_state.cut != "dropped":
            return self._respond(body=content[:half])
        if "Range" in self.headers:  # the client goes on where it was, and gets no further
            return self._respond(206, length=half, Content_Range=f"bytes {half}-{len(content) - 1}/{len(content)}")
        return self._respond(body=content[:half], length=len(content))

    def _create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization'] or OWNER}/{asked['name']}"
        exists = repo_id in self.server_state.repos
        if not exists and asked["visibility"] == "private":
            self.server_state.private.add(repo_id)
        if not exists:
            self.server_state.commit(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._respond_json({"url": f"{self.server_state.url}/{repo_id}"}, status=409 if exists else 200)

    def _revision(self, repo_id: str, revision: str) -> None:
        if repo_id not in self.server_state.repos:
            return self._respond(404, X_Error_Code="RepoNotFound")
        if revision not in self.server_state.repos[repo_id]:
            return self._respond(404, X_Error_Code="RevisionNotFound")
        return self._respond_json({"id": repo_id})

    def _validate_yaml(self) -> None:
        import yaml

        header = json.loads(self.body)["content"].split("---\n")[1]
        errors = [] if isinstance(yaml.safe_load(header), dict) else [{"message": "no header"}]
        self._respond_json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def _preupload(self, repo_id: str, revision: str) -> None:
        if revision not in self.server_state.repos[repo_id]:
            return self._respond(404, X_Error_Code="RevisionNotFound")
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
        files = [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in zip(paths, modes, strict=True)]
        return self._respond_json({"files": files})

    def _lfs_batch(self) -> None:
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.server_state.blobs:
                item["actions"] = {"upload": {"href": f"{self.server_state.storage_url}/lfs/{item['oid']}"}}
        self._respond_json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._respond(400)
        self.server_state.blobs[oid] = self.body
        return self._respond()

    def _commit(self, repo_id: str, branch: str) -> None:
        files = {}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server_state.blobs[value["oid"]]
        oid = self.server_state.commit(repo_id, files, branch)
        self._respond_json({"commitUrl": f"{self.server_state.url}/{repo_id}/commit/{oid}", "commitOid": oid})

    def _whoami(self) -> None:
        self._respond_json({"type": "user", "name": OWNER})

    ROUTES: Any = (
        (("GET",), r"/api/whoami-v2", _whoami),
        (("HEAD", "GET"), r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _resolve),
        (("HEAD", "GET"), r"/lfs/(\w+)", _storage),
        (("PUT",), r"/lfs/(\w+)", _lfs_put),
        (("GET",), r"/api/models/([^/]+/[^/]+)/revision/(.+)", _revision),
        (("POST",), r"/api/repos/create", _create),
        (("POST",), r"/api/validate-yaml", _validate_yaml),
        (("POST",), r"/api/models/([^/]+/[^/]+)/preupload/(.+)", _preupload),
        (("POST",), r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", _lfs_batch),
        (("POST",), r"/api/models/([^/]+/[^/]+)/commit/(.+)", _commit),
    )
