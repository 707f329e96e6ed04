"""Packed samples: write `<split>-0000.tar.gz` and the manifest `<split>.json` that lists them."""

import gzip
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

from t5lib.utils.files import write_json

LICENCE = "SIL Open Font License 1.1 (pictures: Noto Color Emoji, Google Inc.); Unicode-DFS-2016 (names: CLDR)"
Sample = tuple[str, dict[str, Any]]  # key, {file ending: bytes, text, or a dictionary that becomes JSON}


def write_shards(folder: Path, split: str, samples: list[Sample], *, source: str, shard_size: int = 1000) -> None:
    """Write the shards of one split into `folder`, then its manifest in the form that t5lib.data.shards reads."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, begin in enumerate(range(0, len(samples), shard_size)):
        part = samples[begin : begin + shard_size]
        content = _packed(part)
        path = folder / f"{split}-{number:04d}.tar.gz"
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(content)
        os.replace(partial, path)
        listed.append({"path": path.name, "count": len(part), "sha256": hashlib.sha256(content).hexdigest()})
        print(f"{path}: {len(part)} samples, {len(content) / 1e6:.2f} MB")
    manifest = {"name": f"sd35-micro {split}", "licence": LICENCE, "source": source, "classes": []}
    write_json(folder / f"{split}.json", {**manifest, "count": len(samples), "shards": listed})


def _packed(samples: list[Sample]) -> bytes:
    """A .tar.gz free of times and owners; compressed because tar pads every tiny file to 512 bytes."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, filename="", mode="wb", compresslevel=9, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for key, files in samples:
            for ending, value in files.items():
                content = _encoded(value)
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def _encoded(value: bytes | str | dict) -> bytes:
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
