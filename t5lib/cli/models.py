"""From what was typed to a softmax model: everything that can be refused is refused before weights are fetched."""

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from torch import nn

import t5lib
from t5lib.checkpoint import read_description
from t5lib.cli.arguments import Source
from t5lib.cli.images import ImageReader
from t5lib.cli.screen import note
from t5lib.families import adapter, family_of
from t5lib.families.base import Adapter
from t5lib.families.timm_base import check_plain_vit
from t5lib.utils.devices import usable_device
from t5lib.utils.errors import SourceError, T5Error, reason
from t5lib.utils.extras import extras_named
from t5lib.weights.timm_vit import load_weights


def choose_device(name: str | None) -> torch.device:
    """The device called `name`; by default the GPU if there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device(name, "--device")


def outline(source: Source) -> nn.Module:
    """The model without weights, on the meta device: quick to make, and enough to refuse what cannot be done.

    Raises:
        T5Error: unknown name (names the nearest), no pretrained weights, an image size that is not a multiple of the
            patch size, or a model that cannot be converted.
    """
    with torch.device("meta"):
        if source.of_transformers:
            model = _transformers_folders().outline(source.folder)
        elif source.folder:
            description = read_description(source.folder)
            model = timm_adapter(description, source.folder).build(
                description["architecture"], description["model_args"], None
            )
        else:
            _check_name(source)
            model = timm.create_model(source.name, pretrained=False)
        family_of(model).check_convertible(model)
        if not source.of_transformers:
            check_plain_vit(model)
            _check_size(source, model)
    return model


def timm_adapter(description: dict[str, Any], folder: Path) -> Adapter:
    """The adapter of the model in `folder`, which t5.json describes so. Raises T5Error when it is none of timm's."""
    family = adapter(description.get("family", "timm_vit"))  # folders of the first versions do not name it
    if family.package != "timm":
        raise T5Error(
            f"{folder} holds a {description['architecture']} of {family.package}, and this command takes models of "
            "timm: use t5lib in Python (or save the diffusers pipeline that it belongs to, docs/diffusion.md)"
        )
    return family


def load(source: Source, device: torch.device) -> nn.Module:
    """The softmax model with its weights, in eval mode.

    Raises:
        T5Error: weights that cannot be fetched or do not fit.
    """
    if source.of_transformers:
        return _transformers_folders().load(source.folder).to(device)
    if source.folder:
        model = t5lib.load(source.folder)
        if source.img_size:
            model.set_input_size(img_size=source.img_size)
        return model.to(device)
    arguments: dict[str, Any] = {"img_size": source.img_size} if source.img_size else {}
    if source.weights:
        model = load_weights(source.name, source.weights, **arguments)
    else:
        with _fetching(source):
            model = timm.create_model(source.name, pretrained=source.pretrained, **arguments)
    return model.to(device).eval()


def reader(source: Source, model: nn.Module) -> ImageReader:
    """A reader that prepares image files as `model`, which `source` names, needs them."""
    return _transformers_folders().reader(source.folder) if source.of_transformers else ImageReader.of(model)


def _transformers_folders() -> ModuleType:
    with extras_named():
        from t5lib.cli import transformers_folders  # transformers takes seconds to import
    return transformers_folders


def _check_name(source: Source) -> None:
    known = timm.list_models() + timm.list_pretrained()
    if not timm.is_model(source.name.partition(".")[0]) or ("." in source.name and source.name not in known):
        near = [name for name in known if source.name in name][:3] or difflib.get_close_matches(source.name, known)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()"
        raise T5Error(f"timm {timm.__version__} has no model '{source.name}', and there is no such folder; {hint}")
    if source.pretrained and not source.weights and not timm.is_model_pretrained(source.name):
        raise T5Error(f"timm has no pretrained weights for {source.name}; give --weights FILE, or --no-pretrained")


def _check_size(source: Source, model: nn.Module) -> None:
    for side, patch in zip(source.img_size or (), model.patch_embed.feat_ratio(as_scalar=False), strict=False):
        if side % patch:
            nearest = max(1, round(side / patch)) * patch
            raise T5Error(f"--img-size: {side} is not a multiple of the patch size {patch}; the nearest is {nearest}")


@contextmanager
def _fetching(source: Source) -> Iterator[None]:
    if not source.pretrained:
        yield
        return
    note(f"weights of {source.name}: from timm's cache or its hub (without a network this gives up in a minute)")
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # it would tell of every attempt
    try:
        yield
    except (OSError, HfHubHTTPError, HTTPError) as error:  # what timm's and the hub's clients raise
        raise SourceError(
            f"the weights of {source.name} could not be fetched ({reason(error)}). Check the network and, for a gated "
            "model, HF_TOKEN; or download model.safetensors elsewhere and pass it with --weights",
            retryable=True,
        ) from error
    finally:
        hub.setLevel(level)
