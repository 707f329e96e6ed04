"""The commands, their arguments and help. What they do is in the modules that they import when they run."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from t5lib.cli import arguments
from t5lib.cli.arguments import Source
from t5lib.cli.screen import error
from t5lib.layers.layer_map import parse_layers
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

MODEL, LAYER, CALIBRATION, CHOICE = "The model", "The new layers", "Calibration", "The choice of layers"
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A timm name, such as vit_small_patch14_dinov2.lvd142m, or a folder of t5lib.save "
        "(for diagnose and convert also one of transformers).",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Your own weights for it, in timm's or transformers' names: .safetensors, .pt, an index, or a folder.",
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
    - `t5 diagnose MODEL --images photos` — what its keys share, and what that means
    - `t5 convert MODEL out --calibrate photos` — convert, fit the new layers, save
    - `t5 inspect out` — what is in a saved folder, and what it costs to run
    - `t5 export out --onnx FILE` — a saved model as an ONNX file, checked and timed
    - `t5 generate PIPELINE --prompts FILE --out samples` — images of a diffusion pipeline

    MODEL is any ViT of timm (ViT, DeiT, AugReg, DINOv2, DINOv3, DeiT III, EVA02, SigLIP); diagnose, convert and
    inspect also take the folder of a diffusers pipeline, diagnose and convert a folder of transformers
    (save_pretrained, with its image processor). Images are your own; labels are not needed.
    """


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

    Softmax ignores what all keys of an image have in common; a TTT layer would spend itself on fitting it. The shift
    ratio says how much that is: the length of an image's mean key over the mean length of its keys, from 0 (keys point
    everywhere) to 1 (all are equal). Beside it stands the same model with random weights: the difference was learned.

    **Examples**

    - `t5 diagnose vit_small_patch14_dinov2.lvd142m --images photos`
    - `t5 diagnose deit_tiny_patch16_224 --images photos --limit 16 --out diagnosis`
    - `t5 diagnose vit_base_patch16_224 --weights mine.safetensors --images photos --img-size 384`
    - `t5 diagnose deit_tiny_patch16_224 --images photos --converted deit-t5 --out diagnosis`
    - `t5 diagnose sd35-folder --images photos` (a diffusers pipeline: noised latents, with the empty caption)

    **Output**

    One line a layer: mean, smallest and largest head, and the mean with random weights.
    Means of 0.5 and more are usual. Then keep the default key norm, 'instance', when converting.
    With --converted also how far each layer looks, how far it is from the softmax layer that it replaced, and its keys'
    shift before and after the key norm.
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


@app.command()
def convert(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the converted model.")],
    weights: Weights = None,
    pretrained: Pretrained = True,
    img_size: ImgSize = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A whole layer: t5 (default), t5+, t5-last, t5-last+, dit5, or a rival: hedgehog, lolcats, performer, "
            "lit, clear, vit3, graft-swa, graft-conv.",
            rich_help_panel=LAYER,
        ),
    ] = None,
    inner: Annotated[
        str | None,
        typer.Option(
            help="Inner model: swiglu (default), swiglu_last, two_layer, three_layer, one_layer_gate, linear_proj_qk "
            "or linear.",
            rich_help_panel=LAYER,
        ),
    ] = None,
    inner_loss: Annotated[
        str | None, typer.Option(help="Loss of the inner model: dot (default) or residual.", rich_help_panel=LAYER)
    ] = None,
    key_norm: Annotated[
        str | None,
        typer.Option(
            help="Key norm: instance (default), instance_no_std, instance_no_mean, layer, rms or none.",
            rich_help_panel=LAYER,
        ),
    ] = None,
    locality: Annotated[
        str | None,
        typer.Option(
            help="3 x 3 convolutions: dwc_qk (default, on queries and keys), dwc_v, dconv_v (with kernels that every "
            "token predicts), cpe or none; with +nat3 or +nat5 a part of the output is attention over a 3 x 3 or 5 x 5 "
            "neighborhood.",
            rich_help_panel=LAYER,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="WHICH",
            help="Which attentions, such as 0-5,8 (default: all), or what each becomes: 0-5=softmax,6-11=swiglu+nat5; "
            "auto: all but --softmax-layers.",
            rich_help_panel=LAYER,
        ),
    ] = None,
    softmax_layers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="With --layers auto: how many stay softmax, those that the calibrated model misses most.",
            rich_help_panel=LAYER,
        ),
    ] = None,
    neighborhood_share: Annotated[
        str | None,
        typer.Option(
            help="Part of the output that is neighborhood attention: half (default) or learned.", rich_help_panel=LAYER
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="In attentions over image and text: linear (default) or exact, softmax wherever text takes part.",
            rich_help_panel=LAYER,
        ),
    ] = None,
    drop_position_bias: Annotated[
        bool,
        typer.Option(
            "--drop-position-bias",
            help="Leave out the bias of relative positions that BEiT and vit_relpos_* add to their softmax maps.",
            rich_help_panel=LAYER,
        ),
    ] = False,
    inherit: Annotated[
        str | None,
        typer.Option(
            help="What is inherited: all (default), attention (the MLPs start afresh) "
            "or mlp (the attention projections start afresh).",
            rich_help_panel=LAYER,
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Images to fit the new layers on; no labels.", rich_help_panel=CALIBRATION),
    ] = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: Annotated[
        float | None,
        typer.Option(
            metavar="RATE", help="Peak learning rate of the new weights (default 0.01).", rich_help_panel=CALIBRATION
        ),
    ] = None,
    lr_inherited: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            help="Peak learning rate of the q, k and v projections (default 0.001; 0 keeps them).",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Seed of the new weights and of the order of images.")
    ] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the model that OUT holds.")] = False,
    device: Device = None,
) -> None:
    """Replace softmax attention by TTT layers, whose cost grows with the number of tokens, not with its square.

    Every pretrained weight is inherited, unless --inherit or a preset says less; new are small inner weights and
    convolutions. They start at random,
    so without calibration a classifier answers at chance level. --calibrate fits every new layer to the output of the
    softmax layer it replaces, on unlabelled images; after that the model is near the original, before any fine-tune.
    Interrupted, the same command goes on from where it was, about 100 steps back at most.

    **Examples**

    - `t5 convert vit_small_patch14_dinov2.lvd142m dino-t5 --calibrate photos --img-size 224`
    - `t5 convert deit_tiny_patch16_224 deit-t5 --calibrate photos --steps 300 --batch-size 32`
    - `t5 convert my-softmax-folder half --layers 0-5 --inner two_layer`
    - `t5 convert my-softmax-folder mixed --layers 0-5=softmax,6-11=swiglu+nat5 --calibrate photos`
    - `t5 convert MODEL best --preset t5-last+ --layers auto --softmax-layers 2 --calibrate photos` (dense features)
    - `t5 convert my-transformers-folder vit-t5 --calibrate photos` (of save_pretrained)
    - `t5 convert sd35-folder sd35-t5 --layers paper` (a diffusers pipeline; it is calibrated in Python)

    **Output**

    The error of every layer before and after calibration (0: same output as softmax, 1: no better than a constant),
    how many numbers were inherited, new and dropped, and how to load the folder: t5lib.load("OUT").
    """
    t5 = _given(
        inner=inner,
        inner_loss=inner_loss,
        key_norm=key_norm,
        locality=locality,
        layers=parse_layers(layers),
        softmax_layers=softmax_layers,
        neighborhood_share=neighborhood_share,
        text=text,
        drop_position_bias=drop_position_bias or None,
        inherit=inherit,
        preset=preset,
    )
    fit = _given(steps=steps, batch_size=batch_size, lr=lr, lr_inherited=lr_inherited)
    if arguments.is_pipeline(model):
        arguments.check_new(out)
        arguments.refuse_for_pipelines(
            model, **fit, **_given(calibrate=calibrate, weights=weights, img_size=img_size, device=device)
        )
        from t5lib.cli import pipelines

        pipelines.convert(Path(model).expanduser(), out, t5, seed)
        return
    source = Source(name=model, weights=weights, pretrained=pretrained, img_size=arguments.parse_size(img_size))
    arguments.check_output(out, force=force)
    if source.folder and source.folder.resolve() == out.resolve():
        raise T5Error(f"MODEL and OUT are the same folder, {out}; name another OUT, and the softmax model stays")
    if fit and not calibrate:
        raise T5Error(f"--{next(iter(fit)).replace('_', '-')} is for calibration; add --calibrate FOLDER")
    images = arguments.find_images(calibrate, least=2) if calibrate else []
    from t5lib.cli import converting

    request = converting.Request(source=source, out=out, images=images, t5=t5, calibrate=fit, seed=seed, device=device)
    converting.run(request)


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
        typer.Option(metavar="MS", help="Alternatively, how long a pass may take.", rich_help_panel=CHOICE),
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
    no weights are needed. With --images and a wanted speed, every kind is calibrated on the images, the loss of each
    layer converted alone is measured, and the mixture that loses least within the time is found.

    **Examples**

    - `t5 plan vit_small_patch14_dinov2.lvd142m --resolution 518 --batch 8`
    - `t5 plan vit_small_patch14_dinov2.lvd142m --resolution 1036 --images photos --speedup 1.3 --out mixed`
    - `t5 plan my-softmax-folder --resolution 448 --kinds swiglu,two_layer --device cuda`

    **Output**

    Predicted time and speed-up by layers converted, where the break-even lies, and a verdict: "No gain at this size"
    where softmax is faster. With --images also what each layer loses, and the chosen layers as t5 convert --layers and
    params.yaml take them.
    """
    source = Source(name=model, weights=weights, pretrained=pretrained)
    arguments.refuse_of_transformers(source, "t5 plan", "t5lib.benchmark(softmax_model, converted_model)")
    fit = _given(steps=steps, batch_size=batch_size)
    wanted = _given(speedup=speedup, budget_ms=budget_ms)
    arguments.check_choice(images=images, wanted=wanted, out=out, fit=fit)
    if out:
        arguments.check_output(out, force=force)
        if source.folder and source.folder.resolve() == out.resolve():
            raise T5Error(f"MODEL and --out are the same folder, {out}; name another, and the softmax model stays")
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
    Cost is arithmetic, not time: matrix products and convolutions, a multiply-add counted as 2, beside the softmax
    twin of the same size. Equal cost is the number of tokens from which on the TTT layers take fewer FLOPs.
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


def _given(**options: Any) -> dict[str, Any]:
    """The options that were typed; the rest is the library's to choose."""
    return {name: value for name, value in options.items() if value is not None}
