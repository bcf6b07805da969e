"""A fake Hub on localhost with the HTTP routes that `huggingface_hub` needs to push and pull.

It keeps repositories in memory, accepts one token, and can be made to fail.
"""

import base64
import hashlib
import json
import re
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKEN = "not-a-real-token"
LFS_SUFFIXES = (".safetensors", ".png")  # of files that the Hub keeps outside git


class FakeHub(ThreadingHTTPServer):
    """A server with `repos` by name: `private`, and `commits` of (message, all files)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.objects = {}, {}
        self.datasets = {}  # by name: "public", "gated" or "private"
        self.requests = Counter()  # number of requests by kind
        self.cut_before = set()  # kinds whose connection is cut before they take effect
        self.cut_after = (
            set()
        )  # kinds that take effect, with the connection cut before the response
        self.responses = {}  # by kind: status and headers of a response without effect
        self.before_reply = {}  # by kind: a function to call before the request takes effect
        self.transfer = "basic"  # protocol for large files
        self.forbidden_organizations = set()  # without write access
        self.downloaded = set()  # names of requested files
        self.received = b""  # bodies of all requests

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, name):
        return self.repos[name]["commits"][-1][1] if self.repos[name]["commits"] else {}

    @contextmanager
    def running(self):
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()


ROUTES = [
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/main", "preupload"),
    ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/commit/main", "commit"),
    ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/objects/(?P<oid>\w+)", "object"),
    ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>\w+)", "tree"),
    ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)(?:/revision/\w+)?", "info"),
    ("GET", r"/api/datasets/(?P<name>[^/]+/[^/]+)", "dataset"),
    ("(GET|HEAD)", r"/(?P<name>[^/]+/[^/]+)/resolve/\w+/(?P<file>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def _serve(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.received += body
        for method, pattern, kind in ROUTES:
            if re.fullmatch(method, self.command) and (match := re.fullmatch(pattern, path)):
                self.server.requests[kind] += 1
                self.kind = kind
                if kind in self.server.before_reply:
                    self.server.before_reply.pop(kind)()
                if kind in self.server.cut_before:
                    self._cut()
                elif kind in self.server.responses:
                    code, headers = self.server.responses[kind]
                    self._send(code, {"error": f"no {kind} today"}, **headers)
                else:
                    getattr(self, f"_{kind}")(body, **match.groupdict())
                return
        self.kind = None
        self._send(404, {"error": f"no route for {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    def log_message(self, format, *args):
        pass

    def _cut(self):
        self.connection.close()
        self.close_connection = True

    def _send(self, code, content, **headers):
        if self.kind in self.server.cut_after:
            self._cut()
            return
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _dataset(self, body, name):
        state = self.server.datasets.get(name)
        if state is None or (state == "private" and not self.headers.get("Authorization")):
            self._send(401, {"error": "Invalid username or password."})
            return
        gated = "auto" if state == "gated" else False
        self._send(
            200, {"id": name, "private": state == "private", "gated": gated, "disabled": False}
        )

    def _is_authorized(self):
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        message = "Invalid credentials in Authorization header"
        self._send(401, {"error": message}, X_Error_Message=message)
        return False

    def _repo(self, name):
        """Return the repository if the client may see it."""
        repo = self.server.repos.get(name)
        if repo is None or (repo["private"] and not self.headers.get("Authorization")):
            self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return repo if not repo["private"] or self._is_authorized() else None

    def _create(self, body):
        request = json.loads(body)
        name = f"{request['organization']}/{request['name']}"
        if not self._is_authorized():
            return
        if request["organization"] in self.server.forbidden_organizations:
            message = f'You don\'t have the rights to create a model under the namespace "{name}"'
            self._send(403, {"error": message}, X_Error_Message=message)
        elif name in self.server.repos:
            message = "You already created this model repo"
            self._send(409, {"error": message}, X_Error_Message=message)
        else:
            private = request.get("visibility") == "private"
            self.server.repos[name] = {"private": private, "commits": []}
            self._send(200, {"url": f"{self.server.address}/{name}", "name": name, "id": name})

    def _validate(self, body):
        """Check the card's metadata by some of the rules of the real Hub."""
        content = json.loads(body)["content"]
        metadata = yaml.safe_load(content.split("---")[1])
        errors = []
        for base in [metadata.get("base_model") or []]:
            for name in [base] if isinstance(base, str) else base:
                if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith((".", "/")):
                    errors.append({"message": '"base_model" is not a Hub id'})
        if metadata.get("library_name") not in ("peft", "mlx", "transformers"):
            errors.append({"message": '"library_name" is unknown'})
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def _info(self, body, name):
        if (repo := self._repo(name)) is not None:
            sha = self._sha(name)
            names = [{"rfilename": file} for file in self.server.files(name)]
            if "blobs=true" in self.path.lower():
                names = [_entry(file, data) for file, data in self.server.files(name).items()]
            self._send(
                200,
                {"id": name, "modelId": name, "sha": sha, "private": repo["private"],
                 "siblings": names, "tags": [], "downloads": 0, "likes": 0},
            )  # fmt: skip

    def _tree(self, body, name, revision):
        if self._repo(name) is not None:
            files = self.server.files(name)
            self._send(
                200,
                [
                    {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
                    for path, data in files.items()
                ],
            )

    def _sha(self, name):
        messages = repr([c[0] for c in self.server.repos[name]["commits"]])
        return hashlib.sha1(messages.encode()).hexdigest()

    def _preupload(self, body, name):
        if self._repo(name) is None or not self._is_authorized():
            return
        existing = self.server.files(name)
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": _oid(f["path"], existing[f["path"]]) if f["path"] in existing else None,
            }
            for f in json.loads(body)["files"]
        ]
        self._send(200, {"files": files})

    def _batch(self, body, name):
        objects = []
        for requested in json.loads(body)["objects"]:
            entry = dict(requested)
            if requested["oid"] not in self.server.objects:
                href = f"{self.server.address}/objects/{requested['oid']}"
                entry["actions"] = {"upload": {"href": href}}
            objects.append(entry)
        kind = "application/vnd.git-lfs+json"
        self._send(200, {"transfer": self.server.transfer, "objects": objects}, Content_Type=kind)

    def _object(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._send(200, b"")

    def _commit(self, body, name):
        if self._repo(name) is None or not self._is_authorized():
            return
        files, message = dict(self.server.files(name)), ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", self._sha(name)) != self._sha(name):
                    message = "A commit has happened since. Please refresh and try again."
                    self._send(412, {"error": message}, X_Error_Message=message)
                    return
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert entry["key"] == "lfsFile"
                files[value["path"]] = self.server.objects[value["oid"]]
        self.server.repos[name]["commits"].append((message, files))
        sha = self._sha(name)
        url = f"{self.server.address}/{name}/commit/{sha}"
        self._send(200, {"commitUrl": url, "commitOid": sha})

    def _resolve(self, body, name, file):
        if self._repo(name) is None:
            return
        data = self.server.files(name).get(file)
        self.server.downloaded.add(file)
        if data is None:
            self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        else:
            start = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "bytes=0-")
            end = int(start[2]) + 1 if start[2] else len(data)
            part = data[int(start[1]) : end]
            tag = f'"{_oid(file, data)}"'
            self._send(200, part, ETag=tag, X_Repo_Commit=self._sha(name))


def _entry(path, data):
    """Return a file as the Hub lists it; git has a pointer in place of a large file."""
    entry = {"rfilename": path, "size": len(data), "blobId": _git_oid(data)}
    if path.endswith(LFS_SUFFIXES):
        digest = hashlib.sha256(data).hexdigest()
        entry["blobId"] = _git_oid(b"a pointer to " + digest.encode())
        entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
    return entry


def _git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _oid(path, data):
    return hashlib.sha256(data).hexdigest() if path.endswith(LFS_SUFFIXES) else _git_oid(data)


@contextmanager
def using_fake_hub(patch, cache):
    """Let `huggingface_hub` talk to a fake Hub, with a token that it accepts."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with FakeHub().running() as hub:
        patch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setattr(_http.time, "sleep", lambda seconds: None)  # between the client's retries
        yield hub


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    with using_fake_hub(monkeypatch, tmp_path / "hub-cache") as hub:
        yield hub
