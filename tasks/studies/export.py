"""A target's fine-tuned denoiser as a diffusers pipeline, in a folder or on the hub, with its measured figures.

    python -m tasks.studies.export sd35-medium --out sd35-medium-t5
    python -m tasks.studies.export sd35-medium --out sd35-medium-t5 --dtype fp16 --push me/sd35-medium-t5

The licence of the original weights, in their card and LICENSE files, goes along. A classifier needs no export: the
folder of its stage `finetune` is what t5lib.load takes.
"""

from pathlib import Path
from typing import Any

from t5lib.report.score_table import score_table
from t5lib.utils.errors import T5Error
from t5lib.utils.files import atomic_dir, read_json, write_text
from tasks import targets
from tasks.runtime import command_line, params
from tasks.studies import common
from tasks.targets import diffusers_folder

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def export(target: str, out: Path, *, root: Path = Path("."), model: str = "finetune", dtype: str = "bf16") -> Any:
    """Write the pipeline with the transformer that stage `model` made to `out`, with a model card; returns it.

    Raises:
        T5Error: a stage did not run yet, the target is a classifier, or `out` is there already.
    """
    if out.exists():
        raise T5Error(f"{out} exists already; name a new folder")
    made = root / f"data/out/{target}"
    for name in ("fetch", model, "evaluate"):
        if not (made / name).is_dir():
            raise T5Error(f"{made / name} does not exist; run `python -m flows.t5 {target}`")
    if not (made / "fetch" / diffusers_folder.NOTE).is_file():
        raise _needs_no_export(target, made / model)
    # diffusers takes 15 seconds to import
    import torch

    import t5lib
    from t5lib.pipelines import License, load_pipeline, model_card

    kind = getattr(torch, DTYPES[dtype])
    transformer = t5lib.load(made / model).to(kind)
    original = diffusers_folder.folder_of(made / "fetch", root)
    pipe = load_pipeline(original, transformer=transformer, torch_dtype=kind)
    license = License.of(original)
    card = model_card(pipe, out.name, figures(target, made), base_model=_base(made), license=license)
    with atomic_dir(out) as folder:
        pipe.save_pretrained(folder)
        write_text(folder / "README.md", card)
        if license:
            license.copy_to(folder)
    return pipe


def _needs_no_export(target: str, folder: Path) -> T5Error:
    return T5Error(
        f"'{target}' is a classifier, which needs no export: t5lib.load takes {folder}, which "
        f"`python -m flows.t5 {target}` makes; only diffusers pipelines are exported"
    )


def figures(target: str, made: Path) -> Any:
    """What the stage `evaluate` measured, for the card."""
    from t5lib.pipelines import Figures

    models = read_json(made / "evaluate.json")["models"]
    shown = score_table(models)
    rows = [
        {"model": name}
        | {
            f"{row['label']} ({row['better']} is better)": _text(row["values"][name], row["digits"])
            for row in shown["rows"]
        }
        for name in shown["models"]
    ]
    command = f"python -m flows.t5 {target}"
    return Figures(rows=tuple(rows), setting=f"{common.measured_on(models)}. One run.", command=command)


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _base(made: Path) -> str | None:
    """The repository that the weights came from, if it was one."""
    source = read_json(made / "fetch" / diffusers_folder.NOTE)["source"]
    return source.removeprefix("hf:").partition("@")[0] if source.startswith("hf:") else None


def push(pipe: Any, target: str, out: Path, repository: str, private: bool) -> str:
    """Publish what was written to `out`; returns the address of the commit."""
    from t5lib.pipelines import License, push_to_hub

    made = Path(f"data/out/{target}")
    return push_to_hub(
        pipe,
        repository,
        figures(target, made),
        base_model=_base(made),
        license=License.of(out),
        private=private,
    )


def main() -> None:
    parser = common.parser("export", __doc__)
    command_line.add_target(parser)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the pipeline")
    parser.add_argument("--model", default="finetune", help="the stage whose model is taken")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of the saved weights")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="also publish it on the Hugging Face hub (default: only the folder)"
    )
    parser.add_argument("--public", action="store_true", help="publish it for everyone (default: private)")
    arguments = parser.parse_args()
    with common.reported("export"):
        if not targets.is_pipeline(params.read_target(".", arguments.target)):
            raise _needs_no_export(arguments.target, Path(f"data/out/{arguments.target}") / arguments.model)
        pipe = export(arguments.target, arguments.out, model=arguments.model, dtype=arguments.dtype)
        print(f'{arguments.out}: t5lib.load_pipeline("{arguments.out}")')
        if arguments.push:
            print(push(pipe, arguments.target, arguments.out, arguments.push, not arguments.public))


if __name__ == "__main__":
    main()
