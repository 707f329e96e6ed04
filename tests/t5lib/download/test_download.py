"""Fetching: every source checked before it is put in place, nothing half-written, each error with its remedy."""

import hashlib
import io
import json
import logging
import os
import re
import shutil
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
import requests

from t5lib.download import fetch, kept, resolve, web
from t5lib.download.hub import check_access
from t5lib.utils.errors import SourceError

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


@pytest.fixture
def server():
    server = Server()
    server.content["/data.bin"] = DATA
    yield server
    server.shutdown()
    server.server_close()


def interrupt(server, folder):
    server.cut = 300_000
    with pytest.raises(SourceError, match=r"0\.3 MB of it are here.*run again") as caught:
        fetch(f"{server.url}/data.bin", folder, sha256=sha(DATA))
    assert caught.value.retryable
    assert not folder.exists(), "the destination never holds half a file"


def test_https_file_is_put_in_place_and_nothing_else_is_left(server, tmp_path):
    path = fetch(f"{server.url}/data.bin?x=1", tmp_path / "out", sha256=sha(DATA).upper())
    assert path == tmp_path / "out/data.bin"
    assert files_in(tmp_path) == {"out/data.bin": DATA}


def test_https_cut_download_goes_on_where_it_stopped(server, tmp_path):
    interrupt(server, tmp_path / "out")
    fetch(f"{server.url}/data.bin", tmp_path / "out", sha256=sha(DATA))
    assert server.seen[-1][2]["Range"] == "bytes=262144-"  # the whole chunks of what came
    assert files_in(tmp_path) == {"out/data.bin": DATA}


@pytest.mark.parametrize("what", ["no ranges", "no version", "changed"])
def test_https_cut_download_starts_again_where_it_cannot_go_on(server, tmp_path, what):
    server.etag = None if what == "no version" else server.etag
    interrupt(server, tmp_path / "out")
    if what == "no ranges":
        server.ranges = False
    if what == "changed":
        server.etag, server.content["/data.bin"] = '"two"', DATA[::-1]
    expected = server.content["/data.bin"]
    fetch(f"{server.url}/data.bin", tmp_path / "out", sha256=sha(expected))
    assert files_in(tmp_path) == {"out/data.bin": expected}


def test_https_download_killed_before_its_rename_is_completed(server, tmp_path):
    interrupt(server, tmp_path / "out")
    next(tmp_path.glob(".*.partial/data.bin.part")).write_bytes(DATA)
    fetch(f"{server.url}/data.bin", tmp_path / "out", sha256=sha(DATA))
    assert files_in(tmp_path) == {"out/data.bin": DATA}


@pytest.mark.parametrize("answered", ["bytes 0-1023999/1024000", "bytes 262145-1023999/1024000", "bytes", None])
def test_https_other_bytes_than_asked_for_are_not_taken(server, tmp_path, answered):
    interrupt(server, tmp_path / "out")
    server.range = answered
    fetch(f"{server.url}/data.bin", tmp_path / "out", sha256=sha(DATA))
    assert files_in(tmp_path) == {"out/data.bin": DATA}


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (206, {"Content-Range": "bytes 0-9/10"}, "answered 206"),
        (200, {"Content-Type": "text/html; charset=utf-8"}, "answered with a web page, perhaps to log in"),
        (200, {"Content-Encoding": "gzip"}, r"came compressed \(gzip\), unasked"),
    ],
)
def test_https_answer_that_is_no_whole_file_is_refused(server, tmp_path, status, headers, message):
    server.status, server.headers = status if status != 200 else None, headers
    with pytest.raises(SourceError, match=message):
        fetch(f"{server.url}/data.bin", tmp_path / "out", sha256=sha(DATA))
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize("told", [True, False], ids=["announced", "endless"])
def test_https_file_that_is_too_large_is_refused(server, tmp_path, monkeypatch, told):
    monkeypatch.setattr(web, "LARGEST", 200_000)
    server.length = told
    with pytest.raises(SourceError, match="no file of weights is so large"):
        fetch(f"{server.url}/data.bin", tmp_path / "out", sha256=sha(DATA))
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize("target", ["http://x/data.bin", "//x/y", "/y", "ftp://x/y"])
def test_https_redirect_to_what_is_not_encrypted_is_refused(target):
    answer = requests.Response()
    answer.url, answer.status_code, answer.headers["location"] = "https://me:secret@x/a", 302, target
    with web._Session() as session:
        if target.startswith("/"):
            assert session.get_redirect_target(answer) == target
            return
        with pytest.raises(SourceError, match=f"redirects to {target}, which is not encrypted") as caught:
            session.get_redirect_target(answer)
    assert "secret" not in str(caught.value)


def test_https_file_that_is_there_is_not_fetched_again(server, tmp_path):
    for _ in range(2):
        fetch(f"{server.url}/data.bin", tmp_path, sha256=sha(DATA))
    assert len(server.seen) == 1


def test_wrong_hash_is_refused_and_removed(server, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/data.bin").write_bytes(b"what was there")
    with pytest.raises(SourceError, match=f"has sha256 {sha(DATA)}, expected {'0' * 64}") as caught:
        fetch(f"{server.url}/data.bin", tmp_path / "out", sha256="0" * 64)
    assert not caught.value.retryable
    assert files_in(tmp_path) == {"out/data.bin": b"what was there"}


@pytest.mark.parametrize(
    ("status", "retryable", "remedy"),
    [(404, False, "check the address"), (403, False, "token"), (503, True, "run again later"), (429, True, "later")],
)
def test_https_refusal_says_whether_trying_again_helps(server, tmp_path, status, retryable, remedy):
    server.status = status
    with pytest.raises(SourceError, match=f"answered {status}.*{remedy}") as caught:
        fetch(f"{server.url}/data.bin", tmp_path / "out", sha256=sha(DATA))
    assert caught.value.retryable is retryable
    assert files_in(tmp_path) == {}


def test_https_without_network_can_be_tried_again(tmp_path):
    with pytest.raises(SourceError, match=r"cannot be reached.*check the network") as caught:
        fetch(f"{NOWHERE}/x.bin", tmp_path / "out", sha256=sha(DATA))
    assert caught.value.retryable


def test_https_gets_only_a_token_that_was_meant_for_it(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hub secret")
    fetch(f"{server.url}/data.bin", tmp_path / "a", sha256=sha(DATA))
    fetch(f"{server.url}/data.bin", tmp_path / "b", sha256=sha(DATA), token="given")
    assert [headers.get("Authorization") for _, _, headers in server.seen] == [None, "Bearer given"]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("ftp://x/y", {}, "expected pypi:NAME==VERSION"),
        ("data/x.bin", {}, "file:PATH"),
        ("http://x/y.bin", {}, "use https, or give the file's sha256"),
        ("https://x/y.bin", {}, r"no sha256.*write https://x/y.bin#sha256=CHECKSUM.*sha256sum"),
        ("https://x/y.bin", {"member": "z", "member_sha256": "0" * 64}, "no sha256"),
        ("https://x/y.bin#sha256=12", {}, "sha256 is '12'; expected 64 hexadecimal digits"),
        ("https://x/y.bin#sha256=" + "0" * 64, {"sha256": "1" * 64}, "another checksum than sha256"),
        ("https://x/", {"sha256": "0"}, "does not end in a file name"),
        ("https://x/..", {}, "does not end in a file name"),
        ("https://x/%00y", {}, "no name for a file"),
        ("https://x/" + "y" * 300, {}, "no name for a file"),
        ("https:y.bin", {}, "not a valid address; expected https://HOST/PATH/FILE"),
        ("https:///y.bin", {}, "not a valid address"),
        ("https://[::1/y.bin", {}, "not a valid address"),
        ("https://x:port/y.bin", {}, "not a valid address"),
        ("https://x:99999/y.bin", {}, "not a valid address"),
        ("https://x/a b.bin", {}, "not a valid address"),
        ("https://x/a\nb.bin", {}, "not a valid address"),
        ("file:", {}, "not understood"),
        ("file:\0", {}, "not understood"),
        ("file:" + "x/" * 3000, {}, "cannot be opened"),
        ("file:~nobody-of-that-name/x", {}, "cannot be opened"),
        ("file:/dev/zero", {}, "is a device, pipe or socket"),
        ("file:/dev/zero", {"member": "x"}, "is a device, pipe or socket"),
        ("file:x", {"member": ".."}, "is no file"),
        ("file:x", {"sha256": "g" * 64}, "expected 64 hexadecimal digits"),
        ("file:x", {"member_sha256": "0"}, "no member"),
        ("pypi:torch", {}, "pypi:NAME==VERSION"),
        ("pypi:torch>=2", {}, "pypi:NAME==VERSION"),
        ("pypi:--index-url==x", {}, "pypi:NAME==VERSION"),
        ("hf:timm/vit", {}, r"no revision.*hf:timm/vit@COMMIT"),
        ("hf:vit", {}, "OWNER/REPO@REVISION"),
        (f"hf:a/b@{COMMIT}", {"sha256": "0"}, "add #FILE"),
    ],
)
def test_source_that_cannot_be_right_is_refused_before_any_work(tmp_path, source, options, message):
    with pytest.raises(SourceError, match=message) as caught:
        fetch(source, tmp_path / "out", **options)
    assert not caught.value.retryable and len(str(caught.value)) < 700
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize("address", ["me:secret@x/y.bin", "me:sec@secret@x/y.bin", "me:a/secret@x/y.bin", "secret@x/y"])
def test_password_in_an_address_is_refused_and_not_shown(tmp_path, address):
    with pytest.raises(SourceError, match=r"not a valid address|user name or password.*netrc") as caught:
        fetch(f"https://{address}", tmp_path / "out", sha256="0" * 64)
    assert "secret" not in str(caught.value)


def test_secret_in_the_query_of_an_address_is_not_shown(server, tmp_path):
    server.status = 404
    with pytest.raises(SourceError, match=r"data\.bin\?X-Amz-Signature=…&x=1 answered 404") as caught:
        fetch(f"{server.url}/data.bin?X-Amz-Signature=hush&x=1", tmp_path / "out", sha256="0" * 64)
    assert "hush" not in str(caught.value)


def test_checksum_may_stand_at_the_end_of_the_address(server, tmp_path):
    assert fetch(f"{server.url}/data.bin#sha256={sha(DATA)}", tmp_path).read_bytes() == DATA
    with pytest.raises(SourceError, match="has sha256"):
        fetch(f"{server.url}/data.bin#sha256={'0' * 64}", tmp_path)


def test_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="is a device, pipe or socket"):
        fetch(f"file:{tmp_path}/pipe", tmp_path / "out", sha256="0" * 64)


def test_hole_of_a_terabyte_is_refused_and_not_read(tmp_path):
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(10**12)
    with pytest.raises(SourceError, match="has 1000 GB, more than a file of weights takes"):
        fetch(f"file:{tmp_path}/hole", tmp_path / "out", sha256="0" * 64)


def test_file_source_is_checked_and_stays_where_it_is(tmp_path):
    (tmp_path / "x.bin").write_bytes(DATA)
    assert fetch(f"file:{tmp_path}/x.bin", tmp_path / "out", sha256=sha(DATA)) == tmp_path / "x.bin"
    with pytest.raises(SourceError, match="has sha256"):
        fetch(f"file:{tmp_path}/x.bin", tmp_path / "out", sha256="0" * 64)
    with pytest.raises(SourceError, match=f"looked for {tmp_path}/y.bin"):
        fetch(f"file:{tmp_path}/y.bin", tmp_path / "out")
    assert files_in(tmp_path) == {"x.bin": DATA}


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder that is all the package index there is, with tiny-weights 1.0 as a wheel."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_wheel(folder)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(folder):
    info = "tiny_weights-1.0.dist-info"
    path = folder / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_weights/model.onnx", DATA)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_pypi_wheel_and_its_member_are_checked_and_only_the_member_is_kept(wheels, tmp_path):
    wheel_sha = sha(next(wheels.iterdir()).read_bytes())
    options = {"sha256": wheel_sha, "member": "tiny_weights/model.onnx", "member_sha256": sha(DATA)}
    path = fetch("pypi:tiny-weights==1.0", tmp_path / "out", **options)
    assert path == tmp_path / "out/model.onnx"
    assert files_in(tmp_path / "out") == {"model.onnx": DATA}
    next(wheels.iterdir()).unlink()
    assert fetch("pypi:tiny-weights==1.0", tmp_path / "out", **options) == path, "what is there needs no index"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sha256": "0" * 64}, "has sha256"),
        ({"member": "tiny_weights/model.onx"}, r"did you mean 'tiny_weights/model\.onnx'"),
        ({"member": "tiny_weights/model.onnx", "member_sha256": "0" * 64}, "member 'tiny_weights/model.onnx' of"),
    ],
    ids=["wheel hash", "missing member", "member hash"],
)
def test_pypi_wheel_with_something_wrong_leaves_nothing(wheels, tmp_path, options, message):
    with pytest.raises(SourceError, match=message) as caught:
        fetch("pypi:tiny-weights==1.0", tmp_path / "out", **options)
    assert not caught.value.retryable
    assert all(name.startswith("wheels/") for name in files_in(tmp_path))


def test_pypi_version_that_does_not_exist_is_final(wheels, tmp_path):
    with pytest.raises(SourceError, match=r"no such wheel.*2\.0") as caught:
        fetch("pypi:tiny-weights==2.0", tmp_path / "out")
    assert not caught.value.retryable


def test_pypi_without_network_can_be_tried_again(wheels, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", NOWHERE)
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(SourceError, match="could not reach its package index") as caught:
        fetch("pypi:other-weights==1.0", tmp_path / "out")
    assert caught.value.retryable


def test_pypi_source_package_is_never_built(wheels, tmp_path):
    marker = tmp_path / "code ran"
    inside = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "evil"\nbackend-path = ["."]\n',
        "evil.py": f"open({str(marker)!r}, 'w')",
    }
    with tarfile.open(wheels / "evil-1.0.tar.gz", "w:gz") as archive:
        for name, text in inside.items():
            entry = tarfile.TarInfo(f"evil-1.0/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    with pytest.raises(SourceError, match="no such wheel"):
        fetch("pypi:evil==1.0", tmp_path / "out")
    assert not marker.exists()


def test_bomb_in_an_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.onnx", bytes(20_000_000))
    with pytest.raises(SourceError, match=r"would grow from .* to 20000000 bytes"):
        fetch(f"file:{tmp_path}/x.zip", tmp_path / "out", member="bomb.onnx")


def test_member_of_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(DATA)
    with pytest.raises(SourceError, match="no wheel or zip archive"):
        fetch(f"file:{tmp_path}/x.bin", tmp_path / "out", member="y")


def test_damaged_archive_is_refused(tmp_path):
    wheel = write_wheel(tmp_path)
    wheel.write_bytes(wheel.read_bytes().replace(DATA[:256], DATA[255::-1], 1))
    with pytest.raises(SourceError, match="damaged"):
        fetch(f"file:{wheel}", tmp_path / "out", member="tiny_weights/model.onnx")
    assert set(files_in(tmp_path)) == {wheel.name}


FILES = {"config.json": b"{}", "model.safetensors": DATA, "unet/a.safetensors": DATA[:500_000]}


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """A hub on this machine with the model owner/repo and the data set owner/set, both of FILES, at COMMIT and main."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    add_repo(server, "models", "owner/repo", "")
    add_repo(server, "datasets", "owner/set", "datasets/")
    return server


def add_repo(server, kind, name, prefix):
    entries = [
        {"rfilename": path, "size": len(body), "blobId": hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()}
        | ({"lfs": {"sha256": sha(body), "size": len(body), "pointerSize": 130}} if "safetensors" in path else {})
        for path, body in FILES.items()
    ]
    tree = [
        {"type": "file", "path": entry["rfilename"], "size": entry["size"], "oid": entry["blobId"]}
        | (
            {"lfs": {"oid": entry["lfs"]["sha256"], "size": entry["size"], "pointerSize": 130}}
            if "lfs" in entry
            else {}
        )
        for entry in entries
    ]
    info = json.dumps({"id": name, "sha": COMMIT, "siblings": entries, "tags": [], "private": False}).encode()
    for revision in (COMMIT, "main"):
        server.content[f"/api/{kind}/{name}/revision/{revision}"] = info
        server.content[f"/api/{kind}/{name}/tree/{revision}"] = json.dumps(tree).encode()
    for path, body in FILES.items():
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha(body)}"'}
        server.content[f"/{prefix}{name}/resolve/{COMMIT}/{path}"] = {"body": body, "headers": headers}


@pytest.mark.parametrize("source", [f"hf:owner/repo@{COMMIT}", f"hf:datasets/owner/set@{COMMIT}"])
def test_hf_whole_repo_arrives_as_it_is_and_without_the_clients_notes(hub, tmp_path, source):
    assert fetch(source, tmp_path / "out") == tmp_path / "out"
    assert files_in(tmp_path) == {f"out/{name}": body for name, body in FILES.items()}


def test_hf_one_file_or_those_of_a_pattern(hub, tmp_path):
    path = fetch(f"hf:owner/repo@{COMMIT}#model.safetensors", tmp_path / "a", sha256=sha(DATA))
    assert path == tmp_path / "a/model.safetensors"
    assert files_in(tmp_path / "a") == {"model.safetensors": DATA}
    fetch(f"hf:owner/repo@{COMMIT}#*.safetensors", tmp_path / "b")
    assert set(files_in(tmp_path / "b")) == {"model.safetensors", "unet/a.safetensors"}
    fetch(f"hf:owner/repo@{COMMIT}#config.json,unet/*", tmp_path / "d")
    assert set(files_in(tmp_path / "d")) == {"config.json", "unet/a.safetensors"}
    with pytest.raises(SourceError, match=r"no file; the repo holds config\.json, model\.safetensors"):
        fetch(f"hf:owner/repo@{COMMIT}#model.bin", tmp_path / "c")


def test_hf_repo_that_is_larger_than_the_disk_is_refused_before_any_of_it_comes(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(SourceError, match=r"room for 0\.0 GB; free some space"):
        fetch(f"hf:owner/repo@{COMMIT}", tmp_path / "out")
    assert not [path for _, path, _ in hub.seen if "/resolve/" in path]


def test_hf_branch_is_resolved_to_its_commit_with_a_warning(hub, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert resolve("hf:owner/repo@main#config.json") == f"hf:owner/repo@{COMMIT}#config.json"
    assert f"not pinned: 'main' may name other files tomorrow; write hf:owner/repo@{COMMIT}" in caplog.text
    assert fetch("hf:owner/repo@main#config.json", tmp_path / "out").read_bytes() == b"{}"


def test_hf_token_of_argument_or_environment_is_sent(hub, tmp_path, monkeypatch):
    fetch(f"hf:owner/repo@{COMMIT}#config.json", tmp_path / "a", token="given")
    assert {headers.get("Authorization", headers.get("authorization")) for *_, headers in hub.seen} == {"Bearer given"}
    hub.seen.clear()
    monkeypatch.setenv("HF_TOKEN", "mine")
    fetch(f"hf:owner/repo@{COMMIT}#config.json", tmp_path / "b")
    assert {headers.get("Authorization", headers.get("authorization")) for *_, headers in hub.seen} == {"Bearer mine"}


@pytest.mark.parametrize(
    ("status", "code", "token", "retryable", "message"),
    [
        (401, "GatedRepo", None, False, "is gated; accept the conditions.*HF_TOKEN"),
        (403, "GatedRepo", "mine", False, "is gated; your token's account has no access"),
        (404, "RepoNotFound", None, False, "does not exist, or is private"),
        (404, "RevisionNotFound", None, False, f"no revision '{COMMIT}'"),
        (503, None, None, True, "answered 503; run again later"),
    ],
)
def test_hf_refusal_says_what_to_do(hub, tmp_path, status, code, token, retryable, message):
    hub.status, hub.headers = status, {"X-Error-Code": code} if code else {}
    with pytest.raises(SourceError, match=message) as caught:
        fetch(f"hf:owner/repo@{COMMIT}", tmp_path / "out", token=token)
    assert caught.value.retryable is retryable
    assert files_in(tmp_path) == {}


def test_access_is_asked_for_without_fetching_anything(hub, tmp_path):
    hub.content["/api/models/owner/repo/auth-check"] = b"{}"
    check_access(f"owner/repo@{COMMIT}#config.json")
    assert not [path for _, path, _ in hub.seen if "/resolve/" in path]
    hub.status, hub.headers = 403, {"X-Error-Code": "GatedRepo"}
    with pytest.raises(SourceError, match=r"is gated; accept the conditions.*HF_TOKEN"):
        check_access("owner/repo@main")


def test_hf_without_network_can_be_tried_again(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", NOWHERE)
    with pytest.raises(SourceError, match=r"cannot be reached.*check the network") as caught:
        fetch(f"hf:owner/repo@{COMMIT}", tmp_path / "out")
    assert caught.value.retryable


@pytest.mark.parametrize("name", ["unet/a.safetensors", "config.json"], ids=["large", "small"])
def test_hf_damaged_file_is_refused_and_only_it_is_fetched_again(hub, tmp_path, name):
    address = f"/owner/repo/resolve/{COMMIT}/{name}"
    good = hub.content[address]["body"]
    hub.content[address]["body"] = good[::-1]
    with pytest.raises(SourceError, match=f"{name} arrived damaged") as caught:
        fetch(f"hf:owner/repo@{COMMIT}", tmp_path / "out")
    assert caught.value.retryable
    assert not (tmp_path / "out").exists()
    hub.content[address]["body"] = good
    hub.seen.clear()
    fetch(f"hf:owner/repo@{COMMIT}", tmp_path / "out")
    assert [path for method, path, _ in hub.seen if method == "GET" and "/resolve/" in path] == [address]
    assert files_in(tmp_path) == {f"out/{name}": body for name, body in FILES.items()}


def test_what_several_want_at_once_is_fetched_once(tmp_path, monkeypatch):
    asked = []

    def fetched(source, folder):
        asked.append(source)
        time.sleep(0.1)
        (folder / "part").mkdir(parents=True)

    monkeypatch.setattr("t5lib.download.fetch", fetched)
    with ThreadPoolExecutor(4) as threads:
        places = list(threads.map(lambda _: kept(f"hf:datasets/me/photos@{COMMIT}", tmp_path), range(4)))
    assert len(asked) == 1 and {(place / "part").is_dir() for place in places} == {True}
