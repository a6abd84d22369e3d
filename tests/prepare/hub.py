"""A hub of one repository, small enough to read: what huggingface_hub asks for when it lists and downloads."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """``refuse``: status and ``X-Error-Code`` for every request."""

    folder: Path
    kind: str = "models"
    refuse: tuple[int, str] | None = None
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def files(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": oid(path)}
            for path in sorted(self.folder.iterdir())
            if path.is_file()
        ]


def oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def answer(hub: Hub, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body for a path such as ``/api/models/org/name/revision/main``."""
    if hub.refuse:
        return hub.refuse[0], {"X-Error-Code": hub.refuse[1], "X-Error-Message": "refused"}, b"{}"
    parts = path.strip("/").split("/")
    if parts[0] != "api":
        file = hub.folder / parts[-1]
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": f'"{oid(file)}"', "X-Repo-Commit": COMMIT}, file.read_bytes()
    if parts[1] != hub.kind or "/".join(parts[2:4]) != "org/name":
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
    what = parts[4:5]
    if what == ["revision"] and parts[5] not in ("main", COMMIT):
        return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
    if what == ["tree"]:
        return 200, {}, json.dumps(hub.files()).encode()
    if what == ["paths-info"]:
        wanted = json.loads(body)["paths"]
        return 200, {}, json.dumps([each for each in hub.files() if each["path"] in wanted]).encode()
    siblings = [{"rfilename": each["path"]} for each in hub.files()]
    about = {"id": "org/name", "sha": COMMIT, "private": False, "siblings": siblings, "tags": [], "downloads": 0}
    return 200, {}, json.dumps(about).encode()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """The hub at ``hub.url`` for as long as the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            path = unquote(urlparse(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            status, headers, body = answer(hub, path, self.rfile.read(length))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = reply

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
