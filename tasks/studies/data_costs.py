"""Measure how time and main memory of checking, encoding and reading images grow with the number of images.

    python -m tasks.studies.data_costs --images 1000 100000
    python -m tasks.studies.data_costs --images 500 --side 512

The pictures are made in a temporary folder, and each step runs in its own process. Encoding is measured without the
encoders, which run on the card: in their place, pixels are averaged.
"""

import io
import multiprocessing
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from t5lib.data.buckets import BucketConfig
from t5lib.data.checking import open_shards
from t5lib.data.encoding import EncodingConfig, encode
from t5lib.data.images import DataConfig, eval_batches, train_batches, transform
from t5lib.data.latents import LatentShards
from t5lib.data.shards import ShardSet
from t5lib.utils.markdown import table
from tasks.studies.common import parser, reported

A_SHARD, CLASSES, BATCH, BATCHES, KINDS = 1000, 10, 50, 20, 100
MIB = 2**20


class _Averages:
    """Stands in for the VAE: (B, 3, H, W) to (B, 3, H / 8, W / 8)."""

    device, channels, multiple = "cpu", 3, 8

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels, 8)

    def settings(self) -> dict[str, Any]:
        return {"vae": "averages"}


def make(folder: Path, images: int, side: int) -> None:
    """Write shards of labelled pictures, which repeat `KINDS` different ones."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(KINDS):
        out, coarse = io.BytesIO(), Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(out, "jpeg", quality=90)
        pictures.append(out.getvalue())
    folder.mkdir()
    for first in range(0, images, A_SHARD):
        with tarfile.open(folder / f"{first // A_SHARD:05d}.tar", "w") as tar:
            for index in range(first, min(first + A_SHARD, images)):
                for ending, content in (("jpg", pictures[index % KINDS]), ("cls", b"%d" % (index % CLASSES))):
                    member = tarfile.TarInfo(f"{index:08d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _check(folder: Path, side: int) -> int:
    classes = [str(index) for index in range(CLASSES)]
    options: dict[str, Any] = {"name": "pictures", "source": "made", "max_skipped": 0.0, "classes": classes}
    found = open_shards(folder / "images", notes=folder / "notes.jsonl", **options)
    found.write(folder / "set.json", root=folder)
    return found.count


def _encode(folder: Path, side: int) -> int:
    config = EncodingConfig(buckets=BucketConfig(sizes=((side, side),)), batch_size=BATCH)
    shards = ShardSet.read(folder / "set.json")
    encode(shards, folder / "encoded", images=_Averages(), text=None, config=config)  # type: ignore[arg-type]
    return shards.count


def _open(folder: Path, side: int) -> int:
    return len(LatentShards(folder / "encoded/manifest.json"))


def _latents(folder: Path, side: int) -> int:
    batches = LatentShards(folder / "encoded/manifest.json").batches(BATCH, seed=0)(0)
    return BATCH * sum(1 for _ in islice(batches, BATCHES))


def _data(side: int) -> DataConfig:
    return DataConfig(img_size=side, num_classes=CLASSES, mean=(0.5,) * 3, std=(0.5,) * 3)


def _train(folder: Path, side: int) -> int:
    shards = ShardSet.read(folder / "set.json")
    batches = train_batches(shards, transform(_data(side)), batch_size=BATCH, seed=0)
    return BATCH * sum(1 for _ in islice(batches, BATCHES))


def _evaluate(folder: Path, side: int) -> int:
    shards = ShardSet.read(folder / "set.json")
    return sum(len(labels) for _, labels in eval_batches(shards, transform(_data(side)), batch_size=BATCH))


STEPS: dict[str, Callable[[Path, int], int]] = {
    "check (stage shards)": _check,
    "encode, without the encoders": _encode,
    "open encoded images": _open,
    f"{BATCHES} batches of encoded images": _latents,
    f"{BATCHES} training batches of images": _train,
    "all images in order": _evaluate,
}


def measured(name: str, folder: Path, side: int) -> tuple[int, float, float]:
    """Images processed, seconds, and MiB by which the process grew."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(name, folder, side, theirs))
    process.start()
    found = ours.recv()
    process.join()
    return found


def _run(name: str, folder: Path, side: int, answer: Any) -> None:
    torch.set_num_threads(1)
    transform(_data(side))  # imports and what is made once shall not count
    before, begun = _peak(), time.perf_counter()
    count = STEPS[name](folder, side)
    answer.send((count, time.perf_counter() - begun, _peak() - before))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else MIB)


def main() -> None:
    arguments = parser("data_costs", str(__doc__))
    arguments.add_argument(
        "--images", type=int, nargs="+", default=[1000], help="numbers of images to measure with (default: 1000)"
    )
    arguments.add_argument("--side", type=int, default=16, help="side of a picture in pixels (default: 16)")
    given = arguments.parse_args()
    rows: list[tuple[str | None, ...]] = []
    with reported("data_costs"), tempfile.TemporaryDirectory() as place:
        for images in given.images:
            folder = Path(place) / str(images)
            folder.mkdir()
            make(folder / "images", images, given.side)
            size = sum(file.stat().st_size for file in (folder / "images").iterdir()) / images
            for name in STEPS:
                count, seconds, grown = measured(name, folder, given.side)
                rows.append((name, f"{images:,}", f"{count / seconds:,.0f}", f"{grown:.0f}", f"{size / 1000:.1f}"))
    columns = ("step", "images", "images per second", "MiB more", "kB per image")
    print("\n".join(table(columns, rows, numbers=True)))


if __name__ == "__main__":
    main()
