"""Stage `shards`: the training and validation images, opened, checked and, for a denoiser, encoded."""

from typing import Any

from tasks.targets.base import Target
from tasks.targets.run import main

READS = ("shards", "data")


def run(target: Target) -> dict[str, Any]:
    return target.shards()


if __name__ == "__main__":
    main(run)
