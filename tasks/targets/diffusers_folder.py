"""The pipeline that a target's denoiser is part of: noted with checksums by the stage `fetch`, read where it lies.

It is not copied among the outputs: the text encoders of Stable Diffusion 3.5 alone take 11 GB.
"""

import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, read_object, sha256, write_json
from t5lib.utils.progress import progress
from t5lib.utils.weights import shards_of

if TYPE_CHECKING:
    from diffusers import ConfigMixin
    from torch import nn

NOTE, SCORERS = "pipeline.json", "scorers.json"
TRANSFORMERS = ("SD3Transformer2DModel", "DiTTransformer2DModel")
# The class that DiT-XL's repository names: diffusers loads it as the one that its normalization tells.
FORMER, FORMER_NORM = "Transformer2DModel", {"ada_norm_zero": "DiTTransformer2DModel"}
# Of a hub repo: diffusers' own folders in full precision, without single-file checkpoints and half-precision copies,
# nor the indexes of such copies; and the licence.
CONFIGS = ("model_index.json", "*/*config.json", "*/model.safetensors.index.json")
HUB_FILES = ",".join(
    (
        *("README.md", "LICENSE*", *CONFIGS, "*/diffusion_pytorch_model.safetensors.index.json"),
        *("*/tokenizer.json", "*/vocab.json", "*/special_tokens_map.json", "*/added_tokens.json"),
        *("*/*.txt", "*/*.model", "*/model.safetensors", "*/model-0*.safetensors"),
        *("*/diffusion_pytorch_model.safetensors", "*/diffusion_pytorch_model-0*.safetensors"),
        "*/diffusion_pytorch_model.bin",
    )
)


def whole(source: str) -> str:
    """A hub repo without #FILES means the pipeline's files alone."""
    return f"{source}#{HUB_FILES}" if source.startswith("hf:") and "#" not in source else source


def note(folder: Path, source: str, out: Path, root: Path) -> dict[str, Any]:
    """Check that `folder` is a pipeline we can convert, and write down in `out` where it is and what it holds.

    Raises:
        T5Error: no pipeline, one of another kind, or one without weights (with what is missing).
    """
    check(folder)
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    files = {}
    with progress("checksums", len(found)) as bar:
        for done, path in enumerate(found, 1):
            files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
            bar.advance(done)
    inside = folder.resolve().is_relative_to(root.resolve())
    place = os.path.relpath(folder, root) if inside else str(folder.resolve())
    content = {"source": source, "path": place, "files": files}
    write_json(out / NOTE, content)
    return content


def check(folder: Path) -> None:
    """Raises T5Error unless `folder` holds a whole softmax pipeline, all shards, of a kind that can be converted."""
    transformer_class(folder)
    index = read_object(folder / "model_index.json")
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    missing = [name for name in parts if not (folder / name).is_dir() or not any((folder / name).iterdir())]
    for index_file in sorted(folder.glob("*/*.index.json")):
        shards_of(index_file)
    if missing:
        raise T5Error(
            f"{folder} lacks {', '.join(missing)}, which its model_index.json lists; fetch the pipeline again, or "
            "write [null, null] there for what is left out on purpose (text_encoder_3 and tokenizer_3 may be)"
        )


def transformer_class(folder: Path) -> str:
    """diffusers' name of the denoiser's class, one of TRANSFORMERS; weights need not be there.

    Raises:
        T5Error: `folder` holds no pipeline, or one of a kind that cannot be converted.
    """
    if not (folder / "model_index.json").is_file():
        raise T5Error(f"{folder} is not a diffusers pipeline: it has no model_index.json; expected the folder of one")
    index = read_object(folder / "model_index.json")
    entry = index.get("transformer")
    kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
    if kind == FORMER and (folder / "transformer/config.json").is_file():
        kind = FORMER_NORM.get(read_json(folder / "transformer/config.json").get("norm_type"), kind)
    if kind not in TRANSFORMERS:
        raise T5Error(
            f"{folder} is a {index.get('_class_name')}, whose transformer is {kind}; expected "
            f"{' or '.join(TRANSFORMERS)}"
        )
    return kind


def folder_of(fetched: Path, root: Path) -> Path:
    """The pipeline's folder, from what the stage `fetch` made.

    Raises:
        T5Error: it is gone, or a file is not as large as it was.
    """
    found = read_json(fetched / NOTE)
    folder = root / found["path"]
    for name, file in found["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != file["bytes"]:
            state = "does not exist" if size is None else f"has {size} bytes, not {file['bytes']}"
            raise T5Error(f"{path} {state}, unlike when it was fetched; put it back, or {_again(fetched)}")
    return folder


def known(source: str, root: Path) -> Path | None:
    """The folder of the pipeline that `source` names, where it lies on this machine or was fetched for any target."""
    if source.startswith("file:"):
        folder = root / Path(source.removeprefix("file:")).expanduser()
        if folder.exists() and not folder.is_dir():
            raise T5Error(f"fetch.source: {folder} is a file; expected the folder of a diffusers pipeline")
        return folder if folder.is_dir() else None
    notes = [read_json(note) for note in root.glob(f"data/out/*/fetch/{NOTE}")]
    folders = [root / each["path"] for each in notes if each["source"] == source]
    return next((folder for folder in folders if folder.is_dir()), None)


def hub_of(fetched: Path) -> dict[str, str] | None:
    """What t5lib.load_pipeline takes for a pipeline of the hub; None for another one."""
    source = read_json(fetched / NOTE)["source"].partition("#")[0]
    if not source.startswith("hf:"):
        return None
    repository, _, revision = source.removeprefix("hf:").partition("@")
    return {"source": repository, "revision": revision}


def other_parts(fetched: Path, root: Path) -> dict[str, Path]:
    """The pipeline's files beside its transformer, by their places in it."""
    folder = folder_of(fetched, root)
    return {name: folder / name for name in read_json(fetched / NOTE)["files"] if not name.startswith("transformer/")}


def transformer(fetched: Path, root: Path) -> "nn.Module":
    """The softmax denoiser in single precision, its files' checksums checked."""
    import torch

    from t5lib.pipelines import load_transformer

    folder = folder_of(fetched, root)
    for name, file in read_json(fetched / NOTE)["files"].items():
        if name.startswith("transformer/") and sha256(folder / name) != file["sha256"]:
            raise T5Error(f"{folder / name} is not the file that was fetched; put that back, or {_again(fetched)}")
    return load_transformer(folder, torch.float32)


def blank(folder: Path) -> "nn.Module":
    """The softmax denoiser without weights, on the meta device; one for all who ask, so it must not be changed."""
    check(folder)
    config = read_json(folder / "transformer/config.json")
    return _blank(transformer_class(folder), json.dumps(config))


@functools.lru_cache(maxsize=4)
def _blank(kind: str, config: str) -> "nn.Module":
    import diffusers
    import torch

    with torch.device("meta"):
        return getattr(diffusers, kind).from_config(json.loads(config))


def _again(fetched: Path) -> str:
    return f"take it as it is now: `dvc repro -f fetch@{fetched.parent.name}`"


def scheduler(folder: Path) -> "ConfigMixin":
    """The noise schedule that diffusers saved in `folder`."""
    import diffusers

    config = read_json(folder / "scheduler_config.json")
    return getattr(diffusers, config["_class_name"]).from_config(config)


def image_vae(folder: Path) -> "nn.Module | None":
    """The pipeline's VAE in single precision; None where pixels are the latents."""
    import torch
    from diffusers import AutoencoderKL

    if not (folder / "vae").is_dir():
        return None
    return AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)


def takes_text(folder: Path) -> bool:
    """Whether it draws from text; else from class numbers."""
    return "text_encoder" in read_object(folder / "model_index.json")


def classes(folder: Path) -> int:
    """Number of classes of a class-conditional denoiser."""
    return read_json(folder / "transformer/config.json")["num_embeds_ada_norm"]


def image_size(folder: Path) -> tuple[int, int]:
    """(height, width) in pixels of the images that the pipeline makes unless told otherwise."""
    side = read_json(folder / "transformer/config.json")["sample_size"] * pixels_per_latent(folder)
    return side, side


def pixels_per_latent(folder: Path) -> int:
    """How many pixels a latent is wide."""
    if not (folder / "vae").is_dir():
        return 1
    return 2 ** (len(read_json(folder / "vae/config.json")["block_out_channels"]) - 1)


def patch(folder: Path) -> int:
    """Latents a token is wide."""
    return read_json(folder / "transformer/config.json")["patch_size"]


def image_channels(folder: Path) -> int:
    """Channels of the images it makes: 3, or what a transformer of pixels takes."""
    return 3 if (folder / "vae").is_dir() else read_json(folder / "transformer/config.json")["in_channels"]
