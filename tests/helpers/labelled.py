"""Shards of small labelled images."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from t5lib.utils.files import sha256, write_json


def write_split(folder: Path, split: str, count: int, rng: np.random.Generator) -> None:
    """Noise with one colour brighter: that is the class."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"{split}.tar", "w") as tar:
        for index in range(count):
            label = index % 3
            pixels = rng.integers(0, 200, (32, 32, 3))
            pixels[:, :, label] += 12
            png = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(png, "png")
            for name, content in ((f"{index:04d}.cls", b"%d" % label), (f"{index:04d}.png", png.getvalue())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    shard = {"path": f"{split}.tar", "count": count, "sha256": sha256(folder / f"{split}.tar")}
    about = {"name": split, "licence": "none", "source": "test", "classes": ["red", "green", "blue"]}
    write_json(folder / f"{split}.json", about | {"count": count, "shards": [shard]})
