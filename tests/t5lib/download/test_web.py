"""https: sources: whole, as asked for, or refused with the remedy."""

import pytest
import requests
from file_server import DATA, NOWHERE, files_in, sha

from t5lib.download import fetch, web
from t5lib.utils.errors import SourceError


def interrupt(server, folder):
    server.cut = 300_000
    with pytest.raises(SourceError, match=r"0\.3 MB of it are kept here.*run again") as caught:
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
