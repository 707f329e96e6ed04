"""Write prompts.txt: captions of scenes, a line each, for sd35-micro to draw samples of.

    python data/sd35-micro/make_prompts.py

Every emoji comes as often as any other; counts, backgrounds and phrasings are drawn by `--seed`.
"""

import argparse
import random
from pathlib import Path

from captions import COLOURS, COUNTS, PHRASINGS, caption
from scenes import read_sprites

FOLDER = Path(__file__).parent


def prompts(each: int, seed: int) -> list[str]:
    """`each` different captions of every emoji, in mixed order."""
    rng, made = random.Random(seed), []
    scenes = [(count, colour) for count in range(1, len(COUNTS) + 1) for colour in COLOURS]
    for kind in read_sprites(FOLDER / "sprites.json")[0]:
        for count, colour in rng.sample(scenes, each):
            made.append(caption(kind.name, count, colour, rng.randrange(len(PHRASINGS))))
    rng.shuffle(made)
    return made


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER / "prompts.txt")
    parser.add_argument("--each", type=int, default=4, help="captions of every emoji")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.out.write_text("".join(f"{prompt}\n" for prompt in prompts(args.each, args.seed)), encoding="utf-8")


if __name__ == "__main__":
    main()
