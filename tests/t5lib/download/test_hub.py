"""hf: sources, from a hub on this machine."""

import hashlib
import json
import logging
import shutil

import huggingface_hub.constants
import pytest
from file_server import COMMIT, DATA, NOWHERE, files_in, sha

from t5lib.download import fetch, resolve
from t5lib.download.hub import Listed, check_access, look
from t5lib.utils.errors import SourceError

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


@pytest.mark.parametrize("name", ["../out.bin", "/tmp/out.bin", "a/../../out.bin"])
def test_hf_repo_that_lists_files_outside_of_it_is_refused(hub, tmp_path, name):
    listed = json.loads(hub.content[f"/api/models/owner/repo/revision/{COMMIT}"])
    listed["siblings"].append({"rfilename": name, "size": 1})
    hub.content[f"/api/models/owner/repo/revision/{COMMIT}"] = json.dumps(listed).encode()
    with pytest.raises(SourceError, match="which lies outside the repo; do not use this repo"):
        fetch(f"hf:owner/repo@{COMMIT}#*", tmp_path / "out")
    assert files_in(tmp_path) == {}


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


def tokens(hub):
    return {headers.get("Authorization", headers.get("authorization")) for *_, headers in hub.seen}


def test_hf_token_of_argument_or_environment_is_sent(hub, tmp_path, monkeypatch):
    fetch(f"hf:owner/repo@{COMMIT}#config.json", tmp_path / "a", token="given")
    assert tokens(hub) == {"Bearer given"}
    hub.seen.clear()
    monkeypatch.setenv("HF_TOKEN", "mine")
    fetch(f"hf:owner/repo@{COMMIT}#config.json", tmp_path / "b")
    assert tokens(hub) == {"Bearer mine"}


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


def test_what_a_source_names_is_listed_without_fetching_it(hub):
    assert look(f"owner/repo@{COMMIT}#*.safetensors") == Listed(files=2, size=len(DATA) + 500_000, gated=False)
    info = json.loads(hub.content["/api/models/owner/repo/revision/main"]) | {"gated": "manual"}
    hub.content["/api/models/owner/repo/revision/main"] = json.dumps(info).encode()
    assert look("owner/repo@main") == Listed(files=3, size=len(DATA) + 500_002, gated=True)
    assert not [path for _, path, _ in hub.seen if "/resolve/" in path]


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
