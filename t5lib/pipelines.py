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
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError, safe_open

from t5lib.conversion import convert
from t5lib.families import dit, sd3  # also the classes that saved pipelines name
from t5lib.families.diffusers_base import check_loaded
from t5lib.layers.config import TTTConfig
from t5lib.model_card import Figures, License, model_card
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json

_FAMILIES = (dit.ADAPTER, sd3.ADAPTER)
PRECISIONS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TRANSFORMERS = {kind.__name__: kind for family in _FAMILIES for kind in (family.softmax_class, family.converted_class)}
TRANSFORMERS["Transformer2DModel"] = dit.ADAPTER.softmax_class  # as DiT-XL's repository still calls it


def load_pipeline(source: Path | str, **options: Any) -> DiffusionPipeline:
    """The pipeline in a folder, or in a repository of the Hugging Face Hub, converted or not.

    Args:
        source: a folder, or "owner/name".
        options: of DiffusionPipeline.from_pretrained, such as torch_dtype, or components to use in place of saved ones.

    Raises:
        T5Error: the folder does not exist or holds no pipeline, or not all the weights of its transformer.
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
    entries = index.items()  # type: ignore[attr-defined]  # diffusers tells what it returns with other arguments
    left_out = {name: None for name, value in entries if value in ([None, None], (None, None))}
    with _reading(source):
        pipe = DiffusionPipeline.from_pretrained(source, **left_out | options)
    if folder.is_dir() and hasattr(pipe, "transformer") and not {"transformer", "quantization_config"} & options.keys():
        _check_whole(pipe.transformer, folder / "transformer")
    return pipe


def load_transformer(folder: Path | str, torch_dtype: torch.dtype | None = None) -> ModelMixin:
    """The transformer of the pipeline in `folder`, converted or not, in eval mode.

    Args:
        torch_dtype: its precision; None for that of the files.

    Raises:
        T5Error: no pipeline, one with another kind of transformer, or one whose weights are not all there.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise T5Error(f"{folder} has no model_index.json; expected a folder written by pipe.save_pretrained")
    kind = (read_json(folder / "model_index.json").get("transformer") or [None, None])[1]
    if kind not in TRANSFORMERS:
        raise T5Error(f"{folder} has the transformer {kind}; expected one of {', '.join(TRANSFORMERS)}")
    precision = next(iter(_precisions(folder / "transformer").values()), "F32")
    options = {"subfolder": "transformer", "torch_dtype": torch_dtype or PRECISIONS.get(precision, torch.float32)}
    with _reading(folder):
        model, info = TRANSFORMERS[kind].from_pretrained(folder, output_loading_info=True, **options)
    check_loaded(model, info, str(folder / "transformer"))
    return model.eval()


@contextmanager
def _reading(source: Path | str) -> Iterator[None]:
    """What diffusers and safetensors raise on files that are missing or damaged becomes one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise T5Error(f"{source} cannot be read ({reason}); save or fetch the pipeline again") from error


def _precisions(folder: Path) -> dict[str, str]:
    """The precision of every weight in the .safetensors of `folder`, by the weights' names, as the files spell it.

    Raises:
        T5Error: a file cannot be read, or holds whole numbers.
    """
    kinds: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with _reading(folder), safe_open(file, framework="pt") as weights:
            kinds |= {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 (no mapping)
    if whole := [f"{name} {kind}" for name, kind in kinds.items() if kind.startswith(("I", "U", "BOOL"))]:
        raise T5Error(
            f"{folder} holds whole numbers or quantized ones, in {', '.join(whole[:4])}; take the full pipeline"
        )
    return kinds


def _check_whole(model: ModelMixin, folder: Path) -> None:
    """Raises T5Error when the .safetensors of `folder` lack a weight of `model`, which diffusers then makes up."""
    names = _precisions(folder)
    if names and (missing := sorted(set(model.state_dict()) - set(names))):
        raise T5Error(f"{folder} lacks weights of its {type(model).__name__}: {missing[:4]}; save or fetch it again")


def convert_pipeline(
    pipe: DiffusionPipeline, config: TTTConfig | str | None = None, *, inplace: bool = False
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
