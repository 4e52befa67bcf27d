"""Models from a hub: a server on this machine plays it, whole, gated, private, broken off in the middle, or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ASK = """
import sys
from common.cli import quiet_libraries
quiet_libraries()
from common.errors import UserError
from common.models import resolve_folder
for name in sys.argv[1:]:
    try:
        print(name, "->", sorted(path.name for path in resolve_folder(name).iterdir()))
    except UserError as error:
        print(name, "-> error:", error)
"""


class Hub(BaseHTTPRequestHandler):
    """owner/whole is served; owner/gated and owner/private are refused as the hub does; owner/broken ends in mid-file."""

    folder = None
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", size: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        name = next((part for part in ("whole", "gated", "private", "broken") if f"owner/{part}" in path), None)
        if name in (None, "private"):
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if path.startswith("/api/"):
            files = [{"rfilename": file.name, "type": "file", "path": file.name, "size": file.stat().st_size, "oid": COMMIT}
                     for file in sorted(self.folder.iterdir())]
            info = files if "/tree/" in path else \
                {"id": f"owner/{name}", "sha": COMMIT, "siblings": files, "private": False, "gated": False, "tags": []}
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        if name == "gated":
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted")
        file = self.folder / path.split("/")[-1]
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if name == "broken" and file.suffix == ".safetensors":
            if self.command == "GET":
                self.close_connection = True
            return self.answer(200, content[:1000], size=len(content), **headers)
        self.answer(200, content, **headers)

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def ask(tiny, tmp_path_factory):
    """Ask for models, as a script does, in a process that believes the stub is the hub."""
    handler = type("TinyHub", (Hub,), {"folder": tiny})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = tmp_path_factory.mktemp("hub")

    def run(*names: str, **environment: str) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        result = subprocess.run(
            [sys.executable, "-c", ASK, *names], cwd=ROOT, capture_output=True, text=True, timeout=300,
            env={**clean, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home), "HF_TOKEN": "",
                 "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_ETAG_TIMEOUT": "5", **environment})
        assert result.returncode == 0, result.stderr
        return dict(line.split(" -> ", 1) for line in result.stdout.splitlines() if " -> " in line)

    yield run
    server.shutdown()


@pytest.fixture(scope="module")
def found(ask) -> dict[str, str]:
    return ask("owner/broken", "owner/whole", "owner/gated", "owner/private", "owner/unheard-of")


def test_from_a_hub(found):
    assert "config.json" in found["owner/whole"] and "model.safetensors" in found["owner/whole"]
    assert "owner/gated is gated: accept its licence" in found["owner/gated"] and "HF_TOKEN" in found["owner/gated"]
    for name in ("owner/private", "owner/unheard-of"):
        assert f"the hub has no model {name}, or it is private" in found[name] and "hf auth login" in found[name]
    assert "cannot download owner/broken" in found["owner/broken"] and "--model demo" in found["owner/broken"]


def test_offline(found, ask):
    """What was downloaded before works without a network; what was not says so."""
    again = ask("owner/whole", "owner/gated", HF_HUB_OFFLINE="1")
    assert again["owner/whole"] == found["owner/whole"]
    assert "cannot download owner/gated: no network" in again["owner/gated"]


def test_nobody_answers(ask):
    found = ask("owner/never-seen", HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot download owner/never-seen" in found["owner/never-seen"]
