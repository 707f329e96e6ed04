"""Make image shards and their manifests from the Fashion-MNIST IDX files.

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb unpacked
    python data/fashion-mnist/make.py --source unpacked/usr/share/datasets/fashion-mnist

Selection rule, without chance: the same number of images of every class, always the first ones in the file, kept in
the file's order (which mixes the classes). Training images come from the training file, validation images from the
test file; the number in a key is the image's position in its file. Needs only NumPy and Pillow; the same versions of
Pillow and zlib write the same bytes.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
IDX_FILES = {"train": "train", "val": "t10k"}
SOURCE = "Fashion-MNIST, Zalando Research; Debian package dataset-fashion-mnist 0.0~git20200523.55506a9-1"
LICENCE = "MIT, Copyright 2017 Zalando SE, https://tech.zalando.com"


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """The uint8 array of a gzipped IDX file (http://yann.lecun.com/exdb/mnist describes the format)."""
    if not path.exists():
        sys.exit(f"{path} does not exist; --source must name the folder that holds the four .gz files")
    data = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(data, ">u4", count=ndim, offset=4) if len(data) >= 4 + 4 * ndim else ()
    if data[:4] != bytes([0, 0, 8, ndim]) or len(data) != 4 + 4 * ndim + np.prod(shape, dtype=np.int64):
        sys.exit(f"{path} is not a whole IDX file of {ndim} dimensions of bytes; unpack the package again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def select(labels: np.ndarray, count: int, split: str) -> np.ndarray:
    """Positions of the first count/10 images of every class, ascending."""
    each = count // len(CLASSES)
    fewest = np.bincount(labels, minlength=len(CLASSES)).min()
    if count <= 0 or count % len(CLASSES) or each > fewest:
        expected = f"a positive multiple of {len(CLASSES)} up to {fewest * len(CLASSES)}"
        sys.exit(f"--{split} {count}: expected {expected}, so that every class has as many images")
    return np.sort(np.concatenate([np.flatnonzero(labels == index)[:each] for index in range(len(CLASSES))]))


def shard_bytes(samples: list[tuple[str, np.ndarray, int]]) -> bytes:
    """A .tar.gz of `key.cls` and `key.png` for every (key, greyscale image, class), free of times and owners.

    Compressed because tar pads every tiny file to 512 bytes; readers see through it.
    """
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, filename="", mode="wb", compresslevel=9, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for key, image, label in samples:
            png = io.BytesIO()
            Image.fromarray(image).save(png, "png", optimize=True)
            for name, content in ((f"{key}.cls", b"%d" % label), (f"{key}.png", png.getvalue())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def make(split: str, source: Path, out: Path, count: int, shard_size: int) -> None:
    """Write the shards of one split into `out`, then the manifest `<split>.json` that lists them."""
    images = read_idx(source / f"{IDX_FILES[split]}-images-idx3-ubyte.gz", 3)
    labels = read_idx(source / f"{IDX_FILES[split]}-labels-idx1-ubyte.gz", 1)
    chosen = select(labels, count, split)
    shards = []
    for number, begin in enumerate(range(0, count, shard_size)):
        part = chosen[begin : begin + shard_size]
        content = shard_bytes([(f"{split}-{i:05d}", images[i], int(labels[i])) for i in part])
        path = out / f"{split}-{number:04d}.tar.gz"
        write(path, content)
        shards.append({"path": path.name, "count": len(part), "sha256": hashlib.sha256(content).hexdigest()})
        print(f"{path}: {len(part)} images, {len(content) / 1e6:.2f} MB")
    manifest = {
        "name": f"fashion-mnist {split}",
        "licence": LICENCE,
        "source": SOURCE,
        "classes": CLASSES,
        "count": count,
        "shards": shards,
    }
    write(out / f"{split}.json", (json.dumps(manifest, indent=2) + "\n").encode())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder of the IDX .gz files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where shards and manifests go")
    parser.add_argument("--train", type=int, default=4000, help="training images")
    parser.add_argument("--val", type=int, default=1000, help="validation images")
    parser.add_argument("--shard-size", type=int, default=1000, help="images a shard")
    args = parser.parse_args(arguments)
    if args.shard_size < 1:
        parser.error(f"--shard-size {args.shard_size}: expected at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    make("train", args.source, args.out, args.train, args.shard_size)
    make("val", args.source, args.out, args.val, args.shard_size)


if __name__ == "__main__":
    main()
