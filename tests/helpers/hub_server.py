"""A Hugging Face Hub on loopback: enough of its HTTP protocol for create, upload, list, download and delete.

Faults are planted with `server.fail(...)`: a status, or a connection that breaks in the middle of a body.
Contents are kept as plain dicts, so a test can look at what arrived.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE_TOKEN, READ_TOKEN = "hf_" + "w" * 34, "hf_" + "r" * 34
USER = "user"
LFS_SUFFIXES = (".safetensors", ".bin", ".png")
LICENSES = {"apache-2.0", "mit", "llama3.2", "gemma", "other", "cc-by-4.0"}


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """`branches` maps a branch to its commits, oldest first: (sha, message, files)."""

    private: bool
    branches: dict[str, list] = field(default_factory=dict)
    pulls: list = field(default_factory=list)
    closed: list = field(default_factory=list)  # of each pull request, whether it is

    def __post_init__(self):
        self.branches["main"] = [("0" * 40, "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})]

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"][-1][2]

    def at(self, revision: str):
        revision = unquote(revision)
        if revision in self.branches:
            return self.branches[revision][-1]
        if pull := re.fullmatch(r"refs/pr/(\d+)", revision):
            return self.pulls[int(pull[1]) - 1] if int(pull[1]) <= len(self.pulls) else None
        commits = [c for branch in self.branches.values() for c in branch] + self.pulls
        return next((c for c in commits if c[0] == revision), None)


@dataclass
class Fault:
    method: str
    path: re.Pattern
    status: int | None  # None: break the connection in the middle of the body
    times: int
    message: str
    headers: dict


class HubServer:
    """`with HubServer() as hub: ...`; `hub.url`, `hub.repos`, `hub.requests` (method, path), `hub.fail`."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.faults: list[Fault] = []
        self.orgs: list[str] = []
        self.xet_folder: Path | None = None  # where the Xet client itself stores contents, if it is used
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method: str, path: str, status: int | None = None, times: int = 1, message: str = "", **headers):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(method, re.compile(path), status, times, message, named))

    def add(self, repo: str, files: dict[str, bytes], private: bool = False) -> str:
        """Put files there as if somebody had pushed them; return the commit."""
        self.repos.setdefault(repo, Repo(private))
        return self.commit(repo, "main", "push", {**self.repos[repo].files, **files})

    def commit(self, repo: str, branch: str, message: str, files: dict[str, bytes]) -> str:
        pull = re.fullmatch(r"refs/pr/(\d+)", branch)
        commits = self.repos[repo].branches[branch] if pull is None else [*self.repos[repo].pulls]
        sha = hashlib.sha1(f"{repo}{branch}{len(commits)}{message}".encode()).hexdigest()
        if pull:
            self.repos[repo].pulls[int(pull[1]) - 1] = (sha, message, files)
        commits.append((sha, message, files))
        return sha

    def writes(self) -> list[str]:
        """What was asked of the server that changes it."""
        return [f"{m} {p}" for m, p in self.requests if m in ("PUT", "DELETE") or re.search("commit/|create$", p)]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the client to acknowledge its head

    def log_message(self, *_):
        pass

    def answer(self, status: int, body=b"", **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def error(self, status: int, message: str, code: str | None = None):
        extra = {"X_Error_Code": code} if code else {}
        self.answer(status, {"error": message}, X_Error_Message=message, Content_Type="application/json", **extra)

    def hang_up(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def planted_fault(self) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and fault.method == self.command and fault.path.search(self.path):
                    fault.times -= 1
                    return fault
        return None

    def handle_request(self):
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append((self.command, self.path))
        fault = self.planted_fault()
        if fault and fault.status is None and self.command == "PUT":
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.hang_up()
            return
        body = self.read_body()
        self.hub.bodies.append(body)
        if fault and fault.status is not None:
            self.answer(fault.status, {"error": fault.message}, X_Error_Message=fault.message, **fault.headers)
            return
        if self.token and self.token not in (WRITE_TOKEN, READ_TOKEN):
            self.error(401, "Invalid credentials in Authorization header")
            return
        for pattern, method in self.ROUTES:
            command, _, expression = pattern.partition(" ")
            match = re.fullmatch(expression, path)
            if match and self.command in command.split("|"):
                getattr(self, method)(*match.groups(), body=body, query=query, broken=fault is not None)
                return
        self.error(404, "not found")

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_request

    REPO = r"([^/]+/[^/]+?)"
    ROUTES = (
        ("GET /api/whoami-v2", "whoami"),
        ("POST /api/repos/create", "create"),
        ("DELETE /api/repos/delete", "delete"),
        ("POST /api/validate-yaml", "validate"),
        (f"PUT /api/models/{REPO}/settings", "settings"),
        (f"POST /api/models/{REPO}/preupload/(.+)", "preupload"),
        (f"GET /api/models/{REPO}/xet-write-token/(.+)", "xet_token"),
        (f"POST /api/models/{REPO}/commit/(.+)", "make_commit"),
        (f"POST /api/models/{REPO}/discussions", "open_pull"),
        (f"GET /api/models/{REPO}/discussions/([0-9]+)", "pull"),
        (f"POST /api/models/{REPO}/discussions/([0-9]+)/status", "close_pull"),
        (f"POST|DELETE /api/models/{REPO}/branch/(.+)", "branch"),
        (f"GET /api/models/{REPO}/revision/(.+)", "info"),
        (f"GET /api/models/{REPO}/tree/([^/]+)(?:/.*)?", "tree"),
        (f"GET /api/models/{REPO}", "info"),
        (f"POST /{REPO}\\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT /lfs/([0-9a-f]{64})", "lfs_put"),
        (f"HEAD|GET /{REPO}/resolve/([^/]+)/(.+)", "resolve"),
    )

    # -- who may do what ---------------------------------------------------------------------------

    def may_write(self) -> bool:
        if self.token == WRITE_TOKEN:
            return True
        if self.token == READ_TOKEN:
            self.error(403, "Forbidden: you must use a write token to upload to a repository.")
        else:
            self.error(401, "Invalid username or password.")
        return False

    def readable(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        signed_in = self.token in (WRITE_TOKEN, READ_TOKEN)
        if repo is None or (repo.private and not signed_in):
            self.error(404 if signed_in else 401, "Repository not found", "RepoNotFound")
            return None
        return repo

    # -- repositories ------------------------------------------------------------------------------

    def whoami(self, **_):
        role = {WRITE_TOKEN: "write", READ_TOKEN: "read"}.get(self.token)
        if role is None:
            return self.error(401, "Invalid credentials in Authorization header")
        self.answer(
            200,
            {
                "name": USER,
                "type": "user",
                "orgs": [{"name": n} for n in self.hub.orgs],
                "auth": {"accessToken": {"role": role}},
            },
        )

    def create(self, body, **_):
        if not self.may_write():
            return
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if not name.startswith(f"{USER}/"):
            return self.error(403, f"You don't have the rights to create a model under the namespace of {name}")
        if name in self.hub.repos:
            return self.error(409, "You already created this model repo")
        self.hub.repos[name] = Repo(asked.get("visibility") == "private")
        self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def delete(self, body, **_):
        if self.may_write():
            asked = json.loads(body)
            self.hub.repos.pop(f"{asked.get('organization') or USER}/{asked['name']}", None)
            self.answer(200)

    def settings(self, name, body, **_):
        if self.may_write():
            self.hub.repos[name].private = json.loads(body)["visibility"] == "private"
            self.answer(200, {})

    def branch(self, name, branch, **_):
        repo = self.hub.repos[name]
        if not self.may_write():
            return
        if self.command == "DELETE":
            del repo.branches[branch]
            return self.answer(204)
        if branch in repo.branches:
            return self.error(409, "Reference already exists")
        repo.branches[branch] = list(repo.branches["main"])
        self.answer(201, {})

    def info(self, name, revision="main", **_):
        repo = self.readable(name)
        if repo is None:
            return
        commit = repo.at(revision)
        if commit is None:
            return self.error(404, "Revision not found", "RevisionNotFound")
        siblings = [{"rfilename": path} for path in commit[2]]
        self.answer(200, {"id": name, "sha": commit[0], "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, name, revision, **_):
        repo = self.readable(name)
        if repo is None:
            return
        commit = repo.at(revision)
        if commit is None:
            return self.error(404, "Revision not found", "RevisionNotFound")
        entries = []
        for path, content in commit[2].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self.answer(200, entries)

    # -- upload ------------------------------------------------------------------------------------

    def validate(self, body, **_):
        """The checks of the Hub that matter for a model card."""
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---", content, re.S)
        front = yaml.safe_load(match[1]) if match else {}
        errors = []
        if front.get("license") and front["license"] not in LICENSES:
            errors.append({"message": f'"license" must be one of [{", ".join(sorted(LICENSES))}]'})
        bases = front.get("base_model") or []
        for base in [bases] if isinstance(bases, str) else bases:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
                errors.append({"message": f'"base_model" with value "{base}" is not valid.'})
        for result in (front.get("model-index") or [{}])[0].get("results", []):
            if not {"task", "metrics"} <= set(result):
                errors.append({"message": '"model-index" is not valid'})
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, name, revision, body, **_):
        if not self.may_write():
            return
        commit = self.hub.repos[name].at(revision) if name in self.hub.repos else None
        if commit is None:
            return self.error(404, "Not found", "RevisionNotFound" if name in self.hub.repos else "RepoNotFound")
        files = []
        for entry in json.loads(body)["files"]:
            path, lfs = entry["path"], entry["path"].endswith(LFS_SUFFIXES)
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in commit[2]:
                content = commit[2][path]
                answer["oid"] = hashlib.sha256(content).hexdigest() if lfs else git_hash(content)
            files.append(answer)
        self.answer(200, {"files": files})

    def lfs_batch(self, name, body, **_):
        if not self.may_write():
            return
        objects = []
        for entry in json.loads(body)["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.blobs:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}", "header": {}}}
            objects.append(answer)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def xet_token(self, *_, **__):
        """hf_xet takes a folder instead of a storage server."""
        self.answer(
            200, {"accessToken": "x", "exp": int(time.time()) + 3600, "casUrl": f"local://{self.hub.xet_folder}"}
        )

    def lfs_put(self, oid, body, **_):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.error(400, "wrong content")
        self.hub.blobs[oid] = body
        self.answer(200)

    def make_commit(self, name, revision, body, query, **_):
        if not self.may_write():
            return
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        head = next(line["value"] for line in lines if line["key"] == "header")
        files = dict(self.hub.repos[name].at(revision)[2])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] in self.hub.blobs:
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                elif self.hub.xet_folder:
                    files[value["path"]] = f"oid sha256:{value['oid']}".encode()
                else:
                    return self.error(400, "lfs object is missing")
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        answer = {"success": True}
        if query.get("create_pr") == ["1"]:
            pulls = self.hub.repos[name].pulls
            sha = f"{len(pulls) + 1:040x}"
            pulls.append((sha, head["summary"], files))
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{len(pulls)}"
        else:
            sha = self.hub.commit(name, unquote(revision), head["summary"], files)
        self.answer(200, answer | {"commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def open_pull(self, name, body, **_):
        if self.token not in (WRITE_TOKEN, READ_TOKEN) or self.readable(name) is None:
            return self.error(401, "Invalid username or password.")
        repo, title = self.hub.repos[name], json.loads(body)["title"]
        repo.pulls.append((f"{len(repo.pulls) + 1:040x}", title, dict(repo.files)))
        repo.closed.append(False)
        self.answer(200, {"num": len(repo.pulls)})

    def pull(self, name, number, **_):
        title, closed = self.hub.repos[name].pulls[int(number) - 1][1], self.hub.repos[name].closed[int(number) - 1]
        told = {"title": title, "num": int(number), "status": "closed" if closed else "draft", "isPullRequest": True}
        told |= {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "events": [], "diff": ""}
        self.answer(
            200, told | {"createdAt": "2026-01-01T00:00:00.000Z", "repo": {"name": name, "type": "model"}, "author": {}}
        )

    def close_pull(self, name, number, body, **_):
        self.hub.repos[name].closed[int(number) - 1] = json.loads(body)["status"] == "closed"
        event = {"id": "1", "type": "status-change", "createdAt": "2026-01-01T00:00:00.000Z", "author": {"name": USER}}
        self.answer(200, {"newStatus": event | {"data": {"status": "closed"}}})

    # -- download ----------------------------------------------------------------------------------

    def resolve(self, name, revision, path, broken, **_):
        repo = self.readable(name)
        if repo is None:
            return
        commit = repo.at(revision)
        if commit is None:
            return self.error(404, "Revision not found", "RevisionNotFound")
        if path not in commit[2]:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit[0])
        content = commit[2][path]
        oid = hashlib.sha256(content).hexdigest() if path.endswith(LFS_SUFFIXES) else git_hash(content)
        status, sent = 200, content
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            status, sent = 206, content[int(match[1]) : int(match[2]) + 1 if match[2] else None]
        headers = {"ETag": f'"{oid}"', "X_Repo_Commit": commit[0], "Accept_Ranges": "bytes"}
        if broken:
            self.answer(status, sent[: len(sent) // 2], Content_Length=len(sent), **headers)
            self.hang_up()
            return
        self.answer(status, sent, Content_Length=len(sent), **headers)
