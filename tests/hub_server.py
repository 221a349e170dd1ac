"""A stand-in for the Hugging Face hub, as far as `huggingface_hub` uses it for dataset repositories: no hub, on this
machine, in memory.

Endpoints: create a repository; its facts; tree (in pages); paths-info; preupload; LFS batch, basic and multipart
upload, verify; commit (NDJSON); validate-yaml; resolve (HEAD, GET, ranges). The protocol of Xet is not there: its
client is switched off (`HF_HUB_DISABLE_XET`).

It takes nothing on trust: the sha256 and size of an upload must be those that were announced, a commit may name only
what was uploaded, only an existing file can be deleted, and every address of an upload needs its signature. `faults`
are answered before anything else. `hook` sees every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

TOKEN = "hf_" + "standin9f3b" * 3
READER = "hf_" + "reader4c21" * 3
"""A token that may only read."""
SIGNATURE = "signature7d5e" * 3
PAGE = 4
MULTIPART_BYTES, CHUNK_BYTES = 6_000, 4_000
LFS = re.compile(r".*\.(tar|parquet|png)")
SIZES = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B"]
LICENCES = ["apache-2.0", "mit", "cc-by-4.0", "cc0-1.0", "openrail++", "unknown", "other"]


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Fault:
    """What is done with the next requests of a kind."""

    method: str
    path: str
    """A regular expression."""
    status: int = 0
    """Status of the answer; 0: the connection is closed, without an answer."""
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "told to fail"
    after: bool = False
    """Whether the request is carried out before the fault."""
    skip: int = 0
    """So many requests of the kind are let through first."""


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, str, dict[str, bytes]]]
    """Id, message and files of each commit."""
    ignored: str = ""
    """A regular expression: paths that the repository's .gitignore names."""

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][2]


class Hub:
    """The state of the stand-in."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.repos: dict[str, Repo] = {}
        self.store: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.hook: Callable[[str, str], object] = lambda method, path: None
        self.lock = threading.RLock()

    @property
    def uploads(self) -> list[str]:
        """The sha256 of each whole upload, in order."""
        found = []
        for method, path in self.requests:
            if method == "PUT" and path.startswith("/lfs/"):
                found.append(path.split("/")[2])
            if method == "POST" and path.startswith("/complete/"):
                found.append(path.split("/")[2])
        return found

    @property
    def writes(self) -> list[tuple[str, str]]:
        """The requests that change something."""
        return [each for each in self.requests if each[0] in ("PUT", "DELETE") or re.search("commit|create", each[1])]

    def create(self, name: str, private: bool = False) -> Repo:
        self.repos[name] = Repo(private, [("0" * 40, "initial commit", {".gitattributes": b"*.tar filter=lfs\n"})])
        return self.repos[name]

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and re.search(fault.path, path) and fault.times:
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        hub = self.hub
        fault = hub.fault(self.command, path)
        if fault and not fault.status and not fault.after:
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)  # cut in the middle of the body
            self.close_connection = True
            return
        body = self._body()
        hub.hook(self.command, path)
        if fault and not fault.after:
            self._answer(fault.status, json.dumps({"error": fault.message}).encode(), fault.headers)
            return
        with hub.lock:
            hub.requests.append((self.command, path))
            try:
                answer = self._dispatch(path, body)
            except Refused as refused:
                headers = {"X-Error-Message": refused.message}
                if refused.code:
                    headers["X-Error-Code"] = refused.code
                self._answer(refused.status, json.dumps({"error": refused.message}).encode(), headers)
                return
        if fault:
            self.close_connection = True
            return
        if isinstance(answer, tuple):
            self._answer(*answer)
        else:
            self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    # ------------------------------------------------------------------------------------------------------------------

    def _dispatch(self, path: str, body: bytes) -> Any:
        for method, pattern, answer in ROUTES:
            if method == self.command and (found := re.fullmatch(pattern, path)):
                return answer(self, *found.groups(), body)
        raise Refused(404, f"the stand-in has no {self.command} {path}")

    def _token(self, write: bool) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN, READER):
            raise Refused(401, "Invalid credentials in Authorization header")
        if write and not token:
            raise Refused(401, "Invalid username or password.")
        if write and token == READER:
            raise Refused(403, "Forbidden: you must have write access to this repository")

    def _repo(self, name: str, write: bool = False) -> Repo:
        self._token(write)
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.headers.get("Authorization")):
            raise Refused(404, "Repository not found", "RepoNotFound")
        return repo

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self._repo(name)
        if revision == "main":
            commit, _, files = repo.commits[-1]
            return commit, files
        for commit, _, files in repo.commits:
            if commit == revision:
                return commit, files
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def create(self, body: bytes) -> Any:
        self._token(write=True)
        asked = json.loads(body)
        assert asked["type"] == "dataset"
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        if name in self.hub.repos:
            raise Refused(409, "You already created this dataset repo")
        if asked["organization"] == "others":
            raise Refused(403, "Forbidden: you don't have the rights to create a dataset under the namespace others")
        self.hub.create(name, asked.get("visibility") == "private")
        return {"url": f"{self.hub.endpoint}/datasets/{name}"}

    def facts(self, name: str, revision: str | None, body: bytes) -> Any:
        commit, files = self._files(name, revision or "main")
        return {
            "id": name,
            "sha": commit,
            "private": self.hub.repos[name].private,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": each} for each in files],
        }

    def _listed(self, path: str, content: bytes) -> dict[str, Any]:
        facts: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
        if LFS.fullmatch(path):
            facts["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return facts

    def tree(self, name: str, revision: str, folder: str | None, body: bytes) -> Any:
        _, files = self._files(name, revision)
        asked = parse_qs(urlsplit(self.path).query)
        prefix = f"{folder}/" if folder else ""
        below = {path: content for path, content in files.items() if path.startswith(prefix)}
        if folder and not below:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        found: dict[str, dict[str, Any]] = {}
        for path, content in sorted(below.items()):
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                name_ = prefix + "/".join(parts[:depth])
                found[name_] = {"type": "directory", "path": name_, "size": 0, "oid": "1" * 40}
            found[path] = self._listed(path, content)
        if asked.get("recursive", ["false"])[0].lower() != "true":
            found = {path: entry for path, entry in found.items() if "/" not in path[len(prefix) :]}
        entries, start = list(found.values()), int(asked.get("cursor", ["0"])[0])
        headers = {"Content-Type": "application/json"}
        if start + PAGE < len(entries):
            following = {**{key: values[0] for key, values in asked.items()}, "cursor": str(start + PAGE)}
            query = "&".join(f"{key}={quote(value)}" for key, value in following.items())
            headers["Link"] = f'<{self.hub.endpoint}{quote(urlsplit(unquote(self.path)).path)}?{query}>; rel="next"'
        return 200, json.dumps(entries[start : start + PAGE]).encode(), headers

    def paths_info(self, name: str, revision: str, body: bytes) -> Any:
        _, files = self._files(name, revision)
        values = parse_qs(body.decode()) if not body.startswith(b"{") else json.loads(body)
        return [self._listed(path, files[path]) for path in values.get("paths", []) if path in files]

    def preupload(self, name: str, revision: str, body: bytes) -> Any:
        repo, found = self._repo(name, write=True), []
        self._files(name, revision)
        for file in json.loads(body)["files"]:
            old = repo.files.get(file["path"])
            lfs = bool(LFS.fullmatch(file["path"]))
            oid = None if old is None else hashlib.sha256(old).hexdigest() if lfs else blob_id(old)
            ignored = bool(repo.ignored and re.fullmatch(repo.ignored, file["path"]))
            mode = "lfs" if lfs else "regular"
            found.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        return {"files": found}

    def batch(self, name: str, body: bytes) -> Any:
        self._repo(name, write=True)
        asked = json.loads(body)
        assert (asked["operation"], asked["hash_algo"]) == ("upload", "sha256")
        found = []
        for each in asked["objects"]:
            oid, size = each["oid"], each["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.store:
                end, signed = self.hub.endpoint, f"?X-Amz-Signature={SIGNATURE}"
                verify = {"href": f"{end}/verify"}
                upload: dict[str, Any] = {"href": f"{end}/lfs/{oid}/{size}{signed}"}
                if size > MULTIPART_BYTES:
                    parts = range(1, -(-size // CHUNK_BYTES) + 1)
                    header = {str(part): f"{end}/part/{oid}/{part}{signed}" for part in parts}
                    upload = {
                        "href": f"{end}/complete/{oid}/{size}{signed}",
                        "header": {"chunk_size": str(CHUNK_BYTES), **header},
                    }
                entry["actions"] = {"upload": upload, "verify": verify}
            found.append(entry)
        return {"transfer": "basic", "objects": found}

    def _signed(self) -> None:
        if parse_qs(urlsplit(self.path).query).get("X-Amz-Signature") != [SIGNATURE]:
            raise Refused(403, "SignatureDoesNotMatch")
        if self.headers.get("Authorization"):
            raise Refused(400, "a token was sent to the store")

    def _keep(self, oid: str, size: str, content: bytes) -> None:
        if len(content) != int(size) or hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "the upload is not what was announced")
        self.hub.store[oid] = content

    def upload(self, oid: str, size: str, body: bytes) -> Any:
        self._signed()
        self._keep(oid, size, body)
        return {}

    def part(self, oid: str, part: str, body: bytes) -> Any:
        self._signed()
        self.hub.parts[oid, int(part)] = body
        return 200, b"", {"ETag": hashlib.md5(body).hexdigest()}

    def complete(self, oid: str, size: str, body: bytes) -> Any:
        asked = json.loads(body)
        parts = [self.hub.parts[oid, part["partNumber"]] for part in asked["parts"]]
        for part, content in zip(asked["parts"], parts):
            assert part["etag"] == hashlib.md5(content).hexdigest()
        self._keep(oid, size, b"".join(parts))
        return {}

    def verify(self, body: bytes) -> Any:
        self._token(write=True)
        asked = json.loads(body)
        if len(self.hub.store.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "no such upload")
        return {}

    def commit(self, name: str, revision: str, body: bytes) -> Any:
        repo = self._repo(name, write=True)
        self._files(name, revision)
        files, message = dict(repo.files), ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    content = self.hub.store.get(value["oid"])
                    if content is None or len(content) != value["size"]:
                        raise Refused(400, f"{value['path']}: its content was not uploaded")
                    files[value["path"]] = content
                case "deletedFile":
                    if value["path"] not in files:
                        raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                    del files[value["path"]]
                case _:
                    raise Refused(400, f"the stand-in knows no {item['key']}")
        assert message
        commit = hashlib.sha1(f"{len(repo.commits)} {message}".encode()).hexdigest()
        repo.commits.append((commit, message, files))
        return {
            "success": True,
            "commitOid": commit,
            "commitUrl": f"{self.hub.endpoint}/datasets/{name}/commit/{commit}",
        }

    def validate(self, body: bytes) -> Any:
        asked = json.loads(body)
        assert asked["repoType"] == "dataset"
        errors = [{"message": each} for each in mistakes(asked["content"])]
        return (400, json.dumps({"errors": errors}).encode(), {}) if errors else {"errors": [], "warnings": []}

    def resolve(self, name: str, revision: str, path: str, body: bytes) -> Any:
        commit, files = self._files(name, revision)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = files[path]
        lfs = LFS.fullmatch(path)
        etag = hashlib.sha256(content).hexdigest() if lfs else blob_id(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return 206, content[first : last + 1], headers
        return 200, content, headers


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("POST", "/api/repos/create", Handler.create),
    ("GET", rf"/api/datasets/{NAME}(?:/revision/([^/]+))?", Handler.facts),
    ("GET", rf"/api/datasets/{NAME}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    ("POST", rf"/api/datasets/{NAME}/paths-info/([^/]+)", Handler.paths_info),
    ("POST", rf"/api/datasets/{NAME}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"/api/datasets/{NAME}/commit/([^/]+)", Handler.commit),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", rf"/datasets/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/(\w{64})/(\d+)", Handler.upload),
    ("PUT", r"/part/(\w{64})/(\d+)", Handler.part),
    ("POST", r"/complete/(\w{64})/(\d+)", Handler.complete),
    ("POST", "/verify", Handler.verify),
    ("GET", rf"/datasets/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("HEAD", rf"/datasets/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]


def mistakes(card: str) -> list[str]:
    """What is wrong with the header of a dataset card, by the rules that the hub documents for the fields used here."""
    try:
        header = yaml.safe_load(card.split("---\n")[1])
    except (yaml.YAMLError, IndexError) as error:
        return [f"no valid YAML: {error}"]
    found = []
    for name, good in (
        ("pretty_name", lambda value: isinstance(value, str) and value),
        ("license", lambda value: value in LICENCES),
        ("size_categories", lambda value: isinstance(value, list) and set(value) <= {*SIZES, "n>1T"}),
        ("task_categories", lambda value: isinstance(value, list) and {*value} <= {"text-to-image", "image-to-image"}),
        ("tags", lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value)),
        ("language", lambda value: all(re.fullmatch("[a-z]{2,3}", each) for each in value)),
    ):
        if name in header and not good(header[name]):
            found.append(f'"{name}" is not valid')
    names = [config["config_name"] for config in header.get("configs", [])]
    for config in header.get("configs", []):
        files = config["data_files"]
        if not all(isinstance(path, str) for part in files for path in part["path"]):
            found.append(f"{config['config_name']}: a path is no text")
    if len(set(names)) < len(names) or not all(re.fullmatch(r"\w+", name) for name in names):
        found.append("configs: names")
    return found


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # the client may be gone
            super().handle_error(request, client_address)


@contextmanager
def standing_in() -> Iterator[Hub]:
    """A stand-in that answers, until the block ends."""
    hub = Hub()
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
