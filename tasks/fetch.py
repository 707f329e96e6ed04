"""Stage `fetch`: the softmax model, and what else a target needs from elsewhere, downloaded and checked."""

from typing import Any

from tasks.targets.base import Target
from tasks.targets.run import main

READS = ("fetch",)


def run(target: Target) -> dict[str, Any]:
    return target.fetch()


if __name__ == "__main__":
    main(run)
