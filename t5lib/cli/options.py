"""Options that several commands have."""

from pathlib import Path
from typing import Annotated, Any

import typer

MODEL, LAYER, CALIBRATION, CHOICE = "The model", "The new layers", "Calibration", "The choice of layers"
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A timm name, such as vit_small_patch14_dinov2.lvd142m, or a folder made by t5lib.save "
        "(for diagnose and convert also one made by transformers).",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Your own weights, with parameter names of timm or transformers: .safetensors, .pt, an index, a folder.",
        rich_help_panel=MODEL,
    ),
]
Pretrained = Annotated[
    bool, typer.Option(help="Load timm's weights, or take random ones to try things out.", rich_help_panel=MODEL)
]
ImgSize = Annotated[
    str | None,
    typer.Option(
        metavar="PIXELS",
        help="Image size, 224 or 224x320 (height x width), in place of the model's own.",
        rich_help_panel=MODEL,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Optimizer steps for each kind of layer (default 5000; on a CPU a few hundred already help).",
        rich_help_panel=CALIBRATION,
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Images per step (default 64).", rich_help_panel=CALIBRATION)
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1 (default: the GPU if there is one).")]


def given(**options: Any) -> dict[str, Any]:
    """The options that were typed; the rest is the library's to choose."""
    return {name: value for name, value in options.items() if value is not None}
