"""The models that a target's stages make, and how each is shown: the one list of them."""

from collections.abc import Collection
from dataclasses import dataclass

from t5lib.utils.errors import T5Error

# Blue against vermilion stays apart for every common colour blindness (Okabe and Ito); blue is always softmax.
SOFTMAX, T5, T5_LIGHT, T5_PALE = "#0b63a5", "#cf4f08", "#e8963f", "#f0c08a"


@dataclass(frozen=True)
class Model:
    """A model that is evaluated.

    Attributes:
        key: its name in the results.
        made_by: the stage whose output it is.
        label, what: for people.
        colour: of its bars and lines.
        trained_by: the stages whose time made it, counted from the source on.
    """

    key: str
    made_by: str
    label: str
    what: str
    colour: str
    trained_by: tuple[str, ...] = ()

    @property
    def softmax(self) -> bool:
        return self.colour == SOFTMAX


LABEL_FREE = ("calibrate", "align")  # stages
WITHOUT_LABELS = {"calibrated": "Calibrated only", "aligned": "Calibrated and aligned"}  # models, by key, in words
MODELS = (
    Model("source", "source", "Source", "softmax, the model that is converted", SOFTMAX),
    Model("converted", "convert", "Converted", "T5, nothing trained yet", T5_PALE),
    Model("calibrated", "calibrate", "Calibrated", "T5, attention transfer, no labels", T5_LIGHT, ("calibrate",)),
    Model("aligned", "align", "Aligned", "T5, whole model on the source, no labels", T5_LIGHT, LABEL_FREE),
    Model("frozen", "freeze", "Freeze protocol", "T5, only new parameters trained", T5_LIGHT, (*LABEL_FREE, "freeze")),
    Model("finetuned", "finetune", "Fine-tuned", "T5, all parameters trained", T5, (*LABEL_FREE, "finetune")),
    Model("control", "control", "Control", "softmax, fine-tuned with the same budget", SOFTMAX, ("control",)),
)
KEYS = tuple(model.key for model in MODELS)
RESULTS = ("finetuned", "aligned", "calibrated")  # the first of them that was evaluated is the result of it all
OF_STAGE = {model.made_by: model for model in MODELS}


def final(evaluated: Collection[str]) -> str:
    """The key of the model that is the result, by the keys of those that were evaluated.

    Raises:
        T5Error: none of RESULTS was.
    """
    for key in RESULTS:
        if key in evaluated:
            return key
    raise T5Error(f"evaluate measured {', '.join(evaluated)}; expected one of {', '.join(RESULTS)} among them")
