"""A target's fine-tuned denoiser as a diffusers diffusers_folder, in a folder or on the hub, with its measured figures.

python -m tasks.studies.export sd35-medium --out sd35-medium-t5 [--dtype bf16] [--push OWNER/NAME [--public]]

The licence of the original weights, in their card and LICENSE files, goes along.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from t5lib.utils.errors import T5Error
from t5lib.utils.files import atomic_dir, read_json, write_text

DTYPES = ("fp32", "bf16", "fp16")


def export(target: str, out: Path, *, root: Path = Path("."), model: str = "finetune", dtype: str = "bf16") -> Any:
    """Write the pipeline with the transformer that stage `model` made to `out`, with a model card; returns it.

    Raises:
        T5Error: a stage did not run yet, or `out` is there already.
    """
    import torch

    import t5lib
    from t5lib.pipelines import License, load_pipeline, model_card
    from tasks.targets import diffusers_folder

    if out.exists():
        raise T5Error(f"{out} exists already; name a new folder")
    made = root / f"data/out/{target}"
    for name in ("fetch", model):
        if not (made / name).is_dir():
            raise T5Error(f"{made / name} does not exist; run `python -m flows.t5 {target}`")
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
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


def figures(target: str, made: Path) -> Any:
    """What the stage `evaluate` measured, for the card."""
    from t5lib.pipelines import Figures
    from t5lib.report.score_table import score_table

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
    counted = models["finetuned"]
    setting = (
        f"{counted['generated']} images a model, the same prompts and noise for all, beside {counted['real']} real "
        f"ones; features: {counted['extractor']}. One run."
    )
    return Figures(rows=tuple(rows), setting=setting, command=f"python -m flows.t5 {target}")


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _base(made: Path) -> str | None:
    """The repository that the weights came from, if it was one."""
    source = read_json(made / "fetch/diffusers_folder.json")["source"]
    return source.removeprefix("hf:").partition("@")[0] if source.startswith("hf:") else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.studies.export", description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--model", default="finetune", help="the stage whose model is taken (default: finetune)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--push", metavar="OWNER/NAME", help="also publish it on the Hugging Face hub")
    parser.add_argument("--public", action="store_true", help="there for everyone (default: private)")
    args = parser.parse_args()
    try:
        pipe = export(args.target, args.out, model=args.model, dtype=args.dtype)
        print(f'{args.out}: t5lib.load_pipeline("{args.out}")')
        if args.push:
            from t5lib.pipelines import License, push_to_hub

            made = Path(f"data/out/{args.target}")
            told = {"base_model": _base(made), "license": License.of(args.out), "private": not args.public}
            print(push_to_hub(pipe, args.push, figures(args.target, made), **told))
    except T5Error as error:
        sys.exit(f"export: {error}")


if __name__ == "__main__":
    main()
