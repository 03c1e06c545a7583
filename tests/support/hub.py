"""A small Hub on the loopback interface: repositories in memory, for the real clients of huggingface_hub.

It speaks the part of the Hub's HTTP interface that creates repositories and branches, uploads (regular files inside the
commit, large ones by git LFS) and downloads (metadata, file trees, ranges). Clients must not use Xet: its storage
protocol belongs to another server. Faults are injected by request: a status, or a connection that breaks in the middle.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import pytest
import yaml
from huggingface_hub import constants, hf_api

TOKEN, USER = "hf_secretsecretsecret", "someone"
LARGE = (".safetensors", ".arrow", ".bin", ".png", ".parquet")
API = r"/api/(?P<kind>models|datasets)/(?P<name>[\w.-]+/[\w.-]+)"
PLACE = r"/((?P<kind>datasets)/)?(?P<name>[\w.-]+/[\w.-]+?)"
ROUTES = {  # pattern of "METHOD /path": method of Handler
    "POST /api/repos/create": "create",
    "POST /api/validate-yaml": "validate_yaml",
    "GET /api/whoami-v2": "whoami",
    f"POST {API}/branch/(?P<branch>[^/]+)": "make_branch",
    f"POST {API}/preupload/(?P<revision>[^/]+)": "preupload",
    f"POST {API}/commit/(?P<revision>[^/]+)": "commit",
    f"POST {API}/paths-info/(?P<revision>[^/]+)": "paths_info",
    f"GET {API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?": "tree",
    f"GET {API}(/revision/(?P<revision>[^/]+))?": "info",
    rf"POST {PLACE}\.git/info/lfs/objects/batch": "batch",
    "PUT /objects/(?P<oid>[0-9a-f]{64})": "put_object",
    "POST /objects/verify": "verify",
    "(GET|HEAD) /objects/(?P<oid>[0-9a-f]{64})": "get_object",
    f"(GET|HEAD) {PLACE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": "resolve",
}


@dataclass
class Commit:
    """files: content by path, all of the repository's; changed: the paths that this commit wrote."""

    oid: str
    message: str
    files: dict[str, bytes]
    changed: set[str] = field(default_factory=set)


@dataclass
class Repository:
    visibility: str | None = None
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)  # paths that are stored by git LFS

    def commit(self, files: dict[str, bytes], message: str = "Files", branch: str = "main") -> Commit:
        """Add a commit in which the repository has just these files."""
        before = self.at(branch).files if branch in self.branches else {}
        changed = {path for path, content in files.items() if before.get(path) != content}
        oid = hashlib.sha1(f"{id(self)} {len(self.commits)}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, files, changed))
        self.branches[branch] = oid
        return self.commits[-1]

    def at(self, revision: str = "main") -> Commit | None:
        oid = self.branches.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)

    @property
    def uploads(self) -> list[Commit]:
        return self.commits[1:]  # the first one makes the empty repository

    def entry(self, path: str, content: bytes) -> dict:
        """Describe a file as the Hub does: {"path", "size", "oid"}, and "lfs" of a large file."""
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        large = {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}}
        return {"type": "file", "path": path, "size": len(content), "oid": blob} | (large if path in self.large else {})


@dataclass
class Fault:
    """Answer the next `times` requests "METHOD /path" that `pattern` finds by `status`; 0: break the connection."""

    pattern: str
    status: int
    times: float


class Refusal(Exception):
    """Answer a request with a status, and the code by which the client knows which thing is missing."""

    def __init__(self, status: int, message: str, code: str = ""):
        self.status, self.message, self.code = status, message, code


class Hub:
    """Serve repositories at `url` inside a `with` block. `TOKEN` is the token of the user `USER`.

    repositories: by "models/owner/name" or "datasets/owner/name". requests: "METHOD /path" of each. gate: commits wait
    until it is set."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # of git LFS, by sha256
        self.altered: dict[str, bytes] = {}  # what is sent in their place
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()

    def fail(self, pattern: str, status: int = 500, times: float = 1) -> Fault:
        self.faults.append(Fault(pattern, status, times))
        return self.faults[-1]

    def environment(self, home) -> dict[str, str]:
        """Return the environment of a process whose clients ask this Hub, with a cache and a token of their own."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ACCELERATE_"))}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        return plain | ours | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "0"}

    def ask_in_this_process(self, monkeypatch: pytest.MonkeyPatch, home) -> None:
        """Let the clients of this process ask this Hub, with an empty cache; tests are offline otherwise."""
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, self.url)
        values = {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        for name, value in (values | {"HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(home / "hub")}).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)  # of the functions like file_exists
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", self.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)


class Handler(BaseHTTPRequestHandler):
    """Answer one request: find the fault or the route for it."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        request = f"{self.command} {unquote(address.path)}"
        self.hub.requests.append(request)
        self.query, length = parse_qs(address.query), int(self.headers["Content-Length"] or 0)
        fault = next((each for each in self.hub.faults if each.times > 0 and re.search(each.pattern, request)), None)
        self.breaks = False
        if fault is not None:
            fault.times -= 1
            if fault.status:
                self.rfile.read(length)
                self.answer({"error": f"the Hub of {TOKEN} is overloaded"}, fault.status)
                return
            self.breaks = True
            if length:  # an upload: half of it is read
                self.rfile.read(length // 2)
                self.close_connection = True
                return
        self.body = self.rfile.read(length)
        for pattern, method in ROUTES.items():
            if match := re.fullmatch(pattern, request):
                try:
                    self.check_token()
                    getattr(self, method)(**match.groupdict())
                except Refusal as refusal:
                    named = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
                    self.answer({"error": refusal.message}, refusal.status, named)
                return
        self.answer({"error": f"no such page: {request}"}, 404)

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *arguments) -> None:
        pass

    def answer(self, content, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send bytes, or anything else as JSON; half of it, if the connection shall break."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.breaks else data)
        self.close_connection |= self.breaks

    # who asks, and for which repository

    def check_token(self) -> None:
        self.user = None
        if given := self.headers["Authorization"]:
            if given != f"Bearer {TOKEN}":
                raise Refusal(401, "Invalid username or password.")
            self.user = USER

    def repository(self, kind: str | None, name: str, *, writes: bool = False) -> Repository:
        found = self.hub.repositories.get(f"{kind or 'models'}/{name}")
        if found is None or (found.visibility == "private" and self.user is None):
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if writes and (self.user is None or name.split("/")[0] != self.user):
            raise Refusal(403, "You have no right to write to this repository")
        return found

    def at(self, repository: Repository, revision: str | None) -> Commit:
        found = repository.at(revision or "main")
        if found is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def whoami(self) -> None:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        self.answer({"type": "user", "name": self.user, "orgs": []})

    # repositories

    def create(self) -> None:
        wanted = json.loads(self.body)
        if self.user is None or (wanted.get("organization") or self.user) != self.user:
            raise Refusal(403 if self.user else 401, "You have no right to create a repository there")
        kind, name = f"{wanted.get('type') or 'model'}s", f"{self.user}/{wanted['name']}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        exists = f"{kind}/{name}" in self.hub.repositories
        if not exists:
            made = self.hub.repositories[f"{kind}/{name}"] = Repository(wanted.get("visibility"))
            made.commit({".gitattributes": b""}, "initial commit")
        self.answer({"url": url, "name": name}, 409 if exists else 200)

    def make_branch(self, kind: str, name: str, branch: str) -> None:
        repository = self.repository(kind, name, writes=True)
        exists = branch in repository.branches
        repository.branches.setdefault(branch, repository.branches["main"])
        self.answer({}, 409 if exists else 200)

    def info(self, kind: str, name: str, revision: str | None) -> None:
        repository = self.repository(kind, name)
        commit, blobs = self.at(repository, revision), "blobs" in self.query
        files = [repository.entry(*each) for each in commit.files.items()]
        siblings = [{"rfilename": each["path"]} | ({**each, "blobId": each["oid"]} if blobs else {}) for each in files]
        for each in siblings:
            if "lfs" in each:
                each["lfs"] = each["lfs"] | {"sha256": each["lfs"]["oid"]}
        about = {"id": name, "sha": commit.oid, "private": repository.visibility == "private", "tags": []}
        self.answer(about | {"siblings": siblings, "lastModified": "2026-01-01T00:00:00.000Z"})

    def tree(self, kind: str, name: str, revision: str, folder: str | None) -> None:
        repository = self.repository(kind, name)
        commit, prefix = self.at(repository, revision), f"{folder}/" if folder else ""
        entries = {}
        for path, content in commit.files.items():
            if path.startswith(prefix):
                below, *rest = path.removeprefix(prefix).split("/")
                if rest:
                    entries[prefix + below] = {"type": "directory", "path": prefix + below, "oid": "0" * 40, "size": 0}
                if not rest or self.query.get("recursive", ["false"])[0].lower() in ("true", "1"):
                    entries[path] = repository.entry(path, content)
        if folder and not entries:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        self.answer(list(entries.values()))

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name)
        files, body = self.at(repository, revision).files, self.body.decode()
        wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        folders = [path for path in wanted if any(each.startswith(f"{path}/") for each in files)]
        found = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
        self.answer(found + [repository.entry(path, files[path]) for path in wanted if path in files])

    # uploads

    def validate_yaml(self) -> None:
        given = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        try:
            is_valid = given is not None and isinstance(yaml.safe_load(given[1]), dict)
        except yaml.YAMLError:
            is_valid = False
        errors = [] if is_valid else [{"message": "the metadata are no YAML"}]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name, writes=True)
        answers, before = [], self.at(repository, revision).files
        for each in json.loads(self.body)["files"]:
            path = each["path"]
            mode = {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}
            if path in before:
                entry = repository.entry(path, before[path])
                mode["oid"] = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            answers.append(mode)
        self.answer({"files": answers})

    def batch(self, kind: str | None, name: str) -> None:
        self.repository(kind, name, writes=True)
        answers = []
        for each in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/objects/{each['oid']}"}
            verify = {"href": f"{self.hub.url}/objects/verify"}
            new = each["oid"] not in self.hub.objects
            answers.append(each | ({"actions": {"upload": upload, "verify": verify}} if new else {}))
        self.answer({"transfer": "basic", "objects": answers})

    def put_object(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content does not have this sha256")
        self.hub.objects[oid] = self.body
        self.answer({})

    def verify(self) -> None:
        given = json.loads(self.body)
        if len(self.hub.objects.get(given["oid"], b"")) != given["size"]:
            raise Refusal(404, "no such object")
        self.answer({})

    def commit(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name, writes=True)
        assert self.hub.gate.wait(60)
        files, message = dict(self.at(repository, revision).files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
                repository.large.add(value["path"])
            else:  # deletedFile, deletedFolder
                gone = value["path"].rstrip("/")
                files = {path: each for path, each in files.items() if f"{path}/".find(f"{gone}/") != 0}
        made = repository.commit(files, message, revision)
        page = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        self.answer({"commitUrl": f"{page}/commit/{made.oid}", "commitOid": made.oid})

    # downloads

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        repository = self.repository(kind, name)
        commit = self.at(repository, revision)
        if path not in commit.files:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        content = commit.files[path]
        entry, headers = repository.entry(path, content), {"X-Repo-Commit": commit.oid}
        if "lfs" not in entry:
            self.send_range(content, headers | {"ETag": f'"{entry["oid"]}"'})
            return
        oid = entry["lfs"]["oid"]
        self.hub.objects[oid] = content
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost")  # the store of large files is another host
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": len(content)}
        self.answer(b"", 302, headers | {"Location": f"{elsewhere}/objects/{oid}"})

    def get_object(self, oid: str) -> None:
        self.send_range(self.hub.altered.get(oid, self.hub.objects[oid]), {"ETag": f'"{oid}"'})

    def send_range(self, content: bytes, headers: dict[str, str]) -> None:
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self.answer(content[first : last + 1], 206, headers)
        else:
            self.answer(content, 200, headers)
