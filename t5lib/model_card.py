"""The model card of a converted pipeline: what became of its parameters, its measured figures, under which licence."""

import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path

import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import metadata_load

from t5lib.families import family_of
from t5lib.layers.config import TTTConfig
from t5lib.utils.config import to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.markdown import table


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
    measured = "\n".join(table(columns, ([row[name] for name in columns] for row in figures.rows)))
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

{measured}

{figures.setting}

{textwrap.indent(figures.command, "    ")}
"""
