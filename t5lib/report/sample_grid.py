"""Samples of several models side by side, as one picture."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from t5lib.report.models import MODELS
from t5lib.report.plots import MUTED, SOFTMAX, T5, WIDTH, styled

SOFTMAX_MODELS = [model.key for model in MODELS if model.softmax]
LETTERS = 16  # of a prompt that fit in a line beside a row of pictures


@styled
def sample_grid(models: dict[str, Tensor], prompts: Sequence[str]) -> Figure:
    """A column a model, a row a prompt; the same seed in a row.

    Args:
        models: label (a model's name, and what follows a comma) to images (n, C, H, W) uint8; source and control,
            which are softmax, in blue.
        prompts: n texts or class names, written beside the rows.
    """
    first = next(iter(models.values()))
    tall = first.shape[-2] / first.shape[-1]
    side = (WIDTH - 1.1) / len(models)
    figure = Figure(figsize=(WIDTH, 0.35 + side * tall * len(prompts)), layout="constrained")
    panels = figure.subplots(len(prompts), len(models), squeeze=False)
    for column, (label, images) in enumerate(models.items()):
        title = _wrapped(label, round(LETTERS * 4 / max(4, len(models))))
        colour = SOFTMAX if label.partition(",")[0] in SOFTMAX_MODELS else T5
        panels[0][column].set_title(title, loc="center", pad=5, fontsize=8 if len(models) < 6 else 7, color=colour)
        for axes, image in zip(panels[:, column], images, strict=True):
            pixels = image.movedim(0, -1).numpy()
            axes.imshow(pixels.squeeze(-1) if image.shape[0] == 1 else pixels, cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set_visible(False)
    for axes, prompt in zip(panels[:, 0], prompts, strict=True):
        axes.set_ylabel(_wrapped(prompt), rotation=0, ha="right", va="center", fontsize=8, color=MUTED)
    return figure


def _wrapped(text: str, letters: int = LETTERS) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, letters, max_lines=4, placeholder=" …"))
