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
from t5lib.layers.config import TTTConfig
from t5lib.utils.config import from_dict, to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import atomic_dir, read_json, write_json

FORMAT = 1
PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # what a tag of timm's weights decides


def save(model: nn.Module, folder: Path | str) -> None:
    """Write `model`, converted or softmax, to `folder`, replacing the model saved there only once all is written.

    Any model that t5lib.convert takes or gives can be saved; of a pipeline that is its transformer alone.

    Raises:
        T5Error: its arguments cannot be told from the model, so that it could not be loaded again; or `folder` holds
            something else than a saved model.
    """
    folder = Path(folder).absolute()
    _check_replaceable(folder)
    family = family_of(model)
    architecture, arguments = family.describe(model)
    _check_plain(architecture, arguments)
    config = getattr(model, "t5_config", None)
    twin = family.skeleton(architecture, arguments, config)
    _compare(model.state_dict(), twin.state_dict(), "the model as rebuilt from its description")
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
        T5Error: no such folder, another format, or weights that do not fit the description (named).
    """
    folder = Path(folder)
    description = read_description(folder)
    config = from_dict(TTTConfig, description["t5"], f"{folder}/t5.json: t5") if description["t5"] else None
    try:
        weights = load_file(folder / "model.safetensors", device=str(device))
    except (FileNotFoundError, SafetensorError) as error:
        raise T5Error(f"{folder}/model.safetensors cannot be read ({error}); save or copy the folder again") from None
    family = adapter(description.get("family", "timm_vit"))  # folders of the first versions do not name it
    model = family.skeleton(description["architecture"], description["model_args"], config)
    _compare(weights, model.state_dict(), f"{folder}/t5.json")
    model.load_state_dict(weights, assign=True)
    preprocessing = description.get("preprocessing", {})
    _pretrained(model).update({n: tuple(v) if isinstance(v, list) else v for n, v in preprocessing.items()})
    return model.to(device).eval()


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
    if description.get("format") != FORMAT:
        raise T5Error(
            f"{folder}/t5.json is of format {description.get('format')}; this t5lib reads {FORMAT}: update it"
        )
    missing = [name for name in ("architecture", "model_args", "t5") if name not in description]
    if missing:
        raise T5Error(f"{folder}/t5.json lacks {', '.join(missing)}; save or copy the folder again")
    return description


def _check_replaceable(folder: Path) -> None:
    """A slip such as `t5 convert -o .` must not cost anybody their files."""
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not (folder / "t5.json").exists():
        raise T5Error(f"{folder} is no saved model, and saving would replace it; pass a new folder, or empty this one")


def _check_plain(architecture: str, arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        try:
            json.dumps(value)
        except TypeError:
            raise T5Error(
                f"{architecture} was created with {name}={value!r}, which JSON cannot hold, so that it could not be "
                "loaded again; create it with a name that timm knows (such as act_layer='relu')"
            ) from None


def _compare(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> None:
    missing, extra = sorted(set(expected) - set(ours)), sorted(set(ours) - set(expected))
    wrong = [n for n in expected if n in ours and ours[n].shape != expected[n].shape]
    if missing or extra or wrong:
        shapes = [f"{n} {tuple(ours[n].shape)} for {tuple(expected[n].shape)}" for n in wrong]
        raise T5Error(
            f"weights do not fit {what}: missing {missing[:4]}, unknown {extra[:4]}, other shapes {shapes[:4]}"
        )
