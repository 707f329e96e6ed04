"""Image shards: tar files of `<key>.<image>` and `<key>.cls` pairs, listed with counts and sha256 in a JSON manifest.

    {"name": ..., "licence": ..., "source": ..., "classes": [name, ...], "count": 4000,
     "shards": [{"path": "train-0000.tar.gz", "count": 1000, "sha256": ...}, ...]}     (path: relative to the manifest)

The counts matter: a tar that was cut between two of its members reads as a shorter tar, without any error.
"""

import glob
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from webdataset.tariterators import tarfile_samples

from t5lib.utils.config import Several, from_dict, settings, to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, sha256, write_json
from t5lib.utils.progress import progress

T = TypeVar("T")
IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
TAR_NAMES = ("*.tar", "*.tar.gz", "*.tgz")
Sample = dict[str, Any]  # webdataset's form: "__key__", "__url__", and one entry of bytes for each file of that key
Check = Callable[[Sample], object]  # raises T5Error that names the sample when something is missing in it


@settings
class Shard:
    """One tar file. `path` is absolute once the manifest has been read."""

    path: str
    count: int
    sha256: str

    def samples(self) -> Iterator[Sample]:
        """Its samples in file order, undecoded. Raises T5Error when the tar is damaged or holds another number."""
        seen = 0
        for seen, sample in enumerate(_read_tar(self.path), 1):
            if seen > self.count:
                break
            yield sample
        if seen != self.count:
            found = f"more than {self.count}" if seen > self.count else seen
            raise T5Error(
                f"{self.path} holds {found} samples, its manifest says {self.count}; "
                "the file was cut short or replaced: fetch or make it again"
            )


@settings
class ShardSet:
    """The shards of one split and what its manifest says about them. Class i of a sample is `classes[i]`."""

    name: str
    licence: str
    source: str
    classes: Several[str]
    count: int
    shards: Several[Shard]

    @classmethod
    def read(cls, manifest: Path | str) -> "ShardSet":
        """Read a manifest. Raises T5Error when it is malformed, its counts disagree, or a shard is missing."""
        found = from_dict(cls, read_json(manifest), str(manifest))
        folder = Path(manifest).parent
        shards = tuple(replace(shard, path=os.path.abspath(folder / shard.path)) for shard in found.shards)
        for shard in shards:
            if not os.path.exists(shard.path):
                raise T5Error(f"{shard.path} does not exist, but {manifest} lists it; fetch or make the shards again")
            if shard.count < 1:
                raise T5Error(f"{manifest}: {shard.path} has count {shard.count}; expected at least one sample")
        if not shards or found.count != sum(shard.count for shard in shards):
            total = sum(shard.count for shard in shards)
            raise T5Error(f"{manifest}: count is {found.count}, but its {len(shards)} shards add up to {total}")
        return replace(found, shards=shards)

    def write(self, manifest: Path | str, root: Path | str) -> None:
        """Write a manifest. Shards under `root` are named relative to it, so that a moved repository still finds
        them and its content does not depend on where the repository lies; others by their absolute path."""
        inside, folder = Path(os.path.abspath(root)), os.path.abspath(Path(manifest).parent)
        data = to_dict(self)
        for shard in data["shards"]:
            if Path(shard["path"]).is_relative_to(inside):
                shard["path"] = Path(os.path.relpath(shard["path"], folder)).as_posix()
        write_json(manifest, data)

    def verify(self, check: Check | None = None) -> None:
        """Check every shard against the manifest, reading all of it: sha256, count, and each sample by `check`
        (default: an image and a known class). Raises T5Error that names the shard, and the sample where it is one."""
        check = check or _labelled(len(self.classes))
        for shard in _shown(self.shards, f"verify {self.name}"):
            digest = sha256(shard.path)
            if digest != shard.sha256:
                raise T5Error(
                    f"{shard.path} has sha256 {digest}, its manifest says {shard.sha256}; "
                    "the file was damaged or replaced: fetch or make it again"
                )
            for sample in shard.samples():
                check(sample)


def tar_files(place: Path, source: str) -> list[Path]:
    """The tar files in a folder and below, or those that a pattern matches. Raises T5Error when there are none."""
    if place.is_dir():
        found = [path for pattern in TAR_NAMES for path in place.rglob(pattern)]
    else:
        found = [Path(path) for path in glob.glob(str(place))]
    if not found:
        raise T5Error(f"{source} gives no shards: looked for {' '.join(TAR_NAMES)} in {place.absolute()}")
    return sorted(found)


def scan(
    name: str, paths: Sequence[Path], classes: Sequence[str], source: str, notes: Path, check: Check | None = None
) -> ShardSet:
    """List tar files that came without a manifest: read all of them, count and check the samples, hash.

    Each finished shard is noted in the file `notes` (one JSON line) with its size and time, so that a scan that was
    stopped goes on, and files that did not change are never read twice.

    Args:
        classes: their names; none for samples that have no class, which then need a `check` of their own.
        check: what every sample must satisfy; default: an image and a known class.

    Raises:
        T5Error: a damaged or empty tar, or a sample that does not satisfy `check`.
    """
    check = check or _labelled(len(classes))
    noted = _read_notes(notes)
    shards = []
    for path in _shown(paths, f"count {name}"):
        status = path.stat()
        state = os.path.abspath(path), status.st_size, status.st_mtime_ns, len(classes)
        if state not in noted:
            noted[state] = _count(path, check), sha256(path)
            notes.parent.mkdir(parents=True, exist_ok=True)
            with notes.open("a", encoding="utf-8") as file:
                file.write(json.dumps([*state, *noted[state]]) + "\n")
        samples, digest = noted[state]
        shards.append(Shard(path=state[0], count=samples, sha256=digest))
    return ShardSet(
        name=name,
        licence="that of the source",
        source=source,
        classes=tuple(classes),
        count=sum(shard.count for shard in shards),
        shards=tuple(shards),
    )


def check(sample: Sample, classes: int) -> tuple[str, int]:
    """The sample's image field (such as "png") and class. Raises T5Error that names shard and key."""
    image = next((field for field in IMAGE_FIELDS if field in sample), None)
    fields = ", ".join(f".{field}" for field in sample if not field.startswith("__")) or "nothing"
    if image is None:
        raise T5Error(f"{where(sample)} has no image: found {fields}, expected .{' or .'.join(IMAGE_FIELDS)}")
    if "cls" not in sample:
        raise T5Error(f"{where(sample)} has no class: found {fields}, expected a .cls file with the class number")
    try:
        label = int(sample["cls"])
    except ValueError:
        raise T5Error(f"{where(sample)}: .cls holds {sample['cls'][:40]!r}, expected a number as text") from None
    if not 0 <= label < classes:
        raise T5Error(
            f"{where(sample)} has class {label}, expected 0 to {classes - 1}; "
            "num_classes or the manifest's classes do not fit these shards"
        )
    return image, label


def where(sample: Sample) -> str:
    return f"{sample['__url__']}: sample '{sample['__key__']}'"


def _read_tar(path: str) -> Iterator[Sample]:
    try:
        yield from tarfile_samples([{"url": path}])
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error.args[0] if error.args else error).partition(" @ ")[0]
        raise T5Error(f"{path} cannot be read as a tar file ({reason}); fetch or make it again") from error


def _labelled(classes: int) -> Check:
    return lambda sample: check(sample, classes)


def _count(path: Path, check: Check) -> int:
    count = 0
    for sample in _read_tar(os.path.abspath(path)):
        check(sample)
        count += 1
    if not count:
        raise T5Error(f"{path} holds no samples; expected files such as 0001.jpg and 0001.cls (or 0001.txt)")
    return count


def _read_notes(notes: Path) -> dict[tuple, tuple[int, str]]:
    noted = {}
    for line in notes.read_text(encoding="utf-8").splitlines() if notes.exists() else ():
        try:
            *state, count, digest = json.loads(line)
        except ValueError:
            continue  # half a line: the scan was killed while writing it
        noted[tuple(state)] = count, digest
    return noted


def _shown(items: Sequence[T], title: str) -> Iterator[T]:
    with progress(title, len(items)) as report:
        for done, item in enumerate(items, 1):
            yield item
            report.advance(done)
