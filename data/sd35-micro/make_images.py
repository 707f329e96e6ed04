"""Compose captioned pictures from the sprites, in the layout that img2dataset writes.

    python data/sd35-micro/make_images.py                                   # the committed ones
    python data/sd35-micro/make_images.py --train 20000 --val 2000 --sizes 128 --out data/sd35-micro-large

Pictures are stored without loss, as they were when the model was pretrained. Of lossy ones (`--quality 80`) its loss is
1.25 to 1.4 times as high, and a fine-tune then learns the artefacts of compression first.

A sample is `<key>.webp`, `<key>.txt` (the caption) and `<key>.json` (the caption and what the picture shows: emoji,
name, count, background). Scenes are drawn by `--seed`; validation scenes (other seeds) show the same emoji, since a
model that never saw one cannot draw it, but each in another combination of count, background and phrasing than any
training picture.
"""

import argparse
import io
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scenes import compose, draw_scenes, read_sprites, to_bytes
from shards import Sample, write_shards

from t5lib.data.batches import seeded

FOLDER = Path(__file__).parent
SOURCE = "composed by make_images.py from the sprites in data/sd35-micro"
AT_ONCE = 64


def pictures(split: str, number: int, size: int, seed: int, quality: int | None, avoid: set[str]) -> list[Sample]:
    """`number` samples of one size with captions that are not in `avoid`; without loss if `quality` is None."""
    kinds, sprites = read_sprites(FOLDER / "sprites.json")
    generator = seeded(seed, ("train", "val").index(split), size)
    made: list[Sample] = []
    with ThreadPoolExecutor() as pool:
        while len(made) < number:
            scenes = draw_scenes(AT_ONCE, len(kinds), generator)
            stored = pool.map(partial(_stored, quality=quality), to_bytes(compose(sprites, scenes, size)))
            for index, content in enumerate(stored):
                about = scenes.described(index, kinds)
                if about["caption"] in avoid or len(made) == number:
                    continue
                key = f"{split}-{size}-{len(made):06d}"
                about |= {"key": key, "width": size, "height": size}
                made.append((key, {"webp": content, "txt": about["caption"], "json": about}))
    return made


def _stored(picture: np.ndarray, quality: int | None) -> bytes:
    content = io.BytesIO()
    how = {"lossless": True} if quality is None else {"quality": quality, "method": 4}
    Image.fromarray(picture).save(content, "webp", **how)
    return content.getvalue()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="where shards and manifests go")
    parser.add_argument("--train", type=int, default=480, help="training pictures in all")
    parser.add_argument("--val", type=int, default=120, help="validation pictures in all")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="pixels a side, each as many pictures")
    parser.add_argument("--quality", type=int, help="of webp files with loss (default: without loss)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    taken: set[str] = set()
    for split, number in (("train", args.train), ("val", args.val)):
        each = number // len(args.sizes)
        made = [s for size in args.sizes for s in pictures(split, each, size, args.seed, args.quality, taken)]
        taken |= {files["txt"] for _, files in made}
        write_shards(args.out, split, made, source=SOURCE)


if __name__ == "__main__":
    main()
