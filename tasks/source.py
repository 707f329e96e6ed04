"""Stage `source`: the softmax model that is converted."""

from typing import Any

from tasks.targets.base import Target
from tasks.targets.run import main

READS = ("source", "data")
TOGETHER = True


def run(target: Target) -> dict[str, Any]:
    return target.source()


if __name__ == "__main__":
    main(run)
