"""Shards at an address are read as if they lay here, from a cache that stays small; errors name the address."""

import dataclasses

import pytest
import torch
from encodable import labelled, shard_set
from file_server import Server

from t5lib.data import remote
from t5lib.data.checking import open_shards
from t5lib.data.images import DataConfig, eval_batches, transform
from t5lib.data.shards import ShardSet
from t5lib.utils.errors import SourceError, T5Error

TEN = [str(index) for index in range(10)]
DATA = DataConfig(img_size=8, num_classes=10, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def made(server, tmp_path, monkeypatch) -> ShardSet:
    """Four shards in a folder, which the server serves."""
    found = shard_set(
        {tmp_path / f"{n}.tar": [labelled(6 * n + index) for index in range(6)] for n in range(4)}, classes=10
    )
    found.write(tmp_path / "set.json", root=tmp_path)
    server.content = {f"/{path.name}": path.read_bytes() for path in tmp_path.iterdir()}
    server.seen, server.cut = [], None
    monkeypatch.setenv(remote.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    return found


@pytest.fixture
def opened(server, tmp_path):
    def shards(source: str) -> ShardSet:
        return open_shards(
            f"{server.url}/{source}",
            name="away",
            source=source,
            notes=tmp_path / "notes",
            max_skipped=0.0,
            classes=TEN,
        )

    return shards


def fetched(server) -> list[str]:
    return [path for command, path, _ in server.seen if command == "GET" and path.endswith(".tar")]


def images(shards: ShardSet, workers: int = 0) -> torch.Tensor:
    return torch.cat([batch for batch, _ in eval_batches(shards, transform(DATA), batch_size=4, workers=workers)])


@pytest.mark.parametrize("source", ["{0..3}.tar", "set.json"])
def test_they_are_read_as_if_they_lay_here_and_each_is_fetched_once(source, server, made, opened, tmp_path):
    shards = opened(source)
    assert [shard.sha256 for shard in shards.shards] == [shard.sha256 for shard in made.shards]
    shards.write(tmp_path / "out/train.json", root=tmp_path)  # as the stage does
    read = ShardSet.read(tmp_path / "out/train.json")
    assert read.shards[0].path == f"{server.url}/0.tar"
    assert torch.equal(images(read, workers=2), images(made))  # both workers read every shard
    assert sorted(fetched(server)) == [f"/{n}.tar" for n in range(4)]


def test_the_cache_keeps_to_its_limit(server, made, opened, tmp_path, monkeypatch):
    size = (tmp_path / "0.tar").stat().st_size
    monkeypatch.setenv(remote.LIMIT, str(2.5 * size / 1e9))
    shards = opened("{0..3}.tar")
    assert torch.equal(images(shards), images(made))
    assert len(list((tmp_path / "cache/shards").iterdir())) == 2
    assert len(fetched(server)) == 8
    monkeypatch.setenv(remote.LIMIT, str(0.5 * size / 1e9))
    with pytest.raises(T5Error, match=r"/0\.tar has 0\.0 GB, but the cache may hold only .* raise T5_CACHE_GB"):
        images(shards)
    monkeypatch.setenv(remote.LIMIT, "much")
    with pytest.raises(T5Error, match="T5_CACHE_GB is 'much'; expected gigabytes"):
        images(shards)


def test_a_damaged_shard_is_named_and_fetched_again_once_it_is_mended(server, made, opened, tmp_path):
    whole = server.content["/2.tar"]
    server.content["/2.tar"] = whole[:1500] + b"x" + whole[1501:]
    with pytest.raises(T5Error, match=rf"{server.url}/2\.tar has sha256 \w+, its manifest says"):
        opened("set.json")
    server.content["/2.tar"] = whole
    assert opened("set.json").count == 24
    server.content["/3.tar"] = whole[:2048]
    (tmp_path / "cache/shards").rename(tmp_path / "cache/old")
    with pytest.raises(T5Error, match=r"/3\.tar was cut short"):
        opened("{3..3}.tar")


def test_a_connection_that_breaks_off_is_tried_again_and_what_is_missing_is_not(server, made, opened):
    server.cut = 700
    assert opened("{0..0}.tar").count == 6
    with pytest.raises(SourceError, match=r"/7\.tar does not exist or may not be read") as raised:
        opened("7.tar")
    assert not raised.value.retryable
    shard = dataclasses.replace(made.shards[0], path="http://127.0.0.1:9/0.tar")
    with pytest.raises(SourceError, match=r"127\.0\.0\.1:9/0\.tar cannot be fetched .*try again later") as raised:
        list(shard.samples())
    assert raised.value.retryable


def test_addresses_are_checked_and_listed(server, made, tmp_path):
    remote.check(f"{server.url}/{{0..3}}.tar")
    with pytest.raises(SourceError, match=r"/8\.tar does not exist"):
        remote.check(f"{server.url}/8.tar")
    assert remote.listed("memory://no/{a,b}.tar") == ["memory://no/a.tar", "memory://no/b.tar"]
    with pytest.raises(SourceError, match="matches nothing"):
        remote.listed("memory://no/*.tar")


def test_a_manifest_elsewhere_names_no_file_of_this_machine(server, made, opened, tmp_path):
    server.content["/set.json"] = server.content["/set.json"].replace(b'"0.tar"', b'"/etc/passwd"')
    with pytest.raises(T5Error, match=r"set\.json lists '/etc/passwd'; expected addresses"):
        opened("set.json")
