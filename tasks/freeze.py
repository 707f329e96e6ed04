"""Stage `freeze`: the freeze protocol (only new parameters), a cheap gate before the fine-tune."""

from typing import Any

from t5lib.conversion import new_parameters
from tasks.finetune import pass_on, train_stage
from tasks.targets.base import Target
from tasks.targets.run import main

READS = ("freeze", "data")
TOGETHER = True


def run(target: Target) -> dict[str, Any]:
    """Raises T5Error, and leaves nothing, where the model does not pass the gate."""
    config, model = target.section(), target.load("align")
    if new_parameters(model):
        metrics = train_stage(target, model, config.train)
    else:
        reason = "convert added no weights that could be trained alone"
        metrics = pass_on(target, "align", reason) | target.held_out(model)
    return metrics | target.check_gate(metrics, config)


if __name__ == "__main__":
    main(run)
