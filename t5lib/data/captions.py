"""Captioned images as shards: the layout that img2dataset writes.

A sample is `<key>.jpg` (.jpeg, .png, .webp) with its caption in `<key>.txt`, or under "caption" in `<key>.json`; where
both are there the .txt counts.
"""

import json
from typing import Any

from t5lib.data.shards import SampleError, field_of, where
from t5lib.data.tars import Sample

CAPTION_FIELDS = ("txt", "json")
LONGEST = 100_000  # characters; an encoder reads some hundreds of them


def caption_of(sample: Sample) -> str:
    """The caption, without surrounding white space. Raises SampleError when there is none, or none that is text."""
    field = field_of(sample, CAPTION_FIELDS, "caption")
    caption = _text(sample) if field == "txt" else about(sample).get("caption", "")
    if caption is None or (isinstance(caption, str) and not any(map(_is_seen, caption))):
        raise SampleError(f"{where(sample)} has an empty caption; write one, or leave the sample out")
    if not isinstance(caption, str) or len(caption) > LONGEST or not _is_text(caption):
        raise SampleError(f"{where(sample)} has no caption: expected text, got {str(caption)[:40]!r}")
    return caption.strip()


def about(sample: Sample) -> dict[str, Any]:
    """What the sample's .json says; nothing where there is none. Raises SampleError when it is no JSON object."""
    content = sample.get("json", b"{}")
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError):  # no JSON, or nested without end
        entries = None
    if not isinstance(entries, dict):
        raise SampleError(f"{where(sample)}: .json holds no JSON object, but {content[:40]!r}; write it again")
    return entries


def _is_seen(letter: str) -> bool:
    return letter.isprintable() and not letter.isspace()


def _is_text(caption: str) -> bool:
    """Not so: half of a character, as "\\ud800" in JSON; zero bytes, as in UTF-16 without a mark in front."""
    return "\0" not in caption and not any("\ud800" <= letter <= "\udfff" for letter in caption)


def _text(sample: Sample) -> str:
    try:
        return sample["txt"].decode("utf-8-sig")  # Windows puts a mark in front
    except UnicodeDecodeError:
        raise SampleError(
            f"{where(sample)} has no caption: expected text in UTF-8, got {sample['txt'][:40]!r}"
        ) from None
