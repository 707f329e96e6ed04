"""`t5 generate`: images of a file of prompts, in the layout that a benchmark's own scorer reads."""

from pathlib import Path
from typing import Annotated, Any

import typer

from t5lib.cli import arguments
from t5lib.cli.options import Device
from t5lib.cli.screen import counted, note, say
from t5lib.evaluation import prompts as prompt_files
from t5lib.evaluation.prompts import Prompt
from t5lib.utils.errors import T5Error

SAMPLING = "Sampling"


def generate(
    pipeline: Annotated[
        str,
        typer.Argument(
            metavar="PIPELINE", help="A diffusers pipeline, softmax or converted: a folder, or owner/name on the hub."
        ),
    ],
    prompts: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="A text file with a prompt (or class number) on each line, or what --layout asks for."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the images go.")],
    layout: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How prompts are read and images are laid out: plain; geneval (FILE is "
            "evaluation_metadata.jsonl); dpg (FILE is the folder dpg_bench/prompts).",
        ),
    ] = "plain",
    samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Images per prompt (default 1; geneval and dpg: 4).")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Sampling steps (default 28).", rich_help_panel=SAMPLING)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="SCALE",
            min=0,
            help="How strongly the prompt guides (default 7; 1: not at all).",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="PIXELS",
            help="Image size, 1024 or 768x1344 (height x width), in place of the model's own.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Images drawn at once (default 4).", rich_help_panel=SAMPLING)
    ] = None,
    max_sequence_length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Most tokens that the T5 text encoder takes (default: 256).",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Seed of the noise; every image gets noise of its own.")
    ] = 0,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep on the GPU only the part of the pipeline that is working.")
    ] = False,
    device: Device = None,
) -> None:
    """Draw images for a file of prompts, to look at or for GenEval's and DPG-Bench's own scorers.

    The noise of an image follows from --seed, its prompt's place and its number: two models draw the same image from
    the same noise, whatever the batch size. If it is interrupted, the same command resumes.

    **Examples**

    - `t5 generate sd35-t5 --prompts prompts.txt --out samples --steps 40 --guidance 4.5`
    - `t5 generate sd35-t5 --prompts geneval/prompts/evaluation_metadata.jsonl --layout geneval --out geneval-t5`
    - `t5 generate sd35-t5 --prompts ELLA/dpg_bench/prompts --layout dpg --size 1024 --out dpg-t5`

    **Output**

    plain: 00000-0.png and so on. geneval: 00000/metadata.jsonl and 00000/samples/00000.png to 00003.png.
    dpg: one picture per prompt, under the prompt file's name, of 2 × 2 samples. docs/generation.md says how to score.
    """
    read = prompt_files.read(prompts, layout)
    settings: dict[str, Any] = {
        "steps": steps,
        "guidance": guidance,
        "size": arguments.parse_size(size, "--size"),
        "batch_size": batch_size,
        "max_sequence_length": max_sequence_length,
    }
    if layout == "dpg" and len(set(settings["size"] or (0, 0))) > 1:
        raise T5Error(f"--size {size}: DPG-Bench's scorer cuts squares out of each picture; expected one number")
    _check_source(pipeline)
    if out.is_file():
        raise T5Error(f"{out} is a file; name a folder for the images")
    arguments.check_writable(out / "images")
    run(
        pipeline,
        read,
        layout,
        out,
        samples=samples or prompt_files.SAMPLES[layout],
        seed=seed,
        settings={name: value for name, value in settings.items() if value is not None},
        offload=offload,
        device=device,
    )


def run(
    source: str,
    prompts: list[Prompt],
    layout: str,
    out: Path,
    *,
    samples: int,
    seed: int,
    settings: dict[str, Any],
    offload: bool,
    device: str | None,
) -> None:
    """Load the pipeline, draw what is missing in `out`, and say what there is."""
    import torch

    from t5lib.cli.models import choose_device
    from t5lib.evaluation import generation
    from t5lib.pipelines import load_pipeline

    config = generation.GenerateConfig(**settings)
    where = choose_device(device)
    note(f"loading {source}")
    folder = Path(source).expanduser()
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    pipeline = load_pipeline(folder if folder.is_dir() else source, torch_dtype=dtype)
    classes = generation.classes_of(pipeline)
    if classes is not None:
        prompts = prompt_files.as_classes(prompts, classes)
    jobs = prompt_files.jobs(prompts, layout, out, samples=samples, seed=seed)
    prompt_files.prepare(prompts, jobs, out)
    if offload and where.type == "cuda":
        pipeline.enable_model_cpu_offload(device=where)
    else:
        pipeline.to(where)
    model = str(folder.resolve()) if folder.is_dir() else source
    made = generation.generate(pipeline, jobs, config, model=model)
    before = f", {len(jobs) - made:,} were there already" if made < len(jobs) else ""
    say(f"{counted(made, 'picture')} drawn of {counted(len(prompts), 'prompt')}{before}: {out}")


def _check_source(source: str) -> None:
    """Raises T5Error unless `source` is a folder with a pipeline, or may be a repository's owner/name."""
    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise T5Error(
            f"{source} is not a diffusers pipeline: it has no model_index.json; name a folder of save_pretrained"
        )
    if not folder.is_dir() and source.count("/") != 1:
        raise T5Error(f"{source} does not exist; expected a folder of save_pretrained, or a repository's owner/name")
