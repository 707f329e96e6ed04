"""The commands, their arguments and help. What they do is in the modules that they import when they run."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from t5lib.cli import arguments
from t5lib.cli.arguments import Source
from t5lib.cli.convert_command import convert
from t5lib.cli.options import (
    CHOICE,
    BatchSize,
    Device,
    ImgSize,
    ModelArgument,
    Pretrained,
    Steps,
    Weights,
    given,
)
from t5lib.cli.screen import error
from t5lib.utils import openmp
from t5lib.utils.errors import T5Error
from t5lib.utils.extras import extras_named


class _Group(TyperGroup):
    """Errors meant for the user end a command with one message and exit code 1."""

    def invoke(self, context: Any) -> Any:
        try:
            with extras_named():
                return super().invoke(context)
        except T5Error as problem:
            error(str(problem))
            raise typer.Exit(1) from None


app = typer.Typer(
    name="t5",
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"t5 {version('t5-ttt')}")
        raise typer.Exit()


@app.callback()
def t5(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn a pretrained softmax vision transformer into one whose attention costs linear time.

    - `t5 plan MODEL --resolution 518` — what converting gains on this device, and which layers to convert
    - `t5 diagnose MODEL --images photos` — the shift that its keys share, and what that means
    - `t5 convert MODEL out --calibrate photos` — convert, fit the new layers, save
    - `t5 inspect out` — what is in a saved folder, and what it costs to run
    - `t5 export out --onnx FILE` — a saved model as an ONNX file, checked and timed
    - `t5 generate PIPELINE --prompts FILE --out samples` — images of a diffusion pipeline

    MODEL is any ViT of timm (ViT, DeiT, AugReg, DINOv2, DINOv3, DeiT III, EVA02, SigLIP); diagnose, convert and
    inspect also take the folder of a diffusers pipeline, diagnose and convert a folder of transformers
    (save_pretrained, with its image processor). Images are your own; labels are not needed.
    """
    openmp.wait_briefly()  # no command has imported PyTorch yet


@app.command()
def diagnose(
    model: ModelArgument,
    images: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Images the model was made for; subfolders are searched too.")
    ],
    limit: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many images to use, spread over the folder.")
    ] = 64,
    converted: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="The folder that t5 convert made from MODEL; the two are compared layer by layer."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder for the numbers, as JSON, and for pictures.")
    ] = None,
    weights: Weights = None,
    pretrained: Pretrained = True,
    img_size: ImgSize = None,
    device: Device = None,
) -> None:
    """Measure the shift that the keys of every attention layer share, on your own images.

    Softmax ignores what all keys of an image have in common; a TTT layer would waste its capacity on fitting it. The
    shift ratio says how much that is: the length of an image's mean key over the mean length of its keys, from 0 (keys
    point in all directions) to 1 (all keys are equal). The same model with random weights is shown beside it: the
    difference was learned.

    **Examples**

    - `t5 diagnose vit_small_patch14_dinov2.lvd142m --images photos`
    - `t5 diagnose deit_tiny_patch16_224 --images photos --limit 16 --out diagnosis`
    - `t5 diagnose vit_base_patch16_224 --weights mine.safetensors --images photos --img-size 384`
    - `t5 diagnose deit_tiny_patch16_224 --images photos --converted deit-t5 --out diagnosis`
    - `t5 diagnose sd35-folder --images photos` (a diffusers pipeline: noised latents, with the empty caption)

    **Output**

    One line per layer: mean, smallest and largest head, and the mean with random weights.
    Means of 0.5 and more are usual; keep the default key norm, 'instance', for them. With --converted also how far each
    layer looks, how far it is from the softmax layer that it replaced, and its keys' shift before and after the key
    norm.
    """
    size = arguments.parse_size(img_size)
    paths = arguments.spread(arguments.find_images(images), limit)
    if out:
        arguments.check_writable(out / "shift_ratio.json")
    if arguments.is_pipeline(model):
        given = {"weights": weights, "converted": converted, "no-pretrained": not pretrained}
        arguments.refuse_for_pipelines(model, **{name: value for name, value in given.items() if value})
        from t5lib.cli import pipelines

        pipelines.diagnose(Path(model).expanduser(), paths, out, device, size)
        return
    from t5lib.cli import diagnosing

    source = Source(name=model, weights=weights, pretrained=pretrained, img_size=size)
    if converted:
        arguments.refuse_of_transformers(source, "--converted", "t5lib.explain(softmax_model, converted_model, images)")
    diagnosing.run(source, paths, out, device, converted)


app.command()(convert)


@app.command()
def plan(
    model: ModelArgument,
    resolution: Annotated[int, typer.Option(metavar="PIXELS", min=1, help="Side of the images in pixels.")],
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Images in a timed pass.")] = 1,
    kinds: Annotated[
        str,
        typer.Option(metavar="KINDS", help="New layers to consider: inner models, with +nat3 or +nat5, or presets."),
    ] = "swiglu,swiglu+nat5",
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Images to fit the new layers and to choose on; no labels.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(metavar="X", help="How many times as fast as softmax it must be.", rich_help_panel=CHOICE),
    ] = None,
    budget_ms: Annotated[
        float | None,
        typer.Option(metavar="MS", help="Instead: the most milliseconds that a pass may take.", rich_help_panel=CHOICE),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Save the calibrated mixture there.", rich_help_panel=CHOICE),
    ] = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    weights: Weights = None,
    pretrained: Pretrained = True,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the new weights and of the images.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the model that --out holds.")] = False,
    device: Device = None,
) -> None:
    """Measure this device, and say what converting would gain: by how many layers, and from which resolution on.

    A few short models are timed, with softmax and with new layers; the time of every mixture follows. Without --images
    no weights are needed. With --images and --speedup or --budget-ms, every kind is calibrated on the images. What the
    model loses with each layer converted alone is measured, and the mixture that loses least within the time is found.

    **Examples**

    - `t5 plan vit_small_patch14_dinov2.lvd142m --resolution 518 --batch 8`
    - `t5 plan vit_small_patch14_dinov2.lvd142m --resolution 1036 --images photos --speedup 1.3 --out mixed`
    - `t5 plan my-softmax-folder --resolution 448 --kinds swiglu,two_layer --device cuda`

    **Output**

    Predicted time and speed-up by layers converted, where the break-even lies, and a verdict: "No gain at this size"
    where softmax is faster. On CUDA also the times uncompiled, compiled, and compiled with CUDA graphs, and which of
    these is fastest for a converted model. With --images also what each layer loses, and the chosen layers as t5
    convert --layers and params.yaml take them.
    """
    source = Source(name=model, weights=weights, pretrained=pretrained)
    arguments.refuse_of_transformers(source, "t5 plan", "t5lib.benchmark(softmax_model, converted_model)")
    fit = given(steps=steps, batch_size=batch_size)
    wanted = given(speedup=speedup, budget_ms=budget_ms)
    arguments.check_choice(images=images, wanted=wanted, out=out, fit=fit)
    if out:
        arguments.check_output(out, force=force)
        if source.folder and source.folder.resolve() == out.resolve():
            raise T5Error(f"MODEL and --out are the same folder, {out}; name another, so that the softmax model stays")
    paths = arguments.find_images(images, least=4) if images else []
    from t5lib.cli import planning

    request = planning.Request(
        source=source,
        resolution=resolution,
        kinds=tuple(kind.strip() for kind in kinds.split(",")),
        batch=batch,
        images=paths,
        speedup=speedup,
        budget_ms=budget_ms,
        calibrate=fit,
        out=out,
        seed=seed,
        device=device,
    )
    planning.run(request)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A saved model, or a diffusers pipeline.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the same and more as JSON, for programs.")] = False,
) -> None:
    """Show what is in a saved folder, converted or softmax, or in a diffusers pipeline.

    **Examples**

    - `t5 inspect dino-t5`
    - `t5 inspect dino-t5 --json | jq .flops`

    **Output**

    Architecture, which layers are converted and how, image size and tokens, parameters (inherited and new), file.
    Cost is calculated, not measured: the FLOPs of matrix products and convolutions (a multiply-add counts as 2), beside
    those of the softmax model of the same size. "Equal cost" is the number of tokens above which the TTT layers take
    fewer FLOPs.
    """
    if arguments.is_pipeline(folder):
        from t5lib.cli import pipelines

        found = pipelines.inspect(folder)
        show = pipelines.show
    else:
        from t5lib.cli import inspecting

        found = inspecting.run(folder)
        show = inspecting.show
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(found)
