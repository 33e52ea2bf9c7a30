"""A Hugging Face Hub on the loopback, as its client asks for files: every repository has the files of one folder."""

import contextlib
import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `folder`; `asked` are (repository, revision, file) in order, without repetitions."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked: list[tuple[str, str, str]] = []
        self.silent: set[str] = set()  # files at which the connection ends
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        place = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", unquote(self.path))
        if place is None:
            return self._send(404, {}, b"")
        if place.groups() not in self.server.asked:
            self.server.asked.append(place.groups())
        if place[3] in self.server.silent:
            self.close_connection = True
            return None
        content = None
        with contextlib.suppress(OSError):
            content = (self.server.folder / place[3]).read_bytes()
        if content is None:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b"")
        return self._send(200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, content, body)

    def _send(self, status: int, headers: dict[str, str], content: bytes, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)
