"""A stand-in for the Hugging Face Hub: serves a folder of repositories on this machine, and takes uploads.

    root/owner/name/...           a model repository, its main branch
    root/owner/name@fp16/...      its branch fp16

It knows what huggingface_hub's model_info, snapshot_download, hf_hub_download, create_repo and upload_folder use.
"""

import base64
import hashlib
import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_let_me_in"  # opens private and gated repositories, and is needed to write


class HubServer:
    """Serves `root` while used as a context manager; `url` is for HF_ENDPOINT.

    Attributes:
        requests: "METHOD /path" of each request so far, in order.
        trouble: repository id -> "gated", "private", "denied" (whatever the token), "read only" (likewise), "down" or
            "login page".
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.requests: list[str] = []
        self.trouble: dict[str, str] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloads(self) -> list[str]:
        """The files of which contents were sent, as owner/name/file, in alphabetical order."""
        sent = [
            line.removeprefix("GET /") for line in self.requests if line.startswith("GET /") and "/resolve/" in line
        ]
        paths = [path.split("/resolve/") for path in sent]
        return sorted(f"{repo}/{rest.split('/', 1)[1]}" for repo, rest in paths)

    def add(self, repo: str, names: list[str] | dict[str, str | bytes]) -> Path:
        """Make a repository of these files, each with its own name as content where none is given."""
        contents = names if isinstance(names, dict) else {name: f"{repo}/{name}" for name in names}
        for name, content in contents.items():
            path = self.root / repo / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return self.root / repo

    def folder(self, repo: str, revision: str) -> Path | None:
        """Of a branch, or of the commit that a branch is at."""
        for path in (self.root / repo).parent.glob("*"):
            name, _, branch = path.name.partition("@")
            if name == repo.split("/")[1] and revision in (branch or "main", commit_of(path)):
                return path
        return None


def files_of(folder: Path) -> dict[str, Path]:
    """Path in the repository -> path on disk, of all its files."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def commit_of(folder: Path) -> str:
    """A commit hash that changes with any file's name or content."""
    return hashlib.sha1(repr([(name, blob_of(path)) for name, path in files_of(folder).items()]).encode()).hexdigest()


def blob_of(path: Path) -> str:
    """The hash git gives a file of this content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_HEAD

    def log_message(self, *_) -> None:
        """Nothing on stderr."""

    def _answer(self) -> None:
        hub: HubServer = self.server.hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = path.strip("/").split("/")
        if path.startswith("/api/models/") and len(parts) >= 4:
            self._on_repository(hub, "/".join(parts[2:4]), parts[4] if len(parts) > 4 else "revision", parts[5:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._on_repository(hub, "/".join(parts[:2]), "resolve", parts[3:])
        elif path == "/api/repos/create":
            self._create(hub)
        elif path == "/api/whoami-v2":
            self._json({"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token"}})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        else:
            self._error(404, "NotFound")

    def _on_repository(self, hub: HubServer, repo: str, what: str, rest: list[str]) -> None:
        trouble, known = hub.trouble.get(repo), self.headers.get("Authorization") == f"Bearer {TOKEN}"
        revision = rest[0] if rest and what != "auth-check" else "main"
        folder = hub.folder(repo, revision)
        if trouble == "login page":
            self._send(200, b"<html>Welcome to our hotel</html>", {"Content-Type": "text/html"})
        elif trouble == "down":
            self._error(503)
        elif trouble == "denied":
            self._error(403)
        elif trouble == "gated" and what == "resolve" and not known:
            self._error(403 if "Authorization" in self.headers else 401, "GatedRepo")
        elif (trouble == "private" and not known) or hub.folder(repo, "main") is None:
            # To whom it does not know the Hub does not tell what exists.
            code = 404 if "Authorization" in self.headers else 401
            self._error(code, "RepoNotFound" if code == 404 else "", "Invalid username or password.")
        elif folder is None:
            self._error(404, "RevisionNotFound")
        else:
            getattr(self, f"_{what.replace('-', '_')}", self._unknown)(repo, folder, "/".join(rest[1:]))

    # reading

    def _revision(self, repo: str, folder: Path, _: str) -> None:
        siblings = [{"rfilename": name} for name in files_of(folder)]
        self._json({"id": repo, "modelId": repo, "sha": commit_of(folder), "siblings": siblings, "tags": []})

    def _tree(self, repo: str, folder: Path, inside: str) -> None:
        files = [(name, path) for name, path in files_of(folder).items() if name.startswith(inside)]
        of_git = [{"path": name, "size": path.stat().st_size, "oid": blob_of(path)} for name, path in files]
        self._json([{"type": "file", **file} for file in of_git])

    def _resolve(self, repo: str, folder: Path, name: str) -> None:
        headers = {"X-Repo-Commit": commit_of(folder), "Accept-Ranges": "bytes"}
        path = files_of(folder).get(name)
        if path is None:
            self._error(404, "EntryNotFound", headers=headers)
            return
        content = path.read_bytes()
        headers |= {"ETag": f'"{blob_of(path)}"', "Content-Type": "application/octet-stream"}
        self._send(200, content, headers)

    def _auth_check(self, repo: str, *_) -> None:
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if allowed and self.server.hub.trouble.get(repo) != "read only":
            self._json({})
        else:
            self._error(403 if allowed else 401)

    def _unknown(self, *_) -> None:
        self._error(404, "NotFound")

    # writing

    def _create(self, hub: HubServer) -> None:
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._error(401, "", "Invalid username or password.")
        elif (hub.root / repo).is_dir():
            self._error(409, "", "You already created this model repo", url=f"{hub.url}/{repo}")
        else:
            (hub.root / repo).mkdir(parents=True)
            if wanted.get("private") or wanted.get("visibility") == "private":
                hub.trouble[repo] = "private"
            self._json({"url": f"{hub.url}/{repo}", "id": repo, "name": repo})

    def _preupload(self, repo: str, folder: Path, _: str) -> None:
        """All files come inside of the commit: none is too large for that here."""
        names = [file["path"] for file in json.loads(self.body)["files"]]
        self._json({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})

    def _commit(self, repo: str, folder: Path, _: str) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._error(403, "", "You need write access to this repository")
            return
        for line in self.body.splitlines():
            entry = json.loads(line)
            path = folder / entry["value"].get("path", "")
            if entry["key"] == "file":
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(entry["value"]["content"]))
        commit = commit_of(folder)
        url = f"{self.server.hub.url}/{repo}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    # answers

    def _json(self, content: object, code: int = 200) -> None:
        self._send(code, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, code: int, kind: str = "", message: str = "", headers: dict | None = None, **more: str) -> None:
        message = message or HTTPStatus(code).phrase
        named = {"X-Error-Code": kind} if kind else {}
        body = json.dumps({"error": message, **more}).encode()
        self._send(
            code, body, {**(headers or {}), **named, "X-Error-Message": message, "Content-Type": "application/json"}
        )

    def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
