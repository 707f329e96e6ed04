"""Stage `freeze`: the freeze protocol (only new parameters), a cheap gate before the fine-tune."""

from tasks.finetune import train_stage
from tasks.targets.base import Target
from tasks.targets.run import main

READS = ("freeze", "data")
TOGETHER = True


def run(target: Target) -> dict[str, float]:
    config = target.section()
    return train_stage(target, "align", config.train, gate=config)


if __name__ == "__main__":
    main(run)
