"""A Hugging Face Hub on the loopback interface, for tests against the real client library.

It speaks the part of the protocol that reading and pushing models needs: repositories with commits, branches, tags
and pull requests, regular and large (LFS) files, private, gated and renamed repositories, users with rights. Any
endpoint can be told to fail in many ways. Nothing leaves the machine::

    with LoopbackHub() as server:
        server.add_user("ann", "hf_...")
        server.add_repo("ann/model", {"config.json": b"{}"})
        HfApi(endpoint=server.endpoint, token="hf_...").model_info("ann/model")
"""

import base64
import fnmatch
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
LFS_SIZE = 10 * 2**20
STATUS_FAULTS = {
    "401": (401, None, "Invalid credentials in Authorization header"),
    "403": (403, None, "Forbidden by an injected fault"),
    "404": (404, "RepoNotFound", "Repository not found"),
    "409": (409, None, "Conflict by an injected fault"),
    "412": (412, None, "A commit has happened since. Please refresh and try again."),
    "429": (429, None, "Too many requests"),
    "500": (500, None, "Internal error by an injected fault"),
    "503": (503, None, "Service unavailable by an injected fault"),
}
OTHER_FAULTS = {
    "drop",
    "truncate",
    "apply-then-drop",
    "apply-then-500",
    "ignore",
    "corrupt",
    "redirect-foreign",
    "retry-after-huge",
}
ENDPOINTS = {
    "create_repo",
    "model_info",
    "auth_check",
    "preupload",
    "lfs_batch",
    "lfs_put",
    "lfs_verify",
    "commit",
    "tree",
    "paths_info",
    "refs",
    "commits",
    "resolve",
    "whoami",
    "validate_yaml",
    "settings",
    "branch",
    "tag",
}
ACTIONS = {
    "revision": "model_info",
    "tree": "tree",
    "paths-info": "paths_info",
    "refs": "refs",
    "commits": "commits",
    "branch": "branch",
    "tag": "tag",
    "preupload": "preupload",
    "commit": "commit",
    "settings": "settings",
    "auth-check": "auth_check",
}


def is_lfs(path: str, size: int) -> bool:
    """Tell whether the Hub keeps a file as a large file."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE)


def git_oid(content: bytes) -> str:
    """Return the git id of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def card_data(readme: bytes | None) -> dict[str, Any] | None:
    """Return the YAML front matter of a README, or None."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", (readme or b"").decode(errors="replace"), re.DOTALL)
    data = yaml.safe_load(match[1]) if match else None
    return data if isinstance(data, dict) else None


@dataclass
class Commit:
    """A snapshot of all files."""

    id: str
    parent: str | None
    title: str
    files: dict[str, bytes]
    user: str = "system"
    description: str = ""


@dataclass
class User:
    """An account with one token."""

    name: str
    token: str
    orgs: tuple[str, ...] = ()
    role: str = "write"


@dataclass
class Repo:
    """A repository; `refs` maps `main`, other branches, tags and `refs/pr/N` to commit ids."""

    id: str
    private: bool = False
    gated: str | bool = False
    pipeline_tag: str | None = None
    library_name: str | None = None
    readers: set[str] = field(default_factory=set)
    history: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        """Commit id of main."""
        return self.branches["main"]

    def find(self, revision: str = "main") -> Commit | None:
        """Return the commit that a branch, tag, pull request or commit id stands for."""
        for refs in (self.branches, self.tags, self.pulls):
            if revision in refs:
                return self.history[refs[revision]]
        matches = [c for sha, c in self.history.items() if len(revision) >= 7 and sha.startswith(revision)]
        return matches[0] if matches else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return all files at a revision."""
        commit = self.find(revision)
        assert commit is not None, revision
        return dict(commit.files)

    def large_file(self, sha256: str) -> bytes | None:
        """Return the large file of a hash from any commit, also of branches that are gone."""
        contents = (item for commit in self.history.values() for item in commit.files.items())
        found = (data for path, data in contents if is_lfs(path, len(data)) and _sha256(data) == sha256)
        return next(found, None)

    def commits(self, revision: str = "main") -> list[str]:
        """Return commit ids, newest first."""
        found = []
        commit = self.find(revision)
        while commit is not None:
            found.append(commit.id)
            commit = self.history[commit.parent] if commit.parent else None
        return found

    def add_commit(
        self, files: dict[str, bytes], parent: str | None, title: str, user: str = "system"
    ) -> Commit:
        """Store a commit without moving a branch."""
        sha = hashlib.sha1(f"{self.id} {len(self.history)} {parent} {title}".encode()).hexdigest()
        self.history[sha] = Commit(sha, parent, title, files, user)
        return self.history[sha]


@dataclass(frozen=True)
class Request:
    """One request as it came in; header names are in lower case."""

    endpoint: str
    method: str
    path: str
    headers: Mapping[str, str]
    body_size: int


class HubAnswer(Exception):
    """An HTTP answer that ends the handling of a request."""

    def __init__(
        self, status: int, message: str = "", code: str | None = None, headers: Iterable[Any] = ()
    ) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = list(headers)


class LoopbackHub:
    """The server and its state; a context manager.

    Attributes:
        endpoint: address to give to the client.
        requests: everything that came in, oldest first.
        foreign_requests: what reached the other origin that redirects lead to.
        obeys_sent_gitignore: whether the rules that a client sends replace those in the repository.
        page_size: entries per page of a file list.
        fault_at: faults by the number of the request, counted from 0; see `inject`.
        watch: is called with the number of each request before it has any effect, and with its complement (`~number`) when it had
            its effect and is about to be answered.
        silent: endpoints whose transfers are never answered, of paths that end in `silent_path`.
        stalled: set when such a transfer has come in.
    """

    def __init__(self) -> None:
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.foreign_requests: list[Request] = []
        self.faults: dict[str, list[str]] = {}
        self.obeys_sent_gitignore = True
        self.page_size = 1000
        self.fault_at: dict[int, str] = {}
        self.watch: Callable[[int], None] = lambda number: None
        self.silent: set[str] = set()
        self.silent_path = ""
        self.stalled = threading.Event()
        self.closed = threading.Event()
        self.lock = threading.RLock()
        self.servers = [_serve(_Handler, self), _serve(_ForeignHandler, self)]
        self.endpoint, self.foreign = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving."""
        self.closed.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def add_user(self, name: str, token: str, orgs: Iterable[str] = (), role: str = "write") -> User:
        """Create an account; `role` is what its token may do, `read` or `write`."""
        self.users[token] = User(name, token, tuple(orgs), role)
        return self.users[token]

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | None = None,
        *,
        private: bool = False,
        gated: str | bool = False,
        pipeline_tag: str | None = None,
        library_name: str | None = None,
        readers: Iterable[str] = (),
    ) -> Repo:
        """Create a repository with one commit; `readers` may read it although it is private or gated."""
        repo = Repo(repo_id, private, gated, pipeline_tag, library_name, set(readers))
        first = repo.add_commit({".gitattributes": b"*.safetensors filter=lfs\n"}, None, "initial commit")
        repo.branches["main"] = first.id
        self.repos[repo_id] = repo
        if files:
            self.commit(repo_id, files)
        return repo

    def commit(
        self, repo_id: str, files: Mapping[str, bytes], delete: Iterable[str] = (), *, branch: str = "main"
    ) -> str:
        """Commit on the server side, as somebody else would; returns the commit id."""
        with self.lock:
            repo = self.repos[repo_id]
            parent = repo.branches.get(branch, repo.head)
            kept = {path: data for path, data in repo.files(parent).items() if path not in set(delete)}
            repo.branches[branch] = repo.add_commit(
                kept | dict(files), parent, f"commit {len(repo.history)}"
            ).id
            return repo.branches[branch]

    def repo(self, repo_id: str) -> Repo:
        """Return a repository for inspection."""
        return self.repos[repo_id]

    def rename(self, old: str, new: str) -> None:
        """Give a repository a new name; the old one redirects."""
        repo = self.repos.pop(old)
        repo.id = new
        self.repos[new] = repo
        self.renamed[old] = new

    def tag(self, repo_id: str, name: str, revision: str = "main") -> None:
        """Tag a revision."""
        commit = self.repos[repo_id].find(revision)
        assert commit is not None
        self.repos[repo_id].tags[name] = commit.id

    def inject(self, endpoint: str, fault: str, times: int = 1) -> None:
        """Let the next `times` requests to an endpoint fail; see STATUS_FAULTS and OTHER_FAULTS."""
        assert endpoint in ENDPOINTS, endpoint
        assert fault in STATUS_FAULTS or fault in OTHER_FAULTS, fault
        self.faults.setdefault(endpoint, []).extend([fault] * times)

    def calls(self, *endpoints: str) -> list[Request]:
        """Return the logged requests to some endpoints."""
        return [request for request in self.requests if request.endpoint in endpoints]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    hub: LoopbackHub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent: a client that hangs up is part of many tests."""


def _serve(handler: type[BaseHTTPRequestHandler], hub: LoopbackHub) -> _Server:
    server = _Server(("127.0.0.1", 0), handler)
    server.hub = hub
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


class _BaseHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    server: _Server
    body: bytes = b""
    fault: str | None = None

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing; `LoopbackHub.requests` has it all."""

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().setup()

    @property
    def hub(self) -> LoopbackHub:
        return self.server.hub

    def note(self, endpoint: str) -> Request:
        """Describe the request for the log."""
        headers = {name.lower(): value for name, value in self.headers.items()}
        return Request(endpoint, self.command, self.path, headers, len(self.body))

    def answer(self, status: int, body: bytes = b"", headers: Iterable[tuple[str, str]] = ()) -> None:
        """Send a complete answer, or half of it."""
        self.send_response(status)
        named = dict(headers)
        for name, value in named.items():
            self.send_header(name, value)
        if "Content-Length" not in named:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "truncate":
            self.wfile.write(body[: len(body) // 2])
            self.hang_up()
        else:
            self.wfile.write(body)

    def hang_up(self) -> None:
        """Close the connection here and now."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def read_body(self) -> bytes:
        """Read the request's body, chunked or not."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))


class _ForeignHandler(_BaseHandler):
    """The other origin: serves stored objects under /cdn/, and remembers who asked."""

    def do_GET(self) -> None:
        self.body = self.read_body()
        self.hub.foreign_requests.append(self.note("foreign"))
        content = self.hub.objects.get(self.path.removeprefix("/cdn/"))
        if content is None:
            self.answer(404, b'{"error": "not here"}', [("Content-Type", "application/json")])
        else:
            self.answer(*_ranged(content, self.headers.get("Range")))

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET


def _ranged(content: bytes, asked: str | None) -> tuple[int, bytes, list[tuple[str, str]]]:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "")
    if not match:
        return 200, content, []
    start, end = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
    return 206, content[start : end + 1], [("Content-Range", f"bytes {start}-{end}/{len(content)}")]


class _Handler(_BaseHandler):
    """The Hub itself."""

    def do_GET(self) -> None:
        self.body = self.read_body()
        parts = urlsplit(self.path)
        # Revisions arrive quoted: split the raw path first, unquote its parts afterwards.
        self.parts = [unquote(part) for part in parts.path.split("/")[1:]]
        self.query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        endpoint = self.classify()
        with self.hub.lock:
            number = len(self.hub.requests)
            self.hub.requests.append(self.note(endpoint))
            waiting = self.hub.faults.get(endpoint)
            self.fault = waiting.pop(0) if waiting else self.hub.fault_at.pop(number, None)
        self.hub.watch(number)
        try:
            self.fail_early(endpoint)
            with self.hub.lock:
                method = getattr(self, f"on_{endpoint}", None)
                if method is None:
                    raise HubAnswer(404, "no such route")
                status, body, headers = method()
            self.hub.watch(~number)
            self.fail_late(endpoint)
        except HubAnswer as reply:
            self.reply(reply)
            return
        except _HungUp:
            return
        self.answer(status, body, headers)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def classify(self) -> str:
        """Name the endpoint; sets `repo_id` and `rest`."""
        self.repo_id, self.rest = "", []
        match self.parts:
            case ["api", "whoami-v2"]:
                return "whoami"
            case ["api", "validate-yaml"]:
                return "validate_yaml"
            case ["api", "repos", "create" | "delete" as verb]:
                return f"{verb}_repo"
            case ["lfs-put", _]:
                return "lfs_put"
            case ["lfs-verify"]:
                return "lfs_verify"
            case ["api", "models", *rest]:
                at = next((i for i, part in enumerate(rest) if i and part in ACTIONS), len(rest))
                self.repo_id, self.rest = "/".join(rest[:at]), rest[at:]
                return ACTIONS[self.rest[0]] if self.rest else "model_info"
            case [*name, "info", "lfs", "objects", "batch"]:
                self.repo_id = "/".join(name).removesuffix(".git")
                return "lfs_batch"
            case _ if "resolve" in self.parts[1:3]:
                at = self.parts.index("resolve", 1)
                self.repo_id, self.rest = "/".join(self.parts[:at]), self.parts[at + 1 :]
                return "resolve"
        return "unknown"

    def fail_early(self, endpoint: str) -> None:
        """Act on a fault that comes before any effect."""
        is_silent = endpoint in self.hub.silent and self.path.endswith(self.hub.silent_path)
        if is_silent and self.command in ("GET", "PUT"):
            self.hub.stalled.set()
            self.hub.closed.wait()
        if self.fault in STATUS_FAULTS:
            status, code, message = STATUS_FAULTS[self.fault]
            raise HubAnswer(status, message, code)
        if self.fault == "retry-after-huge":
            raise HubAnswer(503, "come back later", headers=[("Retry-After", "1000000000")])
        if self.fault == "redirect-foreign" and endpoint != "resolve":
            raise HubAnswer(307, headers=[("Location", f"{self.hub.foreign}{self.path}")])
        if self.fault == "drop":
            self.hang_up()
            raise _HungUp

    def fail_late(self, endpoint: str) -> None:
        """Act on a fault that comes after the effect."""
        if self.fault == "apply-then-500":
            raise HubAnswer(500, "applied, but the answer was lost")
        if self.fault == "apply-then-drop":
            self.hang_up()
            raise _HungUp
        if self.fault == "corrupt" and endpoint not in ("resolve", "commit", "tree", "lfs_put", "model_info"):
            raise HubAnswer(200, "garbage")

    def reply(self, reply: HubAnswer) -> None:
        """Send an error or redirect."""
        headers = [("Content-Type", "application/json"), *reply.headers]
        if reply.code:
            headers.append(("X-Error-Code", reply.code))
        if reply.message and reply.status >= 400:
            headers.append(("X-Error-Message", reply.message))
        self.answer(reply.status, json.dumps({"error": reply.message}).encode(), headers)

    def json(
        self, value: Any, headers: Iterable[tuple[str, str]] = ()
    ) -> tuple[int, bytes, list[tuple[str, str]]]:
        """Return a JSON answer."""
        return 200, json.dumps(value, default=str).encode(), [("Content-Type", "application/json"), *headers]

    def user(self, needed: bool = False) -> User | None:
        """Return who asks."""
        header = self.headers.get("Authorization")
        if header is None:
            if needed:
                raise HubAnswer(401, "Invalid username or password.")
            return None
        user = self.hub.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise HubAnswer(401, "Invalid credentials in Authorization header")
        return user

    def may_write(self, namespace: str) -> bool:
        """Tell whether who asks may write to an owner's repositories."""
        user = self.user()
        return user is not None and user.role == "write" and namespace in (user.name, *user.orgs)

    def repo(self, *, content: bool = False, write: bool = False) -> Repo:
        """Return the repository that the path names, after the access checks."""
        names = {name.lower(): name for name in self.hub.repos} | {
            k.lower(): v for k, v in self.hub.renamed.items()
        }
        known = names.get(self.repo_id.lower())
        repo = self.hub.repos.get(known or "")
        user = self.user()
        owner = known.split("/")[0] if known else ""
        is_member = user is not None and (
            owner in (user.name, *user.orgs) or (repo and user.name in repo.readers)
        )
        if repo is None or (repo.private and not is_member):
            raise HubAnswer(404, "Repository not found", "RepoNotFound")
        if known != self.repo_id:
            raise HubAnswer(
                307, headers=[("Location", self.path.replace(quote(self.repo_id), quote(known or "")))]
            )
        if content and repo.gated and not is_member:
            raise HubAnswer(403, f"Access to model {repo.id} is restricted.", "GatedRepo")
        if write and not self.may_write(owner):
            raise HubAnswer(403, "You don't have the rights to write to this repository")
        return repo

    def at(self, repo: Repo, revision: str) -> Commit:
        """Return the commit of a revision in the path."""
        commit = repo.find(revision)
        if commit is None:
            raise HubAnswer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def on_whoami(self) -> Any:
        user = self.user(needed=True)
        assert user is not None
        return self.json({
            "type": "user",
            "name": user.name,
            "orgs": [{"name": name} for name in user.orgs],
            "auth": {"type": "access_token", "accessToken": {"role": user.role}},
        })

    def on_validate_yaml(self) -> Any:
        try:
            card_data(json.loads(self.body)["content"].encode())
        except yaml.YAMLError as error:
            body = json.dumps({"errors": [{"message": str(error)}], "warnings": []}).encode()
            return 400, body, [("Content-Type", "application/json")]
        return self.json({"errors": [], "warnings": []})

    def on_create_repo(self) -> Any:
        asked = json.loads(self.body)
        user = self.user(needed=True)
        assert user is not None
        owner = asked.get("organization") or user.name
        repo_id = f"{owner}/{asked['name']}"
        if not self.may_write(owner):
            raise HubAnswer(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        if repo_id.lower() in {name.lower() for name in self.hub.repos}:
            body = json.dumps({
                "url": f"{self.hub.endpoint}/{repo_id}",
                "error": "You already created this model repo",
            })
            return 409, body.encode(), [("Content-Type", "application/json")]
        self.hub.add_repo(repo_id, private=asked.get("visibility") == "private")
        return self.json({"url": f"{self.hub.endpoint}/{repo_id}"})

    def on_delete_repo(self) -> Any:
        asked = json.loads(self.body)
        user = self.user(needed=True)
        assert user is not None
        self.repo_id = f"{asked.get('organization') or user.name}/{asked['name']}"
        del self.hub.repos[self.repo(write=True).id]
        return self.json({})

    def on_settings(self) -> Any:
        repo = self.repo(write=True)
        asked = json.loads(self.body)
        if "visibility" in asked:
            repo.private = asked["visibility"] == "private"
        if "gated" in asked:
            repo.gated = asked["gated"]
        return self.json({})

    def on_model_info(self) -> Any:
        repo = self.repo()
        commit = self.at(repo, self.rest[1] if self.rest else "main")
        try:
            card = card_data(commit.files.get("README.md"))
        except yaml.YAMLError:
            card = None
        info = {
            "id": repo.id,
            "sha": commit.id if self.fault != "corrupt" else "not a commit",
            "private": repo.private,
            "gated": repo.gated,
            "pipeline_tag": repo.pipeline_tag or (card or {}).get("pipeline_tag"),
            "library_name": repo.library_name or (card or {}).get("library_name"),
            "tags": [],
            "cardData": card,
            "siblings": [self.sibling(path, data) for path, data in sorted(commit.files.items())],
        }
        return self.json(info)

    def sibling(self, path: str, content: bytes) -> dict[str, Any]:
        """Describe a file as model_info does."""
        if "blobs" not in self.query:
            return {"rfilename": path}
        entry: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": git_oid(content)}
        if is_lfs(path, len(content)):
            entry["lfs"] = {"sha256": _sha256(content), "size": len(content), "pointerSize": 134}
        return entry

    def on_auth_check(self) -> Any:
        self.repo(content=True, write=self.rest[1:] == ["write"])
        return self.json({})

    def on_tree(self) -> Any:
        commit = self.at(self.repo(content=True), self.rest[1])
        folder = "/".join(self.rest[2:])
        prefix = f"{folder}/" if folder else ""
        entries = [
            self.entry(path, data) for path, data in sorted(commit.files.items()) if path.startswith(prefix)
        ]
        if self.query.get("recursive", "false").lower() != "true":
            deeper = {
                e["path"][len(prefix) :].split("/")[0] for e in entries if "/" in e["path"][len(prefix) :]
            }
            entries = [e for e in entries if "/" not in e["path"][len(prefix) :]]
            entries += [
                {"type": "directory", "path": prefix + name, "oid": "0" * 40} for name in sorted(deeper)
            ]
        start = int(self.query.get("cursor", 0))
        end = start + self.hub.page_size
        path = self.path.split("?")[0]
        link = f'<{self.hub.endpoint}{path}?recursive={self.query.get("recursive", "false")}&cursor={end}>; rel="next"'
        return self.json(entries[start:end], [("Link", link)] if end < len(entries) else [])

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        """Describe a file as the tree does."""
        if self.fault == "corrupt":
            content = content + b"!"
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if is_lfs(path, len(content)):
            entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
        return entry

    def on_paths_info(self) -> Any:
        commit = self.at(self.repo(content=True), self.rest[1])
        is_form = "json" not in self.headers.get("Content-Type", "")
        paths = parse_qs(self.body.decode()).get("paths", []) if is_form else json.loads(self.body)["paths"]
        return self.json([self.entry(path, commit.files[path]) for path in paths if path in commit.files])

    def on_refs(self) -> Any:
        repo = self.repo(content=True)
        refs = {
            "branches": [
                {"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.branches.items()
            ],
            "tags": [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in repo.tags.items()],
            "converts": [],
        }
        if "include_prs" in self.query:
            refs["pullRequests"] = [
                {"name": n.removeprefix("refs/"), "ref": n, "targetCommit": c} for n, c in repo.pulls.items()
            ]
        return self.json(refs)

    def on_commits(self) -> Any:
        repo = self.repo(content=True)
        self.at(repo, self.rest[1])
        found = [repo.history[sha] for sha in repo.commits(self.rest[1])]
        date = "2025-01-01T00:00:00.000Z"
        return self.json([
            {"id": c.id, "title": c.title, "message": "", "date": date, "authors": [{"user": c.user}]}
            for c in found
        ])

    def on_branch(self) -> Any:
        repo = self.repo(write=True)
        name = self.rest[1]
        if self.command == "DELETE":
            if name == "main":
                raise HubAnswer(400, "Cannot delete the default branch")
            if name not in repo.branches:
                raise HubAnswer(404, f"Invalid rev id: {name}", "RevisionNotFound")
            del repo.branches[name]
            return self.json({})
        if name.startswith("refs/"):
            raise HubAnswer(400, f"Invalid reference for a branch: {name}")
        if name in repo.branches:
            raise HubAnswer(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repo.branches[name] = self.at(repo, start).id
        return self.json({})

    def on_tag(self) -> Any:
        repo = self.repo(write=True)
        if self.command == "DELETE":
            repo.tags.pop(self.rest[1], None)
            return self.json({})
        name = json.loads(self.body)["tag"]
        if name in repo.tags:
            raise HubAnswer(409, "Tag already exists")
        repo.tags[name] = self.at(repo, self.rest[1]).id
        return self.json({})

    def on_preupload(self) -> Any:
        is_pull = "create_pr" in self.query
        commit = self.at(self.repo(content=True, write=not is_pull), self.rest[1])
        asked = json.loads(self.body)
        rules = commit.files.get(".gitignore", b"").decode()
        if self.hub.obeys_sent_gitignore:
            rules = asked.get("gitIgnore", rules)
        found = []
        for entry in asked["files"]:
            path, old = entry["path"], commit.files.get(entry["path"])
            mode = "lfs" if is_lfs(path, entry["size"]) else "regular"
            oid = None if old is None else _sha256(old) if mode == "lfs" else git_oid(old)
            is_ignored = self.fault == "ignore" or _is_ignored(path, rules)
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": is_ignored, "oid": oid})
        return self.json({"files": found})

    def on_lfs_batch(self) -> Any:
        self.repo(content=True)
        self.user(needed=True)
        found = []
        for entry in json.loads(self.body)["objects"]:
            item = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.objects:
                item["actions"] = {
                    "upload": {"href": f"{self.hub.endpoint}/lfs-put/{entry['oid']}", "header": {}},
                    "verify": {"href": f"{self.hub.endpoint}/lfs-verify"},
                }
            found.append(item)
        return self.json({"transfer": "basic", "objects": found})

    def on_lfs_put(self) -> Any:
        if "Authorization" in self.headers:
            raise HubAnswer(400, "Only one auth mechanism allowed")
        self.hub.objects[self.parts[1]] = self.body if self.fault != "corrupt" else _flipped(self.body)
        return 200, b"", []

    def on_lfs_verify(self) -> Any:
        asked = json.loads(self.body)
        content = self.hub.objects.get(asked["oid"], b"")
        if _sha256(content) != asked["oid"] or len(content) != asked["size"]:
            self.hub.objects.pop(asked["oid"], None)
            raise HubAnswer(422, "The uploaded bytes do not match their SHA-256")
        return self.json({})

    def on_commit(self) -> Any:
        is_pull = "create_pr" in self.query
        repo = self.repo(content=True, write=not is_pull)
        user = self.user(needed=True)
        assert user is not None
        target = self.rest[1]
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = lines[0]["value"]
        head = self.at(repo, target)
        if target not in repo.branches and target not in repo.pulls:
            raise HubAnswer(400, f"{target} is no branch")
        parent = header.get("parentCommit")
        if parent and not is_pull and not head.id.startswith(parent):
            raise HubAnswer(412, "A commit has happened since. Please refresh and try again.")
        base = self.at(repo, parent) if parent and is_pull else head
        files = self.changed(repo, dict(base.files), lines[1:])
        made = repo.add_commit(files, base.id, header["summary"], user.name)
        made.description = header.get("description", "")
        answer = {"commitOid": made.id, "commitUrl": f"{self.hub.endpoint}/{repo.id}/commit/{made.id}"}
        if is_pull:
            number = len(repo.pulls) + 1
            repo.pulls[f"refs/pr/{number}"] = made.id
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo.id}/discussions/{number}"
        else:
            (repo.pulls if target in repo.pulls else repo.branches)[target] = made.id
        return self.json(answer)

    def changed(self, repo: Repo, files: dict[str, bytes], lines: list[dict[str, Any]]) -> dict[str, bytes]:
        """Apply the operations of a commit."""
        for line in lines:
            value = line["value"]
            path = value["path"]
            if line["key"] == "file":
                files[path] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.hub.objects.get(value["oid"], repo.large_file(value["oid"]))
                if content is None:
                    raise HubAnswer(400, f"LFS object {value['oid']} of {path} was never uploaded")
                files[path] = content
            elif line["key"] == "deletedFile":
                if path not in files:
                    raise HubAnswer(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[path]
            elif line["key"] == "deletedFolder":
                files = {
                    name: data for name, data in files.items() if not name.startswith(path.rstrip("/") + "/")
                }
            if self.fault == "corrupt" and path in files:
                files[path] = _flipped(files[path])
        return files

    def on_resolve(self) -> Any:
        commit = self.at(self.repo(content=True), self.rest[0])
        path = "/".join(self.rest[1:])
        if path not in commit.files:
            raise HubAnswer(404, "Entry not found", "EntryNotFound", [("X-Repo-Commit", commit.id)])
        content = commit.files[path]
        oid = _sha256(content) if is_lfs(path, len(content)) else git_oid(content)
        headers = [("X-Repo-Commit", commit.id), ("ETag", f'"{oid}"'), ("Accept-Ranges", "bytes")]
        if self.fault == "redirect-foreign":
            self.hub.objects[oid] = content
            headers += [("X-Linked-Etag", f'"{oid}"'), ("X-Linked-Size", str(len(content)))]
            raise HubAnswer(302, headers=[*headers, ("Location", f"{self.hub.foreign}/cdn/{oid}")])
        if self.command == "HEAD":
            return 200, b"", [*headers, ("Content-Length", str(len(content)))]
        if self.fault == "corrupt":
            content = _flipped(content)
        status, body, more = _ranged(content, self.headers.get("Range"))
        return status, body, [*headers, *more]


class _HungUp(Exception):
    """The connection is closed; there is nobody to answer."""


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1]) if content else b"!"


def _is_ignored(path: str, rules: str) -> bool:
    patterns = [line.strip() for line in rules.splitlines() if line.strip() and not line.startswith("#")]
    names = [path, *path.split("/")]
    return any(fnmatch.fnmatch(name, pattern.rstrip("/")) for pattern in patterns for name in names)
