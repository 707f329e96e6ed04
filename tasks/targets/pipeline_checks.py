"""A fetched pipeline held against itself, and against what we expected of its repository: configs and headers alone."""

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from t5lib.download import kept
from t5lib.utils.errors import T5Error, reason
from t5lib.utils.files import read_json
from tasks.targets.denoiser_shape import Shape
from tasks.targets.diffusers_folder import CONFIGS
from tasks.targets.expected_pipelines import (
    BIG_CLIP,
    CLIP,
    DEFAULTS,
    MEANINGS,
    T5,
    TRANSFORMER,
    VAE,
    expected,
)

FLOATS = ("F64", "F32", "F16", "BF16")
AGAIN = "take the publisher's full pipeline, or repair the folder"
Header = dict[str, tuple[str, list[int]]]  # precision and shape by name


def described(source: str, models: Path) -> Path | None:
    """A folder with the configs of a hub: source, some kilobytes, fetched into `models`; None of other sources."""
    if not source.startswith("hf:"):
        return None
    return kept(f"{source.partition('#')[0]}#{','.join(CONFIGS)}", models)


def check_parts(folder: Path) -> None:
    """Raises T5Error where the parts of a pipeline do not fit each other, by their configs; no weights are needed."""
    transformer, vae = (_config(folder, file) for file in (TRANSFORMER, VAE))
    _same(folder, "in_channels", transformer, "latent_channels of the VAE", vae.get("latent_channels"))
    if "joint_attention_dim" not in transformer:
        return
    clips, t5 = [_config(folder, file) for file in (CLIP, BIG_CLIP)], _config(folder, T5)
    _same(folder, "joint_attention_dim", transformer, "d_model of T5", t5.get("d_model"))
    if all(clips):
        pooled = sum(clip.get("projection_dim", 0) for clip in clips)
        _same(folder, "pooled_projection_dim", transformer, "projection_dim of both CLIPs", pooled)


def differences(folder: Path, source: str) -> list[str]:
    """What of the pipeline is other than expected of its repository (expected_pipelines), and what that means.

    Weights that are not there (yet) are not asked for.
    """
    known = expected(source)
    if known is None:
        return []
    found = []
    for file, settings in known.configs.items():
        if not (folder / file).is_file():
            found.append(f"{file} is not there: {MEANINGS[file][None]}")
            continue
        config = DEFAULTS.get(file, {}) | read_json(folder / file)
        for name, wanted in settings.items():
            if config.get(name) not in (wanted if isinstance(wanted, tuple) else (wanted,)):
                meaning = MEANINGS[file].get(name) or MEANINGS[file][None]
                shown = " or ".join(map(str, wanted)) if isinstance(wanted, tuple) else wanted
                found.append(f"{file}: {name} is {config.get(name)}, expected {shown}: {meaning}")
    for part, tensors in known.tensors.items():
        header = header_of(folder / part)
        found += [
            f"{part}: {name} has shape {header[name][1] if name in header else None}, expected {shape}: these are "
            "weights of another model than its config says"
            for name, shape in tensors.items()
            if header and (name not in header or header[name][1] != shape)
        ]
    return found


def check_weights(folder: Path) -> None:
    """Raises T5Error where the denoiser's weights are quantized, or fewer than its config describes.

    Only safetensors are looked at, and of them the headers.
    """
    header = header_of(folder / "transformer")
    narrow = sorted(f"{name} {kind}" for name, (kind, _) in header.items() if kind not in FLOATS)
    if narrow:
        raise T5Error(
            f"{folder}/transformer holds {narrow[0]}, {len(narrow)} weights of that kind; expected "
            f"{', '.join(FLOATS)}: quantized weights cannot be trained. {AGAIN}"
        )
    if not header:
        return
    shape = Shape.of(_config(folder, TRANSFORMER))
    count = sum(math.prod(sizes) for _, sizes in header.values())
    if count < shape.parameters:
        raise T5Error(
            f"{folder}/transformer holds {count:,} numbers, and its config.json describes {shape.parameters:,}: "
            f"weights are missing, or are those of a smaller model. {AGAIN}"
        )


def header_of(part: Path) -> Header:
    """Headers of all safetensors in a part of a pipeline; no weights are read.

    Raises:
        T5Error: one of them is damaged.
    """
    found: Header = {}
    for file in sorted(part.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as weights:
                slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 (no mapping)
                found |= {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}
        except (OSError, SafetensorError) as error:
            raise T5Error(f"{file} cannot be read ({reason(error)}); fetch it again") from error
    return found


def _config(folder: Path, file: str) -> dict[str, Any]:
    """Empty where the pipeline has no such part."""
    return read_json(folder / file) if (folder / file).is_file() else {}


def _same(folder: Path, name: str, transformer: dict[str, Any], other: str, value: int | None) -> None:
    if value is not None and transformer.get(name) != value:
        raise T5Error(
            f"{folder}: {name} of the transformer is {transformer.get(name)}, and {other} {value}; they have to be the "
            f"same, or what one makes is not what the other takes. {AGAIN}"
        )
