"""A web server of files on this machine, a wheel, and what tests of fetching ask of a folder."""

import hashlib
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

DATA = bytes(range(256)) * 4000  # 1 MB


COMMIT = "0123456789abcdef0123456789abcdef01234567"


NOWHERE = "http://127.0.0.1:9"  # nothing listens on the discard port


def sha(data):
    return hashlib.sha256(data).hexdigest()


def files_in(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


class Server(ThreadingHTTPServer):
    """Serves `content` (path → bytes), sending only the first `cut` bytes of the next answer when that is set."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.seen = {}, []
        self.cut = self.status = self.headers = None
        self.ranges, self.etag = True, '"one"'
        self.range, self.length = "", True  # another Content-Range than that of the answer; tell the length
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, path = self.server, unquote(urlsplit(self.path).path)
        if path in server.content:  # not what another process asks, whose own server had this port before
            server.seen.append((self.command, path, dict(self.headers)))
        body, status, extra = server.content.get(path), server.status or 200, dict(server.headers or {})
        if isinstance(body, dict):  # a file of the hub, with headers of its own
            extra |= body["headers"]
            body = body["body"]
        if body is None and status == 200:
            status = 404
        body = body if body is not None and status == 200 else b""
        if status == 200 and server.etag:
            extra.setdefault("ETag", server.etag)
            body, status = self.part(body, status, extra)
        self.send_response(status)
        if server.length:
            extra["Content-Length"] = str(len(body))
        else:
            self.close_connection = True
        for name, value in extra.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: server.cut])
            if server.cut is not None:
                server.cut, self.close_connection = None, True

    do_HEAD = do_GET

    def part(self, body, status, extra):
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range", extra["ETag"]) == extra["ETag"]
        if not (wanted and same and self.server.ranges):
            return body, status
        start = int(wanted[1])
        if start >= len(body):
            return b"", 416
        extra["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if self.server.range != "":
            extra["Content-Range"] = str(self.server.range)
        return body[start:], 206

    def log_message(self, *args):
        pass


def write_wheel(folder):
    info = "tiny_weights-1.0.dist-info"
    path = folder / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_weights/model.onnx", DATA)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path
