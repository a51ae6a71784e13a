"""A Hugging Face hub on this machine: enough of its HTTP interface to stream data sets.

    hub = serve(folder)        # folder/OWNER/NAME/...: the files of each data set
    os.environ["HF_ENDPOINT"] = hub.url

It answers requests for the revision, tree and paths of a repository, and for files with byte
ranges. The revision is a hash of the content. `hub.requests` lists the requests.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


def serve(folder: Path) -> ThreadingHTTPServer:
    """Start the hub on a free port of the loopback device; stop it with `shutdown()`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.requests = Path(folder), []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def files_of(repo: Path) -> list[str]:
    """Return the paths of a repository's files, sorted and relative to it."""
    return sorted(p.relative_to(repo).as_posix() for p in repo.rglob("*") if p.is_file())


def revision_of(repo: Path) -> str:
    """Return forty hex digits that change with the content."""
    content = b"".join(name.encode() + (repo / name).read_bytes() for name in files_of(repo))
    return hashlib.sha1(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answer one request of a client."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Keep the terminal quiet."""

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def answer(self, body: bytes = b""):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        found = re.fullmatch(r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/([\w-]+)/([^/]+)(?:/(.*))?)?",
                             path)
        repo = self.server.folder / found[1] if found else None
        if repo is None or not repo.is_dir():
            return self.fail("RepoNotFound")
        self.commit = revision_of(repo)
        action, revision, rest = found[2] or "revision", found[3] or "main", found[4] or ""
        if revision not in ("main", self.commit):
            return self.fail("RevisionNotFound")
        if action == "resolve":
            return self.send_file(repo / rest)
        if action == "revision":
            siblings = [{"rfilename": name} for name in files_of(repo)]
            return self.send_json({"id": found[1], "sha": self.commit, "siblings": siblings,
                                   "private": False, "tags": [], "downloads": 0})
        if action == "tree":
            return self.send_tree(repo, rest)
        if action == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else []
            return self.send_json([entry(repo, p) for p in wanted if (repo / p).exists()])
        return self.fail("EntryNotFound")

    def send_tree(self, repo: Path, under: str):
        paths = (repo / under).rglob("*") if "recursive=true" in self.path.lower() else (
            repo / under).glob("*")
        self.send_json([entry(repo, p.relative_to(repo).as_posix()) for p in sorted(paths)])

    def send_file(self, path: Path):
        if not path.is_file():
            return self.fail("EntryNotFound")
        content, first, status = path.read_bytes(), 0, 200
        last = len(content) - 1
        if wanted := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, status = int(wanted[1]), 206
            last = min(last, int(wanted[2] or last))
        self.send(status, content[first:last + 1], {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes",
            "Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def send_json(self, value):
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def fail(self, code: str):
        self.commit = ""
        self.send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, content: bytes, headers: dict):
        self.send_response(status)
        for name, value in {**headers, "X-Repo-Commit": self.commit,
                            "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def entry(repo: Path, name: str) -> dict:
    """Return the hub's description of a file or folder."""
    path = repo / name
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    content = path.read_bytes()
    return {"type": "file", "path": name, "size": len(content),
            "oid": hashlib.sha1(content).hexdigest()}
