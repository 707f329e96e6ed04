"""`t5 convert`: arguments and help. `converting` and `pipelines` do the work, and are imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from t5lib.cli import arguments
from t5lib.cli.arguments import Source
from t5lib.cli.options import (
    CALIBRATION,
    LAYER,
    BatchSize,
    Device,
    ImgSize,
    ModelArgument,
    Pretrained,
    Steps,
    Weights,
    given,
)
from t5lib.layers.layer_map import parse_layers
from t5lib.utils.errors import T5Error


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
            help="All settings of a layer by one name: t5 (default), t5+, t5-last, t5-last+, linear+, dit5, or a "
            "baseline from another paper: hedgehog, lolcats, performer, lit, clear, vit3, graft-swa, graft-conv.",
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
            "token predicts), cpe or none. +nat3 or +nat5 behind it: part of the output is attention over a 3 x 3 or "
            "5 x 5 neighborhood.",
            rich_help_panel=LAYER,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="WHICH",
            help="Which attentions to convert, such as 0-5,8 (default: all), or what each becomes: "
            "0-5=softmax,6-11=swiglu+nat5; auto: all but as many as --softmax-layers says.",
            rich_help_panel=LAYER,
        ),
    ] = None,
    softmax_layers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="With --layers auto: how many stay softmax, those whose conversion harms the calibrated model most.",
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
            help="In attentions over image and text: linear (default), or exact: softmax wherever text takes part.",
            rich_help_panel=LAYER,
        ),
    ] = None,
    drop_position_bias: Annotated[
        bool,
        typer.Option(
            "--drop-position-bias",
            help="Leave out the relative position bias that BEiT and vit_relpos_* add to their softmax maps.",
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

    Every pretrained weight is inherited, unless --inherit or a preset says otherwise. Small inner weights and
    convolutions are new and start at random, so without calibration a classifier answers at chance level. --calibrate
    fits every new layer to the output of the softmax layer that it replaces, on unlabelled images. The model is then
    close to the original, before any fine-tune. If it is interrupted, the same command resumes and repeats at most
    about 100 steps.

    **Examples**

    - `t5 convert vit_small_patch14_dinov2.lvd142m dino-t5 --calibrate photos --img-size 224`
    - `t5 convert deit_tiny_patch16_224 deit-t5 --calibrate photos --steps 300 --batch-size 32`
    - `t5 convert my-softmax-folder half --layers 0-5 --inner two_layer`
    - `t5 convert my-softmax-folder mixed --layers 0-5=softmax,6-11=swiglu+nat5 --calibrate photos`
    - `t5 convert MODEL best --preset linear+ --layers auto --softmax-layers 2 --calibrate photos` (dense features)
    - `t5 convert my-transformers-folder vit-t5 --calibrate photos` (a folder made by save_pretrained)
    - `t5 convert sd35-folder sd35-t5 --layers paper` (a diffusers pipeline; calibrate it in Python)

    **Output**

    The error of every layer before and after calibration (0: same output as softmax, 1: no better than a constant),
    how many parameters were inherited, new and dropped, and how to load the folder: t5lib.load("OUT").
    """
    t5 = given(
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
    fit = given(steps=steps, batch_size=batch_size, lr=lr, lr_inherited=lr_inherited)
    if arguments.is_pipeline(model):
        arguments.check_new(out)
        arguments.refuse_for_pipelines(
            model, **fit, **given(calibrate=calibrate, weights=weights, img_size=img_size, device=device)
        )
        from t5lib.cli import pipelines

        pipelines.convert(Path(model).expanduser(), out, t5, seed)
        return
    source = Source(name=model, weights=weights, pretrained=pretrained, img_size=arguments.parse_size(img_size))
    arguments.check_output(out, force=force)
    if source.folder and source.folder.resolve() == out.resolve():
        raise T5Error(f"MODEL and OUT are the same folder, {out}; name another OUT, so that the softmax model stays")
    if fit and not calibrate:
        raise T5Error(f"--{next(iter(fit)).replace('_', '-')} is for calibration; add --calibrate FOLDER")
    images = arguments.find_images(calibrate, least=2) if calibrate else []
    from t5lib.cli import converting

    request = converting.Request(source=source, out=out, images=images, t5=t5, calibrate=fit, seed=seed, device=device)
    converting.run(request)
