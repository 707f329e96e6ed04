"""Captioned images as shards: the layout that img2dataset writes.

A sample is `<key>.jpg` (.jpeg, .png, .webp) with its caption in `<key>.txt`, or under "caption" in `<key>.json`; where
both are there the .txt counts.
"""

import io
import json
from pathlib import Path

from PIL import Image, ImageOps

from t5lib.data.shards import IMAGE_FIELDS, Sample, ShardSet, scan, tar_files, where
from t5lib.utils.errors import T5Error

CAPTION_FIELDS = ("txt", "json")
WHITE = (255, 255, 255, 255)


def open_captioned(source: str, *, name: str, root: Path | str, notes: Path) -> ShardSet:
    """The shards that `source` names, every one read and checked: counts, checksums, an image and a caption a sample.

    Args:
        source: `file:MANIFEST.json`, which the shards are held against, or `file:FOLDER` or `file:PATTERN` of tar
            files, which are counted and hashed once. Relative paths start at `root`.
        name: of the set, for messages and its manifest.
        notes: file in which finished shards are noted (t5lib.data.shards.scan).

    Raises:
        T5Error: another form of `source`; no shards; a damaged, empty or changed one; a sample without image or
            caption, by name.
    """
    scheme, _, path = source.partition(":")
    if scheme != "file" or not path:
        raise T5Error(
            f"captioned images: '{source}' is no source; expected file:MANIFEST.json, file:FOLDER or file:GLOB"
        )
    place = Path(root) / Path(path).expanduser()
    if place.suffix == ".json":
        shards = ShardSet.read(place)
        shards.verify(check_captioned)
        return shards
    return scan(name, tar_files(place, source), (), source, notes, check_captioned)


def check_captioned(sample: Sample) -> None:
    """Raises T5Error that names shard and key unless there are an image and a file that can hold the caption."""
    _field(sample, IMAGE_FIELDS, "image")
    _field(sample, CAPTION_FIELDS, "caption")


def caption_of(sample: Sample) -> str:
    """The caption, without surrounding white space. Raises T5Error when there is none, or an empty one."""
    content = sample[_field(sample, CAPTION_FIELDS, "caption")]
    try:
        found = content.decode() if "txt" in sample else json.loads(content)["caption"]
    except (ValueError, KeyError, TypeError):
        raise T5Error(
            f'{where(sample)} has no caption: expected text in UTF-8 in .txt, or a .json with the entry "caption", '
            f"found {content[:40]!r}"
        ) from None
    if not isinstance(found, str) or not found.strip():
        raise T5Error(f"{where(sample)} has an empty caption; write one, or leave the sample out")
    return found.strip()


def image_of(sample: Sample, channels: int = 3) -> Image.Image:
    """The decoded image: RGB, or grey for `channels` 1; upright as its EXIF entry says, transparent parts on white.
    With `channels` 4 RGBA, as it is.

    Raises:
        T5Error: it cannot be read.
    """
    field = _field(sample, IMAGE_FIELDS, "image")
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(sample[field])))
        if channels == 4:
            return image.convert("RGBA")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
        return image.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # Pillow raises nearly anything on damaged files
        reason = str(error).partition(" <")[0]
        raise T5Error(f"{where(sample)}: .{field} is not a readable image ({reason}); replace it") from error


def _field(sample: Sample, fields: tuple[str, ...], what: str) -> str:
    found = next((field for field in fields if field in sample), None)
    if found is None:
        present = ", ".join(f".{field}" for field in sample if not field.startswith("__")) or "nothing"
        raise T5Error(f"{where(sample)} has no {what}: found {present}, expected .{' or .'.join(fields)}")
    return found
