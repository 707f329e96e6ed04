"""A converted model and the softmax model it learns from: checked before any work."""

import logging
import math

import torch
from torch import nn

from t5lib.conversion import ttt_layers
from t5lib.families import family_of
from t5lib.utils.errors import T5Error

logger = logging.getLogger(__name__)

FOREIGN = 0.5  # two models that were trained apart are more than 1 apart; a fine-tune moves weights by less than this
MOVED = 0.1  # more than calibration and alignment moved them in our trials: by 0.03 to 0.08
REMEDY = "pass the softmax model that was converted"


def check_pair(model: nn.Module, teacher: nn.Module) -> None:
    """Refuse a model and a teacher that do not belong together.

    Weights that both have may differ by what training does to them; a difference is told in the log.

    Raises:
        T5Error: `model` is not converted, `teacher` is, they are of different architectures, a weight has no values,
            or the teacher has other weights than those that `model` inherited.
    """
    if torch.is_inference_mode_enabled():
        raise T5Error("nothing can be fitted under torch.inference_mode; call it outside (no_grad is fine)")
    if family_of(model) is not family_of(teacher):
        raise T5Error(f"the teacher is of the family {family_of(teacher).name}, the model of {family_of(model).name}")
    if not ttt_layers(model):
        raise T5Error("this model has no new layer to fit; convert it first (t5lib.convert)")
    if converted := list(ttt_layers(teacher)):
        raise T5Error(f"the teacher is a converted model, with a TTT layer at {converted[0]}; {REMEDY}")
    family = family_of(model)
    ours, theirs = (len(list(family.blocks(each))) for each in (model, teacher))
    if ours != theirs:
        raise T5Error(f"the teacher has {theirs} blocks, the model {ours}; {REMEDY}")
    for name, each in (("model", model), ("teacher", teacher)):
        if any(parameter.is_meta for parameter in each.parameters()):
            raise T5Error(f"the {name} is on the meta device and has no weights; load them before it is fitted")
    check_weights(model, teacher)


def dtypes(model: nn.Module) -> set[torch.dtype]:
    """The dtypes of all weights that are floating-point numbers."""
    return {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}


@torch.no_grad()
def check_weights(model: nn.Module, teacher: nn.Module) -> None:
    """Raises T5Error unless the weights that both models have are those of the teacher, or were trained from them."""
    report = getattr(model, "t5_report", None)
    reset = set(report.reset) if report else set()
    ours, theirs = dict(model.named_parameters()), dict(teacher.named_parameters())
    shared = [name for name in theirs if name in ours and name not in reset]
    shapes = [
        f"{name} {tuple(theirs[name].shape)} for {tuple(ours[name].shape)}"
        for name in shared
        if ours[name].shape != theirs[name].shape
    ]
    if shapes:
        raise T5Error(f"weights of the teacher have other shapes than the model's, {', '.join(shapes[:3])}; {REMEDY}")
    squares = [_squares(ours[name], theirs[name]) for name in shared]
    difference, size = (sum(part) for part in zip(*squares, strict=True))
    distance = math.sqrt(difference / size) if size else 0.0
    if not distance <= FOREIGN:
        raise T5Error(
            f"the teacher's weights are not those that the model inherited (relative distance {distance:.2g}, of a "
            f"model that was trained further at most {FOREIGN}); {REMEDY}, with the same weights"
        )
    if distance > MOVED:
        logger.warning(
            "the teacher's weights and those that the model inherited are %.2g apart: expected if the model was "
            "trained since its conversion; otherwise pass the softmax model that was converted",
            distance,
        )


def _squares(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """Squared distance, and squared norm of the teacher's."""
    theirs = theirs.to(ours.device, torch.float32)
    return (ours.float() - theirs).square().sum().item(), theirs.square().sum().item()
