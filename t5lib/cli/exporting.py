"""`t5 export`: a saved model as an ONNX file, checked, and its speed beside that of its softmax model's export."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t5lib.cli import arguments
from t5lib.cli.screen import counted, facts, note, notes, say
from t5lib.utils.errors import T5Error
from t5lib.utils.files import write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from t5lib.onnx_export import OnnxExport


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder of t5lib.save, converted or softmax.")],
    onnx: Annotated[Path, typer.Option(metavar="FILE", help="Where the ONNX file goes; an existing file is replaced.")],
    img_size: Annotated[
        str | None,
        typer.Option(
            metavar="PIXELS", help="Image size, 224 or 224x320 (height x width), in place of the model's own."
        ),
    ] = None,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="Let the file take images of any size.")] = False,
    images: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Images to check it on (default: random numbers of the model's size)."),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Images in a batch that is checked and timed.")] = 1,
    speed: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also time it beside the softmax model's export, and write the times there as JSON."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="With --speed: timed passes of each model.")] = 9,
) -> None:
    """Write a saved model as an ONNX file, for machines that have no PyTorch.

    The file takes batches of any length. Before it gets its name, ONNX Runtime runs it on a batch, on batches of other
    lengths and, with --dynamic-size, on images of other sizes; where its numbers are not the model's, nothing is
    written. Install what it needs by pip install 't5-ttt[onnx]'.

    **Examples**

    - `t5 export dino-t5 --onnx dino-t5.onnx`
    - `t5 export dino-t5 --onnx dino-t5.onnx --dynamic-size --images photos --batch 8`
    - `t5 export dino-t5 --onnx dino-t5.onnx --img-size 1036 --speed speed.json`

    **Output**

    Names and shapes of the inputs, and the largest difference from the model's own output. With --speed how many
    times as fast as the softmax model's export it is on this CPU, both timed in turns.
    """
    size = arguments.parse_size(img_size)
    paths = arguments.find_images(images) if images else []
    for file in filter(None, (onnx, speed)):
        arguments.check_writable(file.parent)
    from t5lib.conversion import ttt_layers
    from t5lib.onnx_export import export_onnx

    loaded = _loaded(model, size, dynamic_size)
    if speed and not ttt_layers(loaded):
        raise T5Error(f"--speed is for converted models, and {model} is softmax: there is nothing to compare it with")
    pixels = _pixels(loaded, arguments.spread(paths, batch), batch)
    with notes.status(f"exporting {model}"):
        made = export_onnx(loaded, onnx, pixels, dynamic_size=dynamic_size)
    _show(made)
    if speed:
        _compare(loaded, pixels, repeats, speed)


def _loaded(folder: Path, size: tuple[int, int] | None, dynamic_size: bool) -> "nn.Module":
    """The model in `folder`, for images of `size`; one that takes any where `dynamic_size`."""
    import t5lib
    from t5lib.checkpoint import read_description
    from t5lib.cli.models import timm_adapter

    family = timm_adapter(read_description(folder), folder)
    model = t5lib.load(folder)
    if dynamic_size:
        architecture, made_with = family.describe(model)
        config = getattr(model, "t5_config", None)
        flexible = family.build(architecture, made_with | {"dynamic_img_size": True}, config)
        flexible.load_state_dict(model.state_dict())
        model = flexible.eval()
    if size:
        model.set_input_size(img_size=size)
    return model


def _pixels(model: "nn.Module", paths: list[Path], batch: int) -> "Tensor":
    """(B, C, H, W): images in `paths`, prepared for the model, or random numbers where there are none."""
    import torch

    from t5lib.cli.images import ImageReader

    if not paths:
        shape = (batch, model.in_chans, *model.patch_embed.img_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))
    reader = ImageReader.of(model)
    pixels = reader.read(paths)
    reader.report()
    return pixels


def _show(made: "OnnxExport") -> None:
    batches = sorted({shape[0] for shape in made.checked})
    sizes = sorted({f"{height} × {width}" for _, _, height, width in made.checked})
    shapes = [f"{name} ({', '.join(map(str, shape))})" for name, shape in made.inputs.items()]
    facts(
        [
            ("file", str(made.path)),
            ("inputs", ", ".join(shapes)),
            ("checked", f"batches of {', '.join(map(str, batches))}; {', '.join(sizes)} px"),
            ("largest error", f"{made.max_error:.2g}, of outputs up to {made.largest_output:.3g}"),
        ]
    )


def _compare(model: "nn.Module", pixels: "Tensor", repeats: int, file: Path) -> None:
    from t5lib.benchmarks.onnx import compare_exports

    with notes.status("timing"):
        result: dict[str, Any] = compare_exports(model, pixels, repeats=repeats)
    write_json(file, result)
    ms = {name: row["ms"] for name, row in result["models"].items()}
    worst, best = result["speedup_range"]
    say(
        f"{result['speedup']:.2f} times as fast as the softmax model's export ({worst:.2f} to {best:.2f}): "
        f"{ms['t5']:.1f} ms and {ms['softmax']:.1f} ms for {counted(result['batch'], 'image')} of "
        f"{result['tokens']:,} tokens ({result['device']})."
    )
    note(f"written: {file}")
