"""Prompt files, and where the images of each prompt go: layouts that the scorers of GenEval and DPG-Bench read.

    plain     FILE: text, a prompt a line.     OUT/00000-0.png, OUT/00000-1.png, …
    geneval   FILE: evaluation_metadata.jsonl. OUT/00000/metadata.jsonl, OUT/00000/samples/00000.png, …
    dpg       FILE: a folder of NAME.txt.      OUT/NAME.png, one picture of all samples, two a row

Sources: github.com/djghosh13/geneval (README, evaluation/evaluate_images.py: folders of digits, files \\d+\\.png);
github.com/TencentQQGYLab/ELLA (dpg_bench/compute_dpg_bench.py: crops of the 2 × 2 picture, question key = file name).
Imports nothing slow.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5lib.utils.config import one_of
from t5lib.utils.errors import T5Error, reason
from t5lib.utils.files import read_json, read_text, write_text
from t5lib.utils.seeds import derived_seed

LAYOUTS = ("plain", "geneval", "dpg")
SAMPLES = {"plain": 1, "geneval": 4, "dpg": 4}  # images a prompt: what the benchmarks' papers score


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What to draw: a text, or a class number for class-conditional models.

    Attributes:
        name: of its file or folder in the output.
        metadata: GenEval's description, for its scorer.
    """

    text: str | int
    name: str
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One file to make: an image for each seed, side by side (two a row) where there are several.

    Attributes:
        path: the PNG.
        prompt: text or class number.
        seeds: of the images' noise, in the order of rows.
    """

    path: Path
    prompt: str | int
    seeds: tuple[int, ...]


def read(path: Path, layout: str) -> list[Prompt]:
    """The prompts of a file, or for "dpg" of a folder, in order.

    Raises:
        T5Error: no such file, nothing in it, or not what the layout wants; says which line.
    """
    one_of(layout, LAYOUTS, "layout")
    if layout == "dpg":
        prompts = _read_folder(path)
    else:
        lines = _read_text(path).splitlines()
        numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
        make = _geneval_prompt if layout == "geneval" else _plain_prompt
        prompts = [make(index, line, f"{path}, line {number}") for index, (number, line) in enumerate(numbered)]
    if not prompts:
        raise T5Error(f"{path} holds no prompt; expected {_expected(layout)}")
    return prompts


def as_classes(prompts: list[Prompt], classes: int) -> list[Prompt]:
    """The same prompts as class numbers, for a class-conditional model.

    Raises:
        T5Error: a prompt that is no number from 0 to `classes` - 1.
    """
    for prompt in prompts:
        if not str(prompt.text).isdecimal() or int(prompt.text) >= classes:
            raise T5Error(
                f"prompt {prompt.name} is '{prompt.text}', but the model is class-conditional: expected a class number "
                f"from 0 to {classes - 1} a line"
            )
    return [Prompt(text=int(prompt.text), name=prompt.name, metadata=prompt.metadata) for prompt in prompts]


def seed_of(seed: int, prompt: int, sample: int) -> int:
    """The seed of one image, which follows from the run's seed and the image's place alone (63 bits)."""
    return derived_seed(seed, prompt, sample) >> 1


def jobs(prompts: list[Prompt], layout: str, out: Path, *, samples: int, seed: int = 0) -> list[Job]:
    """What to make, in the layout's files: `samples` images a prompt, whose seeds depend on their places alone."""
    one_of(layout, LAYOUTS, "layout")
    made = []
    for index, prompt in enumerate(prompts):
        seeds = tuple(seed_of(seed, index, sample) for sample in range(samples))
        if layout == "dpg":
            made.append(Job(path=out / f"{prompt.name}.png", prompt=prompt.text, seeds=seeds))
            continue
        for sample, one in enumerate(seeds):
            name = f"{prompt.name}/samples/{sample:05}.png" if layout == "geneval" else f"{prompt.name}-{sample}.png"
            made.append(Job(path=out / name, prompt=prompt.text, seeds=(one,)))
    return made


def prepare(prompts: list[Prompt], planned: list[Job], out: Path) -> None:
    """Check that `out` holds nothing but what is planned, and write what the layout has beside images.

    Raises:
        T5Error: images, or a prompt's description, that are not of this plan: the scorers would count them.
    """
    wanted = {job.path for job in planned}
    foreign = sorted(path for path in out.rglob("*.png") if path not in wanted and not path.name.startswith("."))
    if foreign:
        raise T5Error(
            f"{out} holds images that are not of these prompts, such as {foreign[0].relative_to(out)}; a scorer would "
            "count them: name a new folder, or move them away"
        )
    for prompt in prompts:
        if prompt.metadata is not None:
            _write_metadata(out / prompt.name / "metadata.jsonl", prompt.metadata)


def _write_metadata(path: Path, metadata: dict[str, Any]) -> None:
    if not path.exists():
        write_text(path, json.dumps(metadata, ensure_ascii=False) + "\n")
    elif read_json(path) != metadata:
        raise T5Error(f"{path} describes another prompt than the file of prompts does; name a new folder")


def _plain_prompt(index: int, line: str, _: str) -> Prompt:
    return Prompt(text=line, name=f"{index:05}")


def _geneval_prompt(index: int, line: str, where: str) -> Prompt:
    try:
        metadata = json.loads(line)
        text = metadata["prompt"]
    except (ValueError, KeyError, TypeError):
        raise T5Error(
            f"{where}: expected a JSON object with 'prompt', as in GenEval's evaluation_metadata.jsonl, "
            f"got '{line[:60]}'"
        ) from None
    return Prompt(text=text, name=f"{index:05}", metadata=metadata)


def _read_folder(folder: Path) -> list[Prompt]:
    if not folder.is_dir():
        raise T5Error(f"{folder} is not a folder; expected {_expected('dpg')}")
    files = sorted(path for path in folder.glob("*.txt") if not path.name.startswith("."))
    prompts = [Prompt(text=" ".join(_read_text(path).split()), name=path.stem) for path in files]
    empty = [prompt.name for prompt in prompts if not prompt.text]
    if empty:
        raise T5Error(f"{folder}/{empty[0]}.txt is empty; expected a prompt")
    return prompts


def _read_text(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise T5Error(f"{path} cannot be read as text ({reason(error)}); expected a file of prompts in UTF-8") from None


def _expected(layout: str) -> str:
    return {
        "plain": "a text file with one prompt per line",
        "geneval": "GenEval's evaluation_metadata.jsonl, one JSON object per line",
        "dpg": "a folder of .txt files, a prompt in each (DPG-Bench's dpg_bench/prompts)",
    }[layout]
