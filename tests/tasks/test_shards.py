import io
import shutil
import tarfile
from pathlib import Path

import pytest
from file_server import Server
from PIL import Image

from t5lib import download
from t5lib.data.shards import ShardSet
from t5lib.utils.errors import SourceError, T5Error
from t5lib.utils.files import read_json, sha256, write_json
from tasks.targets.run import run_stage

DATA = {"img_size": 8, "num_classes": 3, "mean": [0, 0, 0], "std": [1, 1, 1]}
OUT = Path("data/out/demo/shards")


def write_tar(path: Path, first: int, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index in range(first, first + count):
            picture = io.BytesIO()
            Image.new("L", (8, 8), index).save(picture, "png")
            for ext, content in (("cls", b"%d" % (index % 3)), ("png", picture.getvalue())):
                member = tarfile.TarInfo(f"{index}.{ext}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def with_manifest(folder: Path, split: str, first: int, count: int) -> str:
    tar = write_tar(folder / f"{split}-0.tar", first, count)
    shard = {"path": tar.name, "count": count, "sha256": sha256(tar)}
    about = {"name": split, "licence": "none", "source": "test", "classes": ["a", "b", "c"]}
    write_json(folder / f"{split}.json", about | {"count": count, "shards": [shard]})
    return f"file:{folder / split}.json"


def run(root: Path, train: str, val: str, **data) -> dict:
    params = {"shards": {"train": train, "val": val}, "data": DATA | data}
    return run_stage("shards", "demo", params=params, root=root)


def test_shards_at_an_address_are_read_from_there_and_are_not_kept_in_data(tmp_path, monkeypatch):
    monkeypatch.setenv("T5_CACHE", str(tmp_path / "cache"))
    server = Server()
    for number in range(2):
        server.content[f"/train-{number}.tar"] = write_tar(tmp_path / "a.tar", 10 * number, 4).read_bytes()
    val = f"file:{write_tar(tmp_path / 'val.tar', 50, 3)}"
    found = run(tmp_path, f"{server.url}/train-{{0,1}}.tar", val)
    assert (found["train"], found["train_shards"]) == (8, 2) and not (tmp_path / "data/datasets").exists()
    assert ShardSet.read(tmp_path / OUT / "train.json").shards[1].path == f"{server.url}/train-1.tar"
    server.shutdown()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://host/a.tar", r"'http://host/a\.tar'; expected https://"),
        ("https://me:secret@host/a.tar", "holds a user name or password"),
        ("hf://datasets/me/pictures/a.tar", "expected hf://datasets/OWNER/REPO@COMMIT/PATTERN"),
        ("ftp:a.tar", r"expected file:MANIFEST\.json, .* or an address such as https://HOST"),
    ],
)
def test_addresses_are_encrypted_pinned_and_without_secrets(source, message, tmp_path):
    with pytest.raises(T5Error, match=message) as raised:
        run(tmp_path, source, "file:val")
    assert "secret" not in str(raised.value)


def test_committed_shards_keep_relative_paths_so_that_a_moved_repository_finds_them(tmp_path, monkeypatch):
    root = tmp_path / "repo"
    for split, first in (("train", 0), ("val", 10)):
        with_manifest(root / "data/numbers", split, first, 6)
    monkeypatch.chdir(tmp_path)
    metrics = run(Path("repo"), "file:data/numbers/train.json", "file:data/numbers/val.json")
    assert metrics == {
        "train": 6,
        "val": 6,
        "classes": 3,
        "train_left_out": 0,
        "val_left_out": 0,
        "train_shards": 1,
        "val_shards": 1,
    }
    assert read_json(root / OUT / "train.json")["shards"][0]["path"] == "../../../numbers/train-0.tar"
    shutil.move(root, tmp_path / "moved")
    moved = ShardSet.read(tmp_path / "moved" / OUT / "val.json")
    assert [len(list(shard.samples())) for shard in moved.shards] == [6]


def test_the_repository_itself_may_be_reached_by_another_path(tmp_path):
    sources = [with_manifest(tmp_path / "outside", split, first, 6) for split, first in (("train", 0), ("val", 10))]
    (tmp_path / "repo").mkdir()
    run(tmp_path / "repo", *sources)
    assert read_json(tmp_path / "repo" / OUT / "val.json")["shards"][0]["path"] == str(tmp_path / "outside/val-0.tar")


def test_a_folder_and_a_pattern_without_manifest_are_counted(tmp_path):
    for index in range(3):
        write_tar(tmp_path / f"plain/deep/train-{index}.tar", 20 * index, 4 + index)
    write_tar(tmp_path / "mixed/val-0.tar", 80, 5)
    write_tar(tmp_path / "mixed/train-0.tar", 90, 5)
    metrics = run(tmp_path, "file:plain", f"file:{tmp_path}/mixed/val-*.tar")
    assert metrics == {
        "train": 15,
        "val": 5,
        "classes": 3,
        "train_left_out": 0,
        "val_left_out": 0,
        "train_shards": 3,
        "val_shards": 1,
    }
    written = ShardSet.read(tmp_path / OUT / "train.json")
    assert [shard.count for shard in written.shards] == [4, 5, 6] and written.classes == ("0", "1", "2")


def test_of_a_limit_the_metrics_tell_and_later_stages_read_no_more(tmp_path):
    sources = [with_manifest(tmp_path, split, first, 6) for split, first in (("train", 0), ("val", 10))]
    params = {"shards": {"train": sources[0], "val": sources[1], "limit": 4}, "data": DATA}
    metrics = run_stage("shards", "demo", params=params, root=tmp_path)
    assert (metrics["train"], metrics["val"], metrics["train_left_out"], metrics["limit"]) == (4, 4, 0, 4)
    written = ShardSet.read(tmp_path / OUT / "train.json")
    assert [sample["__key__"] for sample in written.shards[0].samples()] == list("0123")


def test_hub_shards_are_fetched_once_and_half_a_download_is_not_taken_for_all(tmp_path, monkeypatch):
    calls = []

    def fetch(source: str, folder: Path) -> Path:
        calls.append(source)
        first = 50 if "val" in source else 0
        write_tar(folder / "0.tar", first, 3)
        if len(calls) == 1:
            raise SourceError("the network went away", retryable=True)
        write_tar(folder / "1.tar", first + 10, 3)
        return folder

    monkeypatch.setattr(download, "fetch", fetch)
    monkeypatch.setattr(download, "resolve", lambda source: source.replace("@main", "@" + "0" * 40))
    train, val = (f"hf:datasets/me/pictures@main#{split}-*.tar" for split in ("train", "val"))
    with pytest.raises(SourceError):
        run(tmp_path, train, val)
    assert run(tmp_path, train, val)["train"] == 6
    assert run(tmp_path, train, val)["val"] == 6
    pinned = [source.replace("@main", "@" + "0" * 40) for source in (train, val)]
    assert calls == [pinned[0], *pinned]
    assert [shard.count for shard in ShardSet.read(tmp_path / OUT / "train.json").shards] == [3, 3]


@pytest.mark.parametrize(
    ("train", "val", "data", "message"),
    [
        ("s3:bucket", "file:v.json", {}, "train is 's3:bucket'; expected file:MANIFEST.json"),
        ("file:nowhere", "file:v.json", {}, r"file:nowhere gives no shards: looked for \*\.tar"),
        ("file:nowhere.json", "file:v.json", {}, r"nowhere\.json does not exist"),
        ("file:t.json", "file:v.json", {"num_classes": 9}, "have 3 classes, but data.num_classes is 9"),
        ("file:train-0.tar", "file:v.json", {}, r"classes of train \(3\) and val \(3\) differ in number, names"),
        (
            "file:train-0.tar",
            "file:val-0.tar",
            {"num_classes": 2},
            "train-0.tar: sample '2' has class 2, expected 0 to 1",
        ),
        ("file:t.json", "file:t.json", {}, r"val is 'file:t\.json', and so is train"),
        ("file:t.json", "file:copy.json", {}, r"train-0\.tar of val is also in train"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(tmp_path, train, val, data, message):
    with_manifest(tmp_path, "train", 0, 6)
    with_manifest(tmp_path, "val", 10, 6)
    (tmp_path / "train.json").rename(tmp_path / "t.json")
    (tmp_path / "val.json").rename(tmp_path / "v.json")
    shutil.copy(tmp_path / "t.json", tmp_path / "copy.json")
    with pytest.raises(T5Error, match=message):
        run(tmp_path, train, val, **data)
    assert not (tmp_path / OUT).exists()


def test_an_unreadable_image_is_left_out_and_counted_before_training_meets_it(tmp_path, capsys):
    for split, first in (("train", 0), ("val", 10)):
        tar = write_tar(tmp_path / f"{split}.tar", first, 6)
        tar.write_bytes(tar.read_bytes().replace(b"IDAT", b"IDAX", 1))
    sources = [f"file:{tmp_path}/{split}.tar" for split in ("train", "val")]
    with pytest.raises(T5Error, match=r"1 of the 6 samples of demo train cannot be used.*sample '0': \.png is not a"):
        run(tmp_path, *sources)
    params = {"shards": {"train": sources[0], "val": sources[1], "max_skipped": 0.2}, "data": DATA}
    metrics = run_stage("shards", "demo", params=params, root=tmp_path)
    assert (metrics["train"], metrics["train_left_out"], metrics["val_left_out"]) == (5, 1, 1)
    assert [one["__key__"] for one in ShardSet.read(tmp_path / OUT / "train.json").shards[0].samples()] == list("12345")
    assert "demo val: left out 1 of 6" in capsys.readouterr().out


def test_a_damaged_shard_is_found_before_anything_is_written(tmp_path):
    with_manifest(tmp_path, "train", 0, 6)
    with_manifest(tmp_path, "val", 10, 6)
    damaged = tmp_path / "val-0.tar"
    damaged.write_bytes(damaged.read_bytes().replace(b"IDAT", b"IDAX", 1))
    with pytest.raises(T5Error, match=r"val-0\.tar has sha256 \w+, its manifest says"):
        run(tmp_path, "file:train.json", "file:val.json")
    assert not (tmp_path / OUT).exists()
