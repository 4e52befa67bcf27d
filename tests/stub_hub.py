"""A hub on this machine: serves a folder's models/<owner>/<name> and datasets/<owner>/<name>.

A model called gated is refused as the hub refuses a gated one, private as one that nobody may know
of, and the weights of broken end in mid-file. Models are uploaded into the same folder, with a
token that names their owner: write-<owner>.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from conftest import ROOT
from forks import forks

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?$"
)
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


class StubHub:
    """A context manager. by_repository: bytes of files' contents that went out, for each.
    requests: method and path of all that came. uploads: what was uploaded and not committed yet, by
    SHA-256. made: whether each repository that was made is private.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.by_repository: dict[str, int] = {}
        self.requests: list[str] = []
        self.uploads: dict[str, bytes] = {}
        self.made: dict[str, bool] = {}
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})
        )
        self._lock = threading.Lock()

    def __enter__(self) -> StubHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def takes(self, what: str) -> bool:
        """Whether it takes "front matter" of cards, or "content" of large files."""
        return True

    def count(self, repository: str, size: int) -> None:
        with self._lock:
            self.by_repository[repository] = self.by_repository.get(repository, 0) + size

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a process whose hub this is; it keeps what it fetches in `home`."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return {
            **clean,
            "HF_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "HF_HOME": str(home),
            "HF_TOKEN": "",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "HF_HUB_ETAG_TIMEOUT": "5",
            **more,
        }

    def python(self, code: str, *arguments: str, home: Path, **environment: str) -> list[str]:
        """Run Python code of the project with this hub. Returns the lines that it printed."""
        words = ["-c", code, *arguments]
        result = forks().run(words, ROOT, self.environment(home, **environment))
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()


class _Handler(BaseHTTPRequestHandler):
    hub: StubHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(
        self, status: int, body: bytes = b"", size: int | None = None, **headers: str
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        length = int(self.headers.get("Content-Length") or 0)
        form = parse_qs(self.rfile.read(length).decode()) if length else {}
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        if found := _API.match(path):
            kind, repository, question, revision, where = found.groups()
        elif found := _FILE.match(path):
            kind, repository, revision, where = found.groups()
            kind, question = (kind or "models").rstrip("/"), "file"
        else:
            return self.answer(404)
        folder = self.hub.folder / kind / repository
        name = repository.split("/")[1]
        if name == "private" or not folder.is_dir():
            return self.answer(
                401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found"
            )
        if revision not in (None, "main", COMMIT):
            return self.answer(
                404, X_Error_Code="RevisionNotFound", X_Error_Message="Revision not found"
            )
        if question == "file":
            return self.file(folder, repository, where)
        if question == "paths-info":
            entries = [
                _entry(folder, folder / one)
                for one in form.get("paths", [])
                if (folder / one).exists()
            ]
        elif question == "tree":
            if not (folder / where).is_dir():
                return self.answer(
                    404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found"
                )
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            entries = [
                _entry(folder, file)
                for file in sorted((folder / where).glob("**/*" if recursive else "*"))
            ]
        else:
            files = [
                {"rfilename": str(file.relative_to(folder))}
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            ]
            entries = {
                "id": repository,
                "sha": COMMIT,
                "siblings": files,
                "private": False,
                "gated": False,
                "tags": [],
            }
        self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")

    do_HEAD = do_GET

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if "/paths-info/" in path:
            return self.do_GET()
        body = self.body()
        if path == "/api/validate-yaml":
            if self.hub.takes("front matter"):
                return self.json(errors=[], warnings=[])
            content = json.dumps({"errors": [{"message": "odd"}], "warnings": []}).encode()
            return self.answer(400, content, Content_Type="application/json")
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked.get('organization')}/{asked['name']}"
        else:
            repository = re.match(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?/", path)[1]
        if self.headers.get("Authorization") != f"Bearer write-{repository.split('/')[0]}":
            return self.answer(403, X_Error_Message="You have no rights here")
        if path == "/api/repos/create":
            (self.hub.folder / "models" / repository).mkdir(parents=True, exist_ok=True)
            self.hub.made.setdefault(repository, asked.get("visibility") == "private")
            return self.json(url=f"{self.address}/{repository}")
        if "/preupload/" in path:
            return self.json(files=[_upload_mode(file) for file in json.loads(body)["files"]])
        if path.endswith("/objects/batch"):
            return self.json(objects=[self.upload_to(one) for one in json.loads(body)["objects"]])
        self.commit(repository, [json.loads(line) for line in body.splitlines()])

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def upload_to(self, stored: dict) -> dict:
        """Where the content of a large file goes, as Git LFS says it."""
        action = {"href": f"{self.address}/content/{stored['oid']}"}
        return {**stored, "actions": {"upload": action}}

    def do_PUT(self):
        content, digest = self.body(), self.path.rpartition("/")[2]
        self.hub.requests.append(f"PUT {self.path}")
        if hashlib.sha256(content).hexdigest() != digest or not self.hub.takes("content"):
            return self.answer(400)
        self.hub.uploads[digest] = content
        self.answer(200)

    def commit(self, repository: str, lines: list[dict]) -> None:
        """Put the files of a commit in place: small ones are in it, of large ones the hashes."""
        folder = self.hub.folder / "models" / repository
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                (folder / value["path"]).write_bytes(self.hub.uploads[value["oid"]])
        self.json(commitUrl=f"{self.address}/{repository}/commit/{COMMIT}", commitOid=COMMIT)

    def json(self, **content) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def body(self) -> bytes:
        """What was sent, of a known length or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def file(self, folder: Path, repository: str, where: str) -> None:
        """A file of a repository, whole or the range that is asked for."""
        file, name = folder / where, repository.split("/")[1]
        if name == "gated":
            return self.answer(
                403, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted"
            )
        if not file.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        content = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X_Repo_Commit": COMMIT,
            "Accept_Ranges": "bytes",
        }
        if name == "broken" and file.suffix == ".safetensors":
            self.close_connection = self.command == "GET"
            return self.answer(200, content[:1000], size=len(content), **headers)
        asked = re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range") or "")
        status = 200
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            status, content = 206, content[first : last + 1]
        if self.command == "GET":
            self.hub.count(repository, len(content))
        self.answer(status, content, **headers)


def _upload_mode(file: dict) -> dict:
    large = file["path"].endswith(".safetensors")
    return {**file, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}


def _entry(folder: Path, file: Path) -> dict:
    """A file or folder as the hub lists it."""
    path = str(file.relative_to(folder))
    oid = hashlib.sha1(path.encode()).hexdigest()
    if file.is_dir():
        return {"type": "directory", "path": path, "oid": oid, "size": 0}
    large = {
        "lfs": {
            "oid": hashlib.sha256(path.encode()).hexdigest(),
            "size": file.stat().st_size,
            "pointerSize": 134,
        }
    }
    return {
        "type": "file",
        "path": path,
        "oid": oid,
        "size": file.stat().st_size,
        **(large if file.suffix in (".parquet", ".safetensors") else {}),
    }
