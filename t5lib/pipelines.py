"""Converted diffusers pipelines: ordinary folders that diffusers saves, loads and publishes.

    pipe = DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium", torch_dtype=torch.bfloat16)
    pipe = t5lib.convert_pipeline(pipe, TTTConfig(layers="paper"), inplace=True)
    pipe.save_pretrained("sd35-t5")
    pipe = t5lib.load_pipeline("sd35-t5", torch_dtype=torch.bfloat16)

What diffusers offers works on them: schedulers, offloading, LoRA. Other pipelines of the same parts are made by
AutoPipelineForImage2Image.from_pipe(pipe) or StableDiffusion3Img2ImgPipeline(**pipe.components); the latter's from_pipe
wants `transformer=pipe.transformer` as well, since it takes parts of the very classes it names.
Once this module is imported, DiffusionPipeline.from_pretrained loads such folders too.
"""

import copy
import re
import shutil
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import metadata_load

from t5lib.conversion import convert
from t5lib.families import dit, family_of, sd3  # noqa: F401 (the classes that saved pipelines name)
from t5lib.layers.config import TTTConfig
from t5lib.utils.config import to_dict
from t5lib.utils.errors import T5Error


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Measured figures for a model card.

    Attributes:
        rows: the table, every row with the same columns.
        setting: what they were measured on, how often.
        command: what makes them again.
    """

    rows: tuple[dict[str, str | float], ...]
    setting: str
    command: str

    def __post_init__(self):
        if not self.rows or not self.setting or not self.command:
            raise T5Error("a model card needs measured figures: at least one row, what they ran on and their command")
        if any(row.keys() != self.rows[0].keys() for row in self.rows):
            raise T5Error(f"the rows of a model card's figures differ in columns: {[list(row) for row in self.rows]}")


@dataclass(frozen=True)
class License:
    """Under which terms weights came, and go on.

    Attributes:
        header: entries of a model card's header: license, and license_name and license_link where it is "other".
        files: the text, where it came along.
    """

    header: dict[str, str]
    files: tuple[Path, ...] = ()

    @classmethod
    def of(cls, folder: Path) -> "License | None":
        """What the card and the LICENSE files in a folder say; None where there are neither."""
        card = folder / "README.md"
        told = (metadata_load(card) if card.is_file() else None) or {}
        header = {name: told[name] for name in ("license", "license_name", "license_link") if name in told}
        files = tuple(sorted(path for path in folder.glob("LICENSE*") if path.is_file()))
        return cls(header, files) if header or files else None

    def copy_to(self, folder: Path) -> None:
        for file in self.files:
            shutil.copyfile(file, folder / file.name)


def load_pipeline(source: Path | str, **options: Any) -> DiffusionPipeline:
    """The pipeline in a folder, or in a repository of the Hugging Face Hub, converted or not.

    Args:
        source: a folder, or "owner/name".
        options: of DiffusionPipeline.from_pretrained, such as torch_dtype, or components to use in place of saved ones.

    Raises:
        T5Error: the folder does not exist or holds no pipeline.
    """
    folder = Path(source)
    if not folder.is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise T5Error(f"{source} is neither a folder nor a repository's owner/name; expected a saved pipeline")
    if folder.is_dir() and not (folder / "model_index.json").exists():
        raise T5Error(f"{source} has no model_index.json; expected a folder written by pipe.save_pretrained")
    # diffusers does not know by itself that a part is left out: a DiT on pixels has no VAE
    try:
        index = DiffusionPipeline.load_config(source, **options)
    except OSError as error:
        reason = str(error).splitlines()[0]
        if folder.is_dir():
            raise T5Error(f"{source} cannot be read ({reason}); save or fetch the pipeline again") from error
        raise T5Error(
            f"{source} is no folder here, and no pipeline was had from the hub under that name ({reason}); check the "
            "path, or the name, the network and HF_TOKEN"
        ) from error
    left_out = {name: None for name, value in index.items() if value in ([None, None], (None, None))}
    return DiffusionPipeline.from_pretrained(source, **left_out | options)


def convert_pipeline(
    pipe: DiffusionPipeline, config: TTTConfig | None = None, *, inplace: bool = False
) -> DiffusionPipeline:
    """`pipe` with a converted transformer (t5lib.convert); a new pipeline that shares all else, unless `inplace`.

    Raises:
        T5Error: the pipeline has no transformer, it cannot be converted, or offloading is on.
    """
    if getattr(pipe, "transformer", None) is None:
        raise T5Error(f"{type(pipe).__name__} has no transformer to convert; expected Stable Diffusion 3 or a DiT")
    if getattr(pipe, "_all_hooks", None):
        raise T5Error(
            "this pipeline is offloaded; call pipe.remove_all_hooks(), convert, then turn offloading on again"
        )
    transformer = convert(pipe.transformer, config, inplace=inplace)
    if not inplace:
        pipe = copy.copy(pipe)
    pipe.register_modules(transformer=transformer)
    return pipe


def push_to_hub(
    pipe: DiffusionPipeline,
    repo_id: str,
    figures: Figures,
    *,
    base_model: str | None = None,
    license: str | License | None = None,
    private: bool = True,
    token: str | None = None,
) -> str:
    """Publish a converted pipeline with a model card that carries its measured figures.

    Args:
        repo_id: "owner/name"; made if it does not exist.
        base_model: repository of the softmax pipeline, for the card.
        license: of the weights, as the hub spells it, or License.of the folder they came in.
        token: of the hub; None uses the one that is logged in.

    Returns:
        The address of the commit.

    Raises:
        T5Error: the pipeline's transformer is not converted, or a LoRA is loaded.
    """
    from huggingface_hub import HfApi

    if getattr(pipe.transformer, "peft_config", None):
        raise T5Error(
            "a LoRA is loaded, whose layers would be saved in the weights' place; call pipe.unload_lora_weights() "
            "first, after pipe.fuse_lora() if its change is to stay"
        )
    card = model_card(pipe, repo_id, figures, base_model=base_model, license=license)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")
        if isinstance(license, License):
            license.copy_to(Path(folder))
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Converted by t5"))


def model_card(
    pipe: DiffusionPipeline, repo_id: str, figures: Figures, *, base_model: str | None, license: str | License | None
) -> str:
    """The card (README.md) of a converted pipeline, in the hub's form.

    Raises:
        T5Error: the pipeline's transformer is not converted.
    """
    report = getattr(pipe.transformer, "t5_report", None)
    if report is None:
        raise T5Error(
            "this pipeline is not converted, so there is nothing to publish; call t5lib.convert_pipeline first"
        )
    told = {"base_model": base_model, **(license.header if isinstance(license, License) else {"license": license})}
    header = {name: value for name, value in told.items() if value} | {
        "library_name": "diffusers",
        "tags": ["t5", "test-time-training", "linear-attention"],
    }
    columns = list(figures.rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row[name]) for name in columns] for row in figures.rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    changed = {n: v for n, v in to_dict(pipe.transformer.t5_config).items() if v != to_dict(TTTConfig())[n]}
    settings = ", ".join(f"{name} {value}" for name, value in changed.items()) or "all as the method has them"
    source = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"A {type(pipe).__name__}"
    attentions = len(family_of(pipe.transformer).attention_names(pipe.transformer))
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {repo_id.rpartition("/")[2]}

{source} with {len(report.layers)} of the {attentions} softmax attentions of its transformer replaced by
Test-Time-Training layers, whose cost is linear in the number of tokens. {report.numbers["inherited"]:,} of the
transformer's numbers are inherited, {report.numbers["new"]:,} are new. Settings: {settings}.
The method is that of "Linearizing Vision Transformer with Test-Time Training" (arXiv 2605.02772).

```python
import t5lib  # the package t5-ttt with its extra "diffusion"

pipe = t5lib.load_pipeline("{repo_id}")
```

It is a {type(pipe).__name__} of diffusers: its schedulers, LoRA loading and offloading work as they do there.

## Measured

{table}

{figures.setting}

{textwrap.indent(figures.command, "    ")}
"""
