"""Stage `shards`: the images, opened and checked; for a denoiser encoded, and drawn by its teacher where it says so."""

from typing import Any

from tasks.targets.base import Target
from tasks.targets.run import main

READS = ("shards", "data")
TOGETHER = True


def run(target: Target) -> dict[str, Any]:
    return target.shards()


if __name__ == "__main__":
    main(run)
