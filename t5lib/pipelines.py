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
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, Transformer2DModel
from safetensors import safe_open
from torch import nn

from t5lib.conversion import convert
from t5lib.families import dit, flux, pixart, qwen_image, sd3  # also the classes that saved pipelines name
from t5lib.families.diffusers_base import check_loaded
from t5lib.layers.config import TTTConfig
from t5lib.model_card import Figures, License, model_card
from t5lib.utils.config import shown
from t5lib.utils.errors import T5Error
from t5lib.utils.files import as_path, read_json, read_text, refuse_endless
from t5lib.utils.weights import check_numbers, shards_of

_FAMILIES = (dit.ADAPTER, flux.ADAPTER, pixart.ADAPTER, qwen_image.ADAPTER, sd3.ADAPTER)
PRECISIONS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TRANSFORMERS = {kind.__name__: kind for family in _FAMILIES for kind in (family.softmax_class, family.converted_class)}
TRANSFORMERS["Transformer2DModel"] = Transformer2DModel  # as repositories still call DiT-XL and PixArt; it makes those


def load_pipeline(source: Path | str, **options: Any) -> DiffusionPipeline:
    """The pipeline in a folder, or in a repository of the Hugging Face Hub, converted or not.

    Args:
        source: a folder, or "owner/name".
        options: of DiffusionPipeline.from_pretrained, such as torch_dtype, or components to use in place of saved ones.

    Raises:
        T5Error: the folder does not exist or holds no pipeline, or one whose parts lack weights, or hold numbers that
            are not finite.
    """
    folder = as_path(source)
    local = os.path.isdir(folder)
    if not local and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise T5Error(f"{source} is neither a folder nor a repository's owner/name; expected a saved pipeline")
    index = _index(folder) if local else _index_of_hub(str(source), options)
    # diffusers does not know by itself that a part is left out: a DiT on pixels has no VAE
    options = {name: None for name, value in index.items() if value in ([None, None], (None, None))} | options
    with _reading(source):
        pipe = DiffusionPipeline.from_pretrained(source, **options)
        if not local:
            folder = Path(DiffusionPipeline.download(source, **options | {"local_files_only": True}))
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in options:
            _check_part(part, folder / name, options)
    return pipe


def load_transformer(folder: Path | str, torch_dtype: torch.dtype | None = None) -> ModelMixin:
    """The transformer of the pipeline in `folder`, converted or not, in eval mode.

    Args:
        torch_dtype: its precision; None for that of the files.

    Raises:
        T5Error: no pipeline, one with another kind of transformer, or one whose weights are not all there.
    """
    folder = as_path(folder)
    told = _index(folder).get("transformer")
    kind = told[1] if isinstance(told, list) and len(told) == 2 else told
    if not isinstance(kind, str) or kind not in TRANSFORMERS:
        raise T5Error(f"{folder} has the transformer {shown(kind)}; expected one of {', '.join(TRANSFORMERS)}")
    precision = next(iter(_precisions(folder / "transformer").values()), "F32")
    options = {"subfolder": "transformer", "torch_dtype": torch_dtype or PRECISIONS.get(precision, torch.float32)}
    with _reading(folder):
        model, info = TRANSFORMERS[kind].from_pretrained(folder, output_loading_info=True, **options)
    check_loaded(model, info, str(folder / "transformer"))
    check_numbers(dict(model.named_buffers()), str(folder / "transformer"))
    return model.eval()


def _index(folder: Path) -> dict[str, Any]:
    file = folder / "model_index.json"
    if not os.path.isfile(file):
        raise T5Error(f"{folder} has no model_index.json; expected a folder written by pipe.save_pretrained")
    with _reading(folder):
        index = json.loads(read_text(file))
    if not isinstance(index, dict):
        raise T5Error(f"{file} holds a {type(index).__name__}; save or fetch the pipeline again")
    return index


def _index_of_hub(source: str, options: dict[str, Any]) -> dict[str, Any]:
    try:
        return DiffusionPipeline.load_config(source, **options)  # type: ignore[return-value]  # with these arguments
    except Exception as error:  # of the hub's client, the network, the file itself
        raise T5Error(
            f"{source} is not a folder here, and the hub has no pipeline of that name to give "
            f"({str(error).splitlines()[0]}); check the path, or the name, the network and HF_TOKEN"
        ) from error


@contextmanager
def _reading(source: Path | str) -> Iterator[None]:
    """Whatever the libraries raise on files that are missing or damaged becomes one line."""
    try:
        yield
    except (T5Error, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise T5Error(f"{source} cannot be read ({reason}); save or fetch the pipeline again") from error


def _precisions(folder: Path) -> dict[str, str]:
    """The precision of the weights in the files of `folder`, by the weights' names, as safetensors spells it.

    Raises:
        T5Error: a file cannot be read, holds whole numbers, or lacks what an index of shards names.
    """
    ending = "safetensors" if any(folder.glob("*.safetensors")) else "bin"
    held: dict[str, tuple[str, int]] = {}
    with _reading(folder):
        for file in sorted(folder.glob(f"*.{ending}")):
            held |= _contents(file)
    for index in folder.glob(f"*.{ending}.index*.json"):
        shards_of(index)
        if lacking := sorted(read_json(index)["weight_map"].keys() - held.keys()):
            raise T5Error(f"{folder} lacks weights that {index.name} names: {lacking[:4]}; save or fetch it again")
    # Single numbers and positions are counters beside the weights.
    kinds = {name: kind for name, (kind, ndim) in held.items() if ndim and not name.endswith("position_ids")}
    if whole := [f"{name} {kind}" for name, kind in kinds.items() if not kind.startswith(("F", "BF"))]:
        raise T5Error(f"{folder} holds integer or quantized weights, in {', '.join(whole[:4])}; take the full pipeline")
    return kinds


def _contents(file: Path) -> dict[str, tuple[str, int]]:
    """Precision and number of dimensions by name; no weight is read."""
    refuse_endless(file)
    if file.suffix == ".bin":
        spelled = {kind: name for name, kind in PRECISIONS.items()}
        weights = torch.load(file, map_location="meta", weights_only=True)
        return {name: (spelled.get(value.dtype, str(value.dtype)), value.ndim) for name, value in weights.items()}
    with safe_open(file, framework="pt") as weights:
        parts = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 (no mapping)
    return {name: (part.get_dtype(), len(part.get_shape())) for name, part in parts.items()}


def _check_part(part: nn.Module, folder: Path, options: dict[str, Any]) -> None:
    """Raises T5Error unless all weights of `part` came from `folder`, and are finite; libraries make up what lacks."""
    if hasattr(part, "from_pretrained") and not getattr(part, "hf_quantizer", None):
        _precisions(folder)
        variant = options.get("variant")
        there = {"variant": variant} if variant and any(folder.glob(f"*.{variant}*")) else {}
        with _reading(folder), _without_bars():  # names and shapes alone: no weight is read again
            _, info = type(part).from_pretrained(
                folder,
                output_loading_info=True,
                device_map="meta",
                local_files_only=True,
                use_safetensors=options.get("use_safetensors"),
                **there,
            )
        kept = {name: sorted(info[name]) for name in ("missing_keys", "mismatched_keys")}
        check_loaded(part, kept | {"unexpected_keys": []}, str(folder))
    check_numbers(dict(part.named_parameters()) | dict(part.named_buffers()), str(folder))


@contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown_before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown_before:
            logging.enable_progress_bar()


def convert_pipeline(
    pipe: DiffusionPipeline, config: TTTConfig | str | None = None, *, inplace: bool = False
) -> DiffusionPipeline:
    """`pipe` with a converted transformer (t5lib.convert); a new pipeline that shares all else, unless `inplace`.

    Raises:
        T5Error: the pipeline has no transformer, it cannot be converted, or offloading is on.
    """
    if getattr(pipe, "transformer", None) is None:
        raise T5Error(
            f"{type(pipe).__name__} has no transformer to convert; expected a pipeline of Stable Diffusion 3, DiT, "
            "Flux.1, PixArt or Qwen-Image"
        )
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
