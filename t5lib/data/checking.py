"""Shards before they are used: every tar read to its end, every sample decoded once.

A sample that cannot be used (a damaged image, an empty caption) is left out: it is counted, the first are named, and
the caller says which share may be. Everything else that is wrong is an error.
"""

import glob
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import BufferedReader
from pathlib import Path

from t5lib.data.captions import about, caption_of
from t5lib.data.decoding import image_of, is_animated, most_pixels
from t5lib.data.remote import is_remote, listed
from t5lib.data.shards import IMAGE_FIELDS, SampleError, Shard, ShardSet, digest_of, field_of, label_of, where
from t5lib.data.tars import Sample, check_tar, named, read_samples
from t5lib.utils.errors import T5Error
from t5lib.utils.parallel import ahead
from t5lib.utils.progress import progress

TAR_NAMES = ("*.tar", "*.tar.gz", "*.tgz")
NAMED = 3  # samples left out that a message names
ANIMATED = "animated, of which the first frame is taken"
SEVERAL = "with several images, of which one is read (the key of a sample ends at the first dot of a file's name)"
RULES = 3  # version of the rules: what was noted under another version is checked again
ROUNDING = 1e-6  # 0.29 of 100 samples are 28.999…
THREADS = os.cpu_count() or 1


def open_captioned(
    source: str, *, name: str, root: Path | str, notes: Path, max_skipped: float = 0.01, limit: int | None = None
) -> ShardSet:
    """The shards of captioned images that `source` names, checked as `open_shards` does.

    Args:
        source: `file:MANIFEST.json`, `file:FOLDER` or `file:PATTERN` of tar files, whose relative paths start at
            `root`; or the address of a manifest or of tar files (t5lib.data.remote).

    Raises:
        T5Error: another form of `source`, or what `open_shards` refuses.
    """
    scheme, _, path = source.partition(":")
    place: Path | str = source
    if not is_remote(source):
        if scheme != "file" or not path:
            raise T5Error(
                f"captioned images: '{source}' is not a source; expected file:MANIFEST.json, file:FOLDER, file:PATTERN "
                "or an address such as https://HOST/train-{0000..0099}.tar"
            )
        place = Path(root) / Path(path).expanduser()
    return open_shards(place, name=name, source=source, notes=notes, max_skipped=max_skipped, limit=limit)


def open_shards(
    place: Path | str,
    *,
    name: str,
    source: str,
    notes: Path,
    max_skipped: float,
    limit: int | None = None,
    classes: Sequence[str] = (),
) -> ShardSet:
    """The shards at `place`, without the samples that cannot be used; how many those are is printed.

    Args:
        place: a manifest (.json), against which the shards are checked, or a folder or pattern of tar files, or the
            address of either (t5lib.data.remote).
        name: of a set without manifest, and of the set in messages.
        source: how the user named `place`, for messages.
        notes: file in which finished shards are noted by their sha256, so that a check that was stopped goes on, and
            samples that were decoded once are not decoded again.
        max_skipped: share of the samples that may be left out.
        limit: only the first so many samples that can be used, 1 or more; shards after those are not opened.
        classes: their names; none for samples that have captions in their place. A manifest has its own.

    Raises:
        T5Error: no shards; a damaged or changed one; two with the same content; more samples than `max_skipped` that
            cannot be used; a class out of range.
    """
    if str(place).endswith(".json"):
        named_set = _manifest(place, labelled=bool(classes))
        shards = named_set.shards
    else:
        licence = "that of the source"
        named_set = ShardSet(name=name, licence=licence, source=source, classes=tuple(classes), count=0, shards=())
        paths = listed(place) if isinstance(place, str) else map(os.path.abspath, tar_files(place, source))
        shards = tuple(Shard(path=path, count=0, sha256="") for path in paths)
    checked = _checked(shards, named_set.name, len(named_set.classes), notes, limit)
    _report(checked, named_set.name, max_skipped)
    usable = tuple(each.usable for each in checked if each.usable.count)
    found = replace(named_set, count=sum(shard.count for shard in usable), shards=usable)
    return found if limit is None else found.first(limit)


def tar_files(place: Path, source: str) -> list[Path]:
    """The tar files in a folder and below, or those that a pattern matches, sorted.

    Raises:
        T5Error: there are none, or something else has such a name.
    """
    if place.is_dir():
        found = [path for pattern in TAR_NAMES for path in place.rglob(pattern)]
    else:
        found = [Path(path) for path in glob.glob(str(place))]
    if not found:
        raise T5Error(f"{source} gives no shards: looked for {' '.join(TAR_NAMES)} in {place.absolute()}")
    if odd := [path for path in found if not path.is_file()]:
        raise T5Error(f"{odd[0]} is not a file, or a link to one that is gone; remove it, or put the tar file there")
    return sorted(found)


@dataclass(frozen=True)
class _Content:
    """What is in a tar.

    Attributes:
        count: of its samples.
        unusable: [position, reason] of those that cannot be used.
        remarks: what is to be said about others: by remark, [how many, the first of them].
    """

    count: int
    unusable: list[list]
    remarks: dict[str, list]


@dataclass(frozen=True)
class _Checked:
    """A shard as it was listed, and its content. What was left out before is not counted again."""

    listed: Shard
    sha256: str
    content: _Content

    @property
    def unusable(self) -> dict[int, str]:
        known, end = self.listed.left_out, self.end
        return {position: why for position, why in self.content.unusable if position < end and position not in known}

    @property
    def end(self) -> int:
        """The position in the tar after the last sample that the listed shard reads."""
        return self.content.count - self.listed.unread

    @property
    def usable(self) -> Shard:
        left_out = tuple(sorted({*self.listed.left_out, *self.unusable}))
        count, unread = self.end - len(left_out), self.listed.unread
        return Shard(path=self.listed.path, count=count, sha256=self.sha256, left_out=left_out, unread=unread)


def _manifest(place: Path | str, *, labelled: bool) -> ShardSet:
    listed = ShardSet.read(place)
    if labelled and not listed.classes:
        raise T5Error(f"{place} lists no classes; expected a manifest of labelled images")
    return listed if labelled else replace(listed, classes=())


def _checked(shards: Sequence[Shard], name: str, classes: int, notes: Path, limit: int | None) -> list[_Checked]:
    noted, paths, checked, usable = _Notes(notes, classes), dict[str, str](), [], 0
    with progress(f"check {name}", len(shards)) as bar:
        for done, shard in enumerate(shards, 1):
            with shard.opened() as file:
                with named(shard.path):
                    digest = digest_of(file)
                if digest in paths:
                    raise T5Error(f"{shard.path} and {paths[digest]} have the same content; leave one of them out")
                content = noted.known.get(digest) or noted.add(digest, _content(shard.path, file, classes))
            if shard.sha256 and content.count != shard.total:
                raise T5Error(
                    f"{shard.path} holds {content.count} samples, its manifest says {shard.total}; "
                    "the manifest is not this file's: make it again"
                )
            paths[digest] = shard.path
            checked.append(_Checked(shard, digest, content))
            bar.advance(done)
            usable += checked[-1].usable.count
            if limit is not None and usable >= limit:
                break
    return checked


def _content(path: str, file: BufferedReader, classes: int) -> _Content:
    """Raises T5Error when the tar is damaged or empty, or a class is out of range."""
    check_tar(path, file)
    count, unusable, remarks = 0, [], dict[str, list]()
    samples = read_samples(path, file)
    verdicts = ahead(partial(_verdict, classes=classes), samples, workers=THREADS, count=2 * THREADS)
    for count, (sample, reason, said) in enumerate(verdicts, 1):
        if reason:
            unusable.append([count - 1, reason])
        for remark in said:
            first = remarks.setdefault(remark, [0, sample])
            first[0] += 1
    if not count:
        raise T5Error(f"{path} holds no samples; expected files such as 0001.jpg and 0001.cls (or 0001.txt)")
    return _Content(count, unusable, remarks)


def _verdict(sample: Sample, classes: int) -> tuple[str, str | None, list[str]]:
    """The sample's name, why it cannot be used, and else what is to be said of it."""
    try:
        if classes:
            label_of(sample, classes)
        else:
            caption_of(sample), about(sample)
        image_of(sample)
    except SampleError as error:
        return where(sample), str(error), []
    animated = is_animated(sample[field_of(sample, IMAGE_FIELDS, "image")])
    images = [field for field in sample if field.rpartition(".")[2] in IMAGE_FIELDS]
    return where(sample), None, [ANIMATED] * animated + [SEVERAL] * (len(images) > 1)


def _report(checked: Sequence[_Checked], name: str, max_skipped: float) -> None:
    """Print what is left out and what is remarkable; raises T5Error when that is more than `max_skipped`, or all."""
    total = sum(each.end - len(each.listed.left_out) for each in checked)
    reasons = [reason for each in checked for reason in each.unusable.values()]
    first = "; ".join(reasons[:NAMED])
    allowed = min(int(max_skipped * total + ROUNDING), total - 1)
    if len(reasons) > allowed:
        raise T5Error(
            f"{len(reasons)} of the {total} samples of {name} cannot be used, and max_skipped ({max_skipped:g}) allows "
            f"{allowed}. The first: {first}"
        )
    if reasons:
        print(f"{name}: left out {len(reasons)} of {total}: {first}", flush=True)
    for remark in (ANIMATED, SEVERAL):
        if said := [each.content.remarks[remark] for each in checked if remark in each.content.remarks]:
            print(f"{name}: {sum(many for many, _ in said)} {remark}, such as {said[0][1]}", flush=True)


class _Notes:
    """What is known about the content of tars, by their sha256: one JSON line each."""

    def __init__(self, file: Path, classes: int):
        self.file, self.kind = file, [RULES, classes, most_pixels()]  # what else decides about the samples
        self.known: dict[str, _Content] = {}
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            try:
                entry = json.loads(line)
                if entry["kind"] == self.kind:
                    self.known[entry["sha256"]] = _Content(**entry["content"])
            except (ValueError, TypeError, KeyError):
                continue  # half a line: the check was killed while writing it

    def add(self, digest: str, content: _Content) -> _Content:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"sha256": digest, "kind": self.kind, "content": asdict(content)}) + "\n")
        self.known[digest] = content
        return content
