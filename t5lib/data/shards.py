"""Image shards: tar files of `<key>.<image>` and `<key>.cls` pairs, listed with counts and sha256 in a JSON manifest.

    {"name": ..., "licence": ..., "source": ..., "classes": [name, ...], "count": 4000,
     "shards": [{"path": "train-0000.tar.gz", "count": 1000, "sha256": ...}, ...]}     (path: relative to the manifest)

A shard is held against its sha256 when a process first reads it. The counts matter, too: a manifest may be of another
file. `left_out` of a shard lists samples that cannot be used; t5lib.data.checking finds them. `unread` counts those at
its end that nobody asked for (`ShardSet.first`).
"""

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BufferedReader
from itertools import count, islice
from pathlib import Path
from typing import Any

from t5lib.data import remote
from t5lib.data.tars import Sample, named, quoted, read_samples
from t5lib.utils.config import Several, WholeNumber, from_dict, settings, to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json

SHA256 = re.compile("[0-9a-f]{64}")
LABEL = re.compile(rb"\s*-?[0-9]{1,9}\s*")
SHOWN_FIELDS = 10  # files of a sample that a message names
IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")


class SampleError(T5Error):
    """One sample cannot be used, which says nothing about the others; it may be left out."""


@settings
class Shard:
    """One tar file.

    Attributes:
        path: absolute once the manifest has been read, or an address (t5lib.data.remote).
        count: samples that are read; those of `left_out` are not among them.
        left_out: positions in the tar of samples that cannot be used, in order; those of `unread` are not among them.
        unread: samples at the end of the tar that are not read.
    """

    path: str
    count: int
    sha256: str
    left_out: Several[WholeNumber] = ()
    unread: WholeNumber = 0

    def __post_init__(self) -> None:
        if list(self.left_out) != sorted({position for position in self.left_out if position < self.end}):
            raise T5Error(f"left_out is {list(self.left_out)}; expected different positions in order, below {self.end}")

    @property
    def end(self) -> int:
        """The position in the tar after the last sample that is read."""
        return self.count + len(self.left_out)

    @property
    def total(self) -> int:
        """How many samples the tar holds."""
        return self.end + self.unread

    def first(self, samples: int) -> "Shard":
        """The same with only its first samples, at least 1; all if there are fewer."""
        if samples >= self.count:
            return self
        left_out = frozenset(self.left_out)
        last = next(islice((position for position in count() if position not in left_out), samples - 1, None))
        before = tuple(position for position in self.left_out if position < last)
        return replace(self, count=samples, left_out=before, unread=self.total - last - 1)

    def samples(self) -> Iterator[Sample]:
        """Its samples in file order, undecoded. Raises T5Error when the tar is not the very file that was listed, or
        holds another number."""
        seen, total, left_out = 0, self.total, frozenset(self.left_out)
        with self.opened() as file:
            for seen, sample in enumerate(read_samples(self.path, file), 1):
                if seen > total:
                    break
                if seen - 1 not in left_out:
                    yield sample
                if self.unread and seen == self.end:
                    return
        if seen != total:
            found = f"more than {total}" if seen > total else seen
            raise T5Error(
                f"{self.path} holds {found} samples, its manifest says {total}; "
                "the manifest is not this file's: make it again"
            )

    @contextmanager
    def opened(self) -> Iterator[BufferedReader]:
        """Open the file, in its place or in the cache.

        Raises T5Error unless it has the sha256 that is listed. The file is not read again for this check if it did not
        change since this process last checked it.
        """
        with named(self.path):
            file = remote.opened(self.path)
        with file:
            if self.sha256:
                with named(self.path):
                    digest = digest_of(file)
                if digest != self.sha256:
                    raise changed(self, digest)
            yield file


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
        """Read a manifest. Raises T5Error when it is malformed, its counts disagree, or a shard is missing or listed
        twice."""
        found = from_dict(cls, _content(manifest), str(manifest))
        shards = tuple(replace(shard, path=_place(shard.path, manifest)) for shard in found.shards)
        for shard in shards:
            if not remote.is_remote(shard.path) and not os.path.isfile(shard.path):
                raise T5Error(f"{shard.path} does not exist, but {manifest} lists it; fetch or make the shards again")
            if shard.count < 1:
                raise T5Error(f"{manifest}: {shard.path} has count {shard.count}; expected at least one sample")
            if not SHA256.fullmatch(shard.sha256):
                raise T5Error(f"{manifest}: {shard.path} has sha256 '{shard.sha256[:80]}'; expected 64 of 0-9a-f")
        _refuse_twice(shards, manifest)
        if not shards or found.count != sum(shard.count for shard in shards):
            total = sum(shard.count for shard in shards)
            raise T5Error(f"{manifest}: count is {found.count}, but its {len(shards)} shards add up to {total}")
        return replace(found, shards=shards)

    @property
    def left_out(self) -> int:
        """How many samples of the tars are not read, for they cannot be used."""
        return sum(len(shard.left_out) for shard in self.shards)

    def first(self, samples: int) -> "ShardSet":
        """The same with only its first samples, at least 1; all if there are fewer."""
        left, shards = samples, list[Shard]()
        for shard in self.shards:
            if left:
                shards.append(shard.first(left))
                left -= shards[-1].count
        return replace(self, count=samples - left, shards=tuple(shards))

    def write(self, manifest: Path | str, root: Path | str) -> None:
        """Write a manifest. Shards under `root` are named relative to it, so that a moved repository still finds
        them and its content does not depend on where the repository lies; others by their absolute path."""
        inside, folder = Path(os.path.abspath(root)), os.path.abspath(Path(manifest).parent)
        data = to_dict(self)
        for shard in data["shards"]:
            if Path(shard["path"]).is_relative_to(inside):
                shard["path"] = Path(os.path.relpath(shard["path"], folder)).as_posix()
        write_json(manifest, data)


def _content(manifest: Path | str) -> Any:
    if not remote.is_remote(manifest):
        return read_json(manifest)
    try:
        return json.loads(remote.text_of(str(manifest)))
    except ValueError:
        raise T5Error(f"{manifest} is not JSON; expected a manifest of shards") from None


def _place(path: str, manifest: Path | str) -> str:
    """The full path or address of a shard that a manifest lists relative to itself."""
    if remote.is_remote(path):
        return path
    if not remote.is_remote(manifest):
        return os.path.abspath(Path(manifest).parent / path)
    if path.startswith("/"):
        raise T5Error(f"{manifest} lists {quoted(path)}; expected addresses, or paths relative to the manifest")
    return posixpath.join(posixpath.dirname(str(manifest)), path)


def changed(shard: Shard, digest: str) -> T5Error:
    """The error for a shard whose sha256 is not the one listed; its copy is removed from the cache."""
    if remote.is_remote(shard.path):
        remote.forget(shard.path)
    return T5Error(
        f"{shard.path} has sha256 {digest}, its manifest says {shard.sha256}; "
        "the file was damaged or replaced: fetch or make it again"
    )


def digest_of(file: BufferedReader) -> str:
    """The sha256 of a file, which is read again only if it changed."""
    found = os.fstat(file.fileno())
    state = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    if state not in _digests:
        file.seek(0)
        _digests[state] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[state]


_digests: dict[tuple[int, ...], str] = {}


def _refuse_twice(shards: Sequence[Shard], manifest: Path | str) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        place = shard.path if remote.is_remote(shard.path) else os.path.realpath(shard.path)
        for mark in {place, shard.sha256}:
            if mark in seen:
                raise T5Error(
                    f"{manifest} lists {shard.path} twice, or {seen[mark]} has the same content; leave one of them "
                    "out, for its samples would count double"
                )
            seen[mark] = shard.path


def label_of(sample: Sample, classes: int) -> int:
    """The sample's class, 0 to `classes` - 1.

    Raises:
        SampleError: there is none, or it is no number in plain digits.
        T5Error: a number out of range, which speaks against the settings and not against the sample.
    """
    content = sample[field_of(sample, ("cls",), "class")]
    if not LABEL.fullmatch(content):  # int() would also take 0_1 and digits of other scripts
        raise SampleError(f"{where(sample)}: .cls holds {content[:40]!r}, expected a number as text")
    label = int(content)
    if not 0 <= label < classes:
        raise T5Error(
            f"{where(sample)} has class {label}, expected 0 to {classes - 1}; "
            "num_classes or the manifest's classes do not fit these shards"
        )
    return label


def field_of(sample: Sample, fields: tuple[str, ...], what: str) -> str:
    """The first of `fields`, such as "png", that the sample has. Raises SampleError when it has none."""
    field = next((field for field in fields if field in sample), None)
    if field is None:
        present = [field for field in sample if not field.startswith("__")]
        found = ", ".join(quoted(f".{field}").strip("'\"") for field in present[:SHOWN_FIELDS]) or "nothing"
        cut = any(each.endswith(tuple(f".{field}" for field in fields)) for each in present)
        hint = "; the key of a sample ends at the first dot: rename files whose names have others" if cut else ""
        raise SampleError(f"{where(sample)} has no {what}: found {found}, expected .{' or .'.join(fields)}{hint}")
    return field


def where(sample: Sample) -> str:
    """The sample's tar and key, as messages name it."""
    return f"{sample['__url__']}: sample {quoted(sample['__key__'])}"
