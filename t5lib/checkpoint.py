"""A model as a folder: `model.safetensors` and `t5.json`; no pickle, loads anywhere t5lib is installed."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from t5lib.families import adapter, family_of
from t5lib.families.base import Adapter
from t5lib.families.replacement import check_untied
from t5lib.layers.config import TTTConfig
from t5lib.utils.config import from_dict, to_dict
from t5lib.utils.devices import usable_device
from t5lib.utils.errors import T5Error
from t5lib.utils.files import atomic_dir, read_json, write_json
from t5lib.utils.weights import check_fit, check_numbers

FORMAT = 1
ENTRIES = {"architecture": str, "model_args": dict, "t5": dict | None}  # of t5.json
OPTIONAL = {"preprocessing": dict}
FILES = {"model.safetensors", "t5.json"}
PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # what a tag of timm's weights decides


def save(model: nn.Module, folder: Path | str) -> None:
    """Write `model`, converted or softmax, to `folder`, replacing the model saved there only once all is written.

    Any model that t5lib.convert takes or gives can be saved; of a pipeline that is its transformer alone.

    Raises:
        T5Error: it could not be loaded again, since its arguments cannot be told from the model, parts of it are of
            other classes than those, or share weights; a weight is not finite; or `folder` holds something else than
            a saved model.
    """
    folder = Path(folder).resolve()
    _check_replaceable(folder)
    family = family_of(model)
    architecture, arguments = family.describe(model)
    _check_plain(architecture, arguments)
    config = getattr(model, "t5_config", None)
    twin = family.skeleton(architecture, arguments, config)
    check_fit(model.state_dict(), twin.state_dict(), "weights do not fit the model as rebuilt from its description")
    _check_classes(model, twin)
    check_untied(model)
    _check_values(model)
    with atomic_dir(folder) as temporary:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        write_json(
            temporary / "t5.json",
            {
                "format": FORMAT,
                "family": family.name,
                "architecture": architecture,
                "model_args": arguments,
                "t5": to_dict(config) if config else None,
                "preprocessing": {n: v for n, v in _pretrained(model).items() if n in PREPROCESSING},
                "versions": {name: version(name) for name in ("torch", family.package)},
            },
        )


def load(folder: Path | str, device: str | torch.device = "cpu") -> nn.Module:
    """Load what `save` wrote, in eval mode.

    Raises:
        T5Error: no such folder, another format, a description that no model can be made of, weights that do not fit
            it (named) or are not finite, or no such device.
    """
    folder = Path(folder)
    description, device = read_description(folder), usable_device(device)
    config = from_dict(TTTConfig, description["t5"], f"{folder}/t5.json: t5") if description["t5"] else None
    try:
        weights = load_file(folder / "model.safetensors", device=str(device))
    except (FileNotFoundError, SafetensorError) as error:
        raise T5Error(f"{folder}/model.safetensors cannot be read ({error}); save or copy the folder again") from None
    family = adapter(description.get("family", "timm_vit"))  # folders of the first versions do not name it
    model = _skeleton(family, description, config, folder)
    check_fit(weights, model.state_dict(), f"weights do not fit {folder}/t5.json")
    check_numbers(weights, f"{folder}/model.safetensors")
    model.load_state_dict(weights, assign=True)
    preprocessing = description.get("preprocessing", {})
    _pretrained(model).update({n: tuple(v) if isinstance(v, list) else v for n, v in preprocessing.items()})
    return model.to(device).eval()


def _skeleton(family: Adapter, description: dict[str, Any], config: TTTConfig | None, folder: Path) -> nn.Module:
    try:
        return family.skeleton(description["architecture"], description["model_args"], config)
    except T5Error as error:
        raise T5Error(f"{folder}/t5.json, made with {description.get('versions')}: {error}") from None
    except Exception as error:  # whatever a library's constructors raise on arguments that they were not made for
        raise T5Error(
            f"{folder}/t5.json does not describe a model that {family.package} {version(family.package)} can make "
            f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}); it was made with "
            f"{description.get('versions')}: save or copy the folder again, or use those versions"
        ) from None


def _pretrained(model: nn.Module) -> dict[str, Any]:
    """What timm tells about weights and their images; nothing for models of other kinds."""
    return vars(model).get("pretrained_cfg", {})


def read_description(folder: Path | str) -> dict[str, Any]:
    """The checked content of `folder`/t5.json.

    Raises:
        T5Error: the folder is not one that `save` wrote, or is of a newer format.
    """
    if not (Path(folder) / "t5.json").exists():
        raise T5Error(f"{folder} is not a saved model: it has no t5.json; expected a folder written by t5lib.save")
    description = read_json(Path(folder) / "t5.json")
    if not isinstance(description, dict):
        raise T5Error(f"{folder}/t5.json holds a {type(description).__name__}; save or copy the folder again")
    if description.get("format") != FORMAT:
        raise T5Error(
            f"{folder}/t5.json is of format {description.get('format')}; this t5lib reads {FORMAT}: update it"
        )
    expected = ENTRIES | {name: kind for name, kind in OPTIONAL.items() if name in description}
    wrong = [name for name, kinds in expected.items() if not isinstance(description.get(name, False), kinds)]
    if wrong:
        shown = ", ".join(f"{name}: {description.get(name, 'missing')!r:.40}" for name in wrong)
        raise T5Error(f"{folder}/t5.json has no such entries as t5lib.save writes, {shown}; save or copy it again")
    return description


def _check_replaceable(folder: Path) -> None:
    """A slip such as `t5 convert -o .` must not cost anybody their files."""
    if folder.is_dir():
        held = {path.name for path in folder.iterdir()}
        if held and not ((folder / "model.safetensors").is_file() and (folder / "t5.json").is_file()):
            raise T5Error(f"{folder} is no saved model, and saving would replace it; pass a new folder")
        if others := sorted(held - FILES):
            raise T5Error(
                f"{folder} holds {', '.join(others[:4])} beside a saved model; move that, or pass a new folder"
            )
    elif folder.exists():
        raise T5Error(f"{folder} is no saved model but a file, and saving would replace it; pass a new folder")


def _check_plain(architecture: str, arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        try:
            json.dumps(value)
        except TypeError:
            raise T5Error(
                f"{architecture} was created with {name}={value!r}, which JSON cannot hold, so that it could not be "
                "loaded again; create it with a name that timm knows (such as act_layer='relu')"
            ) from None


def _check_classes(model: nn.Module, twin: nn.Module) -> None:
    """A part of a class of the user's own, or of an adapter's or a quantizer's, would come back as the plain one."""
    expected = {name: type(part) for name, part in twin.named_modules()}
    other = [
        f"{name or 'the model'} is a {type(part).__name__}, not a {expected[name].__name__}"
        for name, part in model.named_modules()
        if name in expected and type(part) is not expected[name]
    ]
    if other:
        raise T5Error(
            f"{', '.join(other[:3])}: it would be loaded as that, and compute something else; save its state_dict "
            "beside the code that makes it, or take the change out first"
        )


def _check_values(model: nn.Module) -> None:
    weights = model.state_dict()
    if meta := [name for name, value in weights.items() if value.is_meta]:
        raise T5Error(f"{', '.join(meta[:3])} are on the meta device and have no values to save; load weights first")
    check_numbers(weights, "the model")
