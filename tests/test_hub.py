"""Models by name: from a server on loopback that answers as the hub does, at a pinned revision and with a token."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from jraggym.errors import InputError
from jraggym.porting.hub import local_files

COMMIT = "c" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "modeling_evil.py": b"raise SystemExit('code of a repository was run')",
    "pytorch_model.bin": b"a pickle",
}


def digest(content):
    return hashlib.sha1(content).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub's API that a download needs."""

    seen: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def log_message(self, *_):
        pass

    def answer(self, body):
        path = self.path.split("?")[0]
        token = self.headers.get("Authorization")
        self.seen.append((path, token))
        if token != "Bearer secret":
            return self.reply(401, b"", body)
        if path in (f"/api/models/owner/model/revision/{name}" for name in ("v1.0", COMMIT)):
            siblings = [{"rfilename": name} for name in FILES]
            found = {"id": "owner/model", "sha": COMMIT, "siblings": siblings, "private": True, "tags": []}
            return self.reply(200, json.dumps(found).encode(), body)
        if path.startswith("/api/models/owner/model/tree/"):
            listed = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in FILES.items()
            ]
            return self.reply(200, json.dumps(listed).encode(), body)
        name = path.removeprefix(f"/owner/model/resolve/{COMMIT}/")
        if name in FILES:
            return self.reply(200, FILES[name], body)
        return self.reply(404, b"{}", body)

    def reply(self, status, content, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{digest(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 404:
            self.send_header("X-Error-Code", "RevisionNotFound")
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path):
    """A call of `local_files` in a process of its own, whose hub is the server here."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.seen.clear()

    def fetch(name, token="secret"):
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path),
            "HF_TOKEN": token,
        }
        code = "import sys; from jraggym.porting.hub import local_files; print(local_files(sys.argv[1]).folder)"
        command = [sys.executable, "-c", code, name]
        environment = {**os.environ, **settings, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    yield fetch
    server.shutdown()
    server.server_close()


def test_a_pinned_revision_is_downloaded_once_and_none_of_its_code(hub):
    done = hub("owner/model@v1.0")
    assert done.returncode == 0, done.stderr
    folder = done.stdout.strip()
    assert folder.endswith(COMMIT)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.json"]
    with open(f"{folder}/model.safetensors", "rb") as file:
        assert file.read() == FILES["model.safetensors"]
    Hub.seen.clear()
    again = hub(f"owner/model@{COMMIT}")
    assert again.stdout.strip() == folder
    assert not [path for path, _ in Hub.seen if "model.safetensors" in path], "the cache has it"


@pytest.mark.parametrize(("name", "token"), [("owner/model@nowhere", "secret"), ("owner/model@v1.0", "wrong")])
def test_what_the_hub_does_not_give_is_named(hub, name, token):
    done = hub(name, token)
    assert done.returncode != 0
    assert f"the hub does not give {name}" in done.stderr
    assert "HF_TOKEN" in done.stderr


@pytest.mark.parametrize("name", ["owner/model", "model@v1", "no/such/folder"])
def test_a_name_without_a_revision_is_refused(name):
    with pytest.raises(InputError, match=r"no such model; got .*owner/repository@commit"):
        local_files(name)


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert local_files(tmp_path).folder == tmp_path
