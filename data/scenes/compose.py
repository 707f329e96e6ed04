"""Composes scenes with masks from the pieces that make.py builds: objects pasted on photographs of places.

    python data/scenes/compose.py --pieces data/scenes/pieces --out data/scenes/scenes --per-fold 340

Every object and every background belongs to one of five folds, by class, and so does every scene: nothing of it is seen
in a scene of another fold. A model that is fitted on four folds and measured on the fifth has seen none of its objects
and none of its backgrounds. Scene n of a fold follows from the seed, the fold and n alone.

The folder that this script writes holds scenes.json (what Composed says) and for every fold

    fold-F-images.npy           (n, S, S, 3) uint8
    fold-F-entities-CELL.npy    (n, S/CELL, S/CELL) uint16: of each square of CELL × CELL pixels which entity it shows

An entity is one object or one background. A square shows the class that covers most of it, and of that class the entity
that does. With patches of 14 pixels, CELL 14 is for scenes in full size and CELL 28 for scenes in half size.
"""

import argparse
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from t5lib.utils.config import AtLeastOne, Pair, Positive, Share, WholeNumber, settings, to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import atomic_dir, read_json, write_json
from t5lib.utils.seeds import numpy_generator

FOLDS = 5
CELLS = (14, 28)
BACKGROUND = "background"
SPLIT, SCENE = range(2)  # keep the random streams of one seed apart


@settings
class SceneConfig:
    """What scenes are like.

    Attributes:
        side: of the square image in pixels, a multiple of every one of CELLS.
        objects: least and most a scene.
        length: shortest and longest long side of an object, as a part of the scene's side.
        enlarged: how much larger than its cut-out an object is shown at most.
        crop: least part of a background's short side that is shown.
        seed: of folds and scenes.
    """

    side: AtLeastOne = 1036
    objects: Pair[int] = (3, 6)
    length: Pair[float] = (0.21, 0.5)
    enlarged: Positive = 3.0
    crop: Share = 0.6
    seed: WholeNumber = 0

    def __post_init__(self):
        wrong = [cell for cell in CELLS if self.side % cell]
        if wrong:
            raise T5Error(f"side is {self.side}; expected a multiple of {max(CELLS)}, such as 1036")
        for name, least, most in (("objects", 1, 100), ("length", 0.01, 1)):
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise T5Error(f"{name} is {[low, high]}; expected the lower bound first, from {least} to {most}")


@dataclass(frozen=True)
class Entity:
    """One object or one background: its file in the folder of pieces, its class, and its fold."""

    file: str
    kind: str
    fold: int


@dataclass(frozen=True)
class Composed:
    """What scenes.json says.

    Attributes:
        classes: names; class 0 is the background.
        entities: those of all folds; the numbers in the entity files count them.
        counts: scenes of each fold.
    """

    folder: Path
    classes: tuple[str, ...]
    entities: tuple[Entity, ...]
    counts: tuple[int, ...]

    @classmethod
    def read(cls, folder: Path | str) -> "Composed":
        """Raises T5Error when `folder` holds no scenes."""
        content = read_json(Path(folder) / "scenes.json")
        entities = tuple(Entity(**each) for each in content["entities"])
        return cls(Path(folder), tuple(content["classes"]), entities, tuple(content["counts"]))

    @property
    def class_of_entity(self) -> np.ndarray:
        """(entities,) int64."""
        return np.array([self.classes.index(each.kind) for each in self.entities])

    def images(self, fold: int) -> np.ndarray:
        """(n, S, S, 3) uint8, mapped from the file."""
        return np.load(self.folder / f"fold-{fold}-images.npy", mmap_mode="r")

    def cells(self, fold: int, cell: int) -> np.ndarray:
        """(n, S/cell, S/cell) uint16: the entity that each square shows."""
        return np.load(self.folder / f"fold-{fold}-entities-{cell}.npy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-fold", type=int, default=340)
    parser.add_argument("--side", type=int, default=1036)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    config = SceneConfig(side=options.side, seed=options.seed)
    compose(options.pieces, options.out, options.per_fold, config, workers=options.workers)


def find_entities(pieces: Path, seed: int) -> list[Entity]:
    """All entities in a folder of pieces; every class, and the backgrounds, are dealt out to the folds by themselves.

    Raises:
        T5Error: a class, or the backgrounds, are too few for every fold to get one.
    """
    kinds = {BACKGROUND: sorted(pieces.glob("backgrounds/*"))}
    for folder in sorted(path for path in (pieces / "objects").glob("*") if path.is_dir()):
        kinds[folder.name] = sorted(folder.glob("*"))
    entities = []
    for number, (kind, files) in enumerate(kinds.items()):
        if len(files) < FOLDS:
            raise T5Error(f"{pieces} holds {len(files)} pieces of class {kind}; expected {FOLDS} or more")
        order = numpy_generator(seed, SPLIT, number).permutation(len(files))
        folds = {int(index): place % FOLDS for place, index in enumerate(order)}
        entities += [Entity(str(f.relative_to(pieces)), kind, folds[i]) for i, f in enumerate(files)]
    return entities


def compose(pieces: Path, out: Path, per_fold: int, config: SceneConfig, *, workers: int | None = None) -> Composed:
    """Compose `per_fold` scenes of every fold into the folder `out`."""
    entities = find_entities(pieces, config.seed)
    classes = (BACKGROUND, *dict.fromkeys(e.kind for e in entities if e.kind != BACKGROUND))
    with atomic_dir(out) as folder, ProcessPoolExecutor(workers) as pool:
        for fold in range(FOLDS):
            work = functools.partial(_composed, pieces, tuple(entities), classes, config, fold)
            shape = (per_fold, config.side, config.side, 3)
            images = np.lib.format.open_memmap(folder / f"fold-{fold}-images.npy", "w+", np.uint8, shape)
            shown = {cell: [] for cell in CELLS}
            for number, (image, cells) in enumerate(pool.map(work, range(per_fold), chunksize=4)):
                images[number] = image
                for cell, squares in cells.items():
                    shown[cell].append(squares)
            for cell, squares in shown.items():
                np.save(folder / f"fold-{fold}-entities-{cell}.npy", np.stack(squares))
        content = {"classes": classes, "entities": [vars(each) for each in entities], "counts": [per_fold] * FOLDS}
        write_json(folder / "scenes.json", content | {"config": to_dict(config)})
    return Composed.read(out)


def _composed(
    pieces: Path, entities: Sequence[Entity], classes: Sequence[str], config: SceneConfig, fold: int, number: int
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """One scene and what its squares show, for each of CELLS."""
    image, mask = scene(pieces, entities, config, fold, number)
    kinds = np.array([classes.index(each.kind) for each in entities])
    return image, {cell: majority(mask, kinds, cell) for cell in CELLS}


def scene(
    pieces: Path, entities: Sequence[Entity], config: SceneConfig, fold: int, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scene `number` of a fold.

    Returns:
        The image (S, S, 3) uint8, and its mask (S, S) uint16: which entity each pixel shows.
    """
    draw = numpy_generator(config.seed, SCENE, fold, number)
    own = [index for index, each in enumerate(entities) if each.fold == fold]
    backgrounds = [index for index in own if entities[index].kind == BACKGROUND]
    kinds: dict[str, list[int]] = {}
    for index in own:
        if entities[index].kind != BACKGROUND:
            kinds.setdefault(entities[index].kind, []).append(index)
    place = int(draw.choice(backgrounds))
    image = _placed(_opened(str(pieces / entities[place].file)), config, draw)
    mask = np.full((config.side, config.side), place, np.uint16)
    for _ in range(draw.integers(config.objects[0], config.objects[1] + 1)):
        kind = str(draw.choice(list(kinds)))  # every class as often as any other, however many objects it has
        index = int(draw.choice(kinds[kind]))
        _paste(image, mask, _opened(str(pieces / entities[index].file)), index, config, draw)
    return np.asarray(image), mask


def _placed(background: Image.Image, config: SceneConfig, draw: np.random.Generator) -> Image.Image:
    """A random square of a background in the scene's size, perhaps mirrored."""
    side = draw.uniform(config.crop, 1) * min(background.size)
    x, y = (draw.uniform(0, length - side) for length in background.size)
    image = background.resize((config.side, config.side), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else image


def _paste(
    image: Image.Image,
    mask: np.ndarray,
    cut_out: Image.Image,
    index: int,
    config: SceneConfig,
    draw: np.random.Generator,
) -> None:
    """Put an object at a random place, whose centre lies well inside, into image and mask."""
    longest = max(cut_out.size)
    scale = min(draw.uniform(*config.length) * config.side / longest, config.enlarged)
    width, height = (max(1, round(length * scale)) for length in cut_out.size)
    cut_out = cut_out.resize((width, height), Image.Resampling.BICUBIC)
    if draw.random() < 0.5:
        cut_out = cut_out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    x, y = (round(draw.uniform(-0.1 * own, config.side - 0.9 * own)) for own in (width, height))
    image.paste(cut_out, (x, y), cut_out)
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, config.side), min(y + height, config.side)
    solid = np.asarray(cut_out)[top - y : bottom - y, left - x : right - x, 3] > 127
    mask[top:bottom, left:right][solid] = index


@functools.lru_cache(maxsize=400)
def _opened(file: str) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGBA" if "A" in image.getbands() else "RGB")


def majority(mask: np.ndarray, class_of_entity: np.ndarray, cell: int) -> np.ndarray:
    """Which entity each square of `cell` × `cell` pixels shows: of the class that covers most, the one that does.

    Args:
        mask: (S, S), the entity of every pixel.
        class_of_entity: (entities,).

    Returns:
        (S/cell, S/cell) uint16.
    """
    present = np.flatnonzero(np.bincount(mask.ravel(), minlength=len(class_of_entity)))
    local = np.searchsorted(present, np.arange(len(class_of_entity)))[mask]
    side = mask.shape[0] // cell
    squares = local.reshape(side, cell, side, cell)
    covered = np.stack([(squares == number).sum(axis=(1, 3)) for number in range(len(present))])
    kinds = class_of_entity[present]
    by_class = np.stack([covered[kinds == kind].sum(axis=0) for kind in np.unique(kinds)])
    most = np.unique(kinds)[by_class.argmax(axis=0)]
    of_that_class = np.where(kinds[:, None, None] == most, covered, -1)
    return present[of_that_class.argmax(axis=0)].astype(np.uint16)


if __name__ == "__main__":
    main()
