"""A model as a folder: `model.safetensors` and `t5.json`; no pickle, loads anywhere t5lib is installed."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
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
from t5lib.utils.config import checked, from_dict, shown, to_dict
from t5lib.utils.devices import usable_device
from t5lib.utils.errors import T5Error, reason
from t5lib.utils.files import as_path, atomic_dir, read_json, refuse_endless, refuse_inside_model, sha256, write_json
from t5lib.utils.twins import differences
from t5lib.utils.weights import check_fit, check_numbers, set_unlisted_buffers, unlisted_buffers

_log = logging.getLogger(__name__)

FORMAT = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "t5.json"
ENTRIES = {"architecture": str, "model_args": dict, "t5": dict | None}  # of t5.json
OPTIONAL = {"family": str, "preprocessing": dict, "sha256": dict}
PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # what a tag of timm's weights decides


def save(model: nn.Module, folder: Path | str) -> None:
    """Write `model`, converted or softmax, to `folder`, replacing the model saved there only once all is written.

    Any model that t5lib.convert takes or gives can be saved; of a pipeline that is its transformer alone.

    Raises:
        T5Error: it could not be loaded again as it is, since its arguments cannot be told from the model, parts of it
            differ from what those make or share weights, or hooks change what it computes; a weight is not finite; or
            `folder` holds something else than a saved model, is inside of one, or cannot be written.
    """
    with _writing(folder):
        folder = Path(os.path.realpath(as_path(folder)))
        _check_replaceable(folder)
    family = family_of(model)
    description = _description(model, family)
    twin = family.skeleton(description["architecture"], description["model_args"], _config(description, folder))
    check_fit(model.state_dict(), twin.state_dict(), "weights do not fit the model as rebuilt from its description")
    _check_same(model, twin)
    check_untied(model)
    weights = model.state_dict() | unlisted_buffers(model)
    _check_values(weights)
    with _writing(folder), atomic_dir(folder) as temporary:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(plain, temporary / WEIGHTS, metadata={"format": "pt"})
        digests = {WEIGHTS: sha256(temporary / WEIGHTS), "description": _digest(description)}
        write_json(temporary / DESCRIPTION, description | {"sha256": digests})


def load(folder: Path | str, device: str | torch.device = "cpu") -> nn.Module:
    """Load what `save` wrote, in eval mode.

    Raises:
        T5Error: no such folder, another format, files that are no longer as they were written, a description that no
            model can be made of, weights that do not fit it (named) or are not finite, or no such device.
    """
    folder = as_path(folder)
    description, device = read_description(folder), usable_device(device)
    config = _config(description, folder)
    weights = _read_weights(folder, description.get("sha256", {}), device)
    family = adapter(description.get("family", "timm_vit"))  # folders of the first versions do not name it
    model = _skeleton(family, description, config, folder)
    buffers = {name: weights[name] for name in unlisted_buffers(model) if name in weights}
    check_fit(weights, model.state_dict() | buffers, f"weights do not fit {folder}/{DESCRIPTION}")
    check_numbers(weights, f"{folder}/{WEIGHTS}")
    model.load_state_dict({name: value for name, value in weights.items() if name not in buffers}, assign=True)
    set_unlisted_buffers(model, buffers)
    preprocessing = description.get("preprocessing", {})
    _pretrained(model).update({n: tuple(v) if isinstance(v, list) else v for n, v in preprocessing.items()})
    return model.to(device).eval()


def _description(model: nn.Module, family: Adapter) -> dict[str, Any]:
    """What t5.json tells of `model`, as it is when read again."""
    config = checked(getattr(model, "t5_config", None) or TTTConfig(), TTTConfig)
    architecture, arguments = family.describe(model)
    _check_plain(architecture, arguments)
    described = {
        "format": FORMAT,
        "family": family.name,
        "architecture": architecture,
        "model_args": arguments,
        "t5": to_dict(config) if getattr(model, "t5_config", None) else None,
        "preprocessing": {n: v for n, v in _pretrained(model).items() if n in PREPROCESSING},
        "versions": {name: version(name) for name in ("torch", family.package)},
    }
    return json.loads(json.dumps(described))


def _config(description: dict[str, Any], folder: Path) -> TTTConfig | None:
    told = description["t5"]
    return from_dict(TTTConfig, told, f"{folder}/{DESCRIPTION}: t5") if told else None


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
        T5Error: the folder is not one that `save` wrote, is of a newer format, or was changed since.
    """
    folder = as_path(folder)
    if not os.path.exists(folder / DESCRIPTION):  # Path.exists raises on names that are too long
        others = " (AutoModel….from_pretrained loads what a model's save_pretrained wrote)"
        hint = others if os.path.exists(folder / "config.json") else ""
        raise T5Error(f"{folder} is not a saved model: it has no {DESCRIPTION}; expected a folder of t5lib.save{hint}")
    description = read_json(folder / DESCRIPTION)
    if not isinstance(description, dict):
        raise T5Error(f"{folder}/{DESCRIPTION} holds a {type(description).__name__}; save or copy the folder again")
    found = description.get("format")
    if found != FORMAT or type(found) is not int:  # true is 1, too
        raise T5Error(f"{folder}/{DESCRIPTION} has format {shown(found)}; this t5lib reads {FORMAT}: update it")
    expected = ENTRIES | {name: kind for name, kind in OPTIONAL.items() if name in description}
    wrong = [name for name, kinds in expected.items() if not isinstance(description.get(name, False), kinds)]
    if wrong:
        told = ", ".join(f"{name}: {description.get(name, 'missing')!r:.40}" for name in wrong)
        raise T5Error(f"{folder}/{DESCRIPTION} does not hold what t5lib.save writes ({told}); save or copy it again")
    digest = _digest(description)
    if description.get("sha256", {}).get("description", digest) != digest:
        raise T5Error(
            f"{folder}/{DESCRIPTION} was changed after t5lib.save wrote it: its sha256 is not the one it "
            'records; copy it again, or, if the change is meant, take "description" out of its entry "sha256"'
        )
    return description


def _digest(description: dict[str, Any]) -> str:
    """Of what t5.json tells, however it is laid out, but for the digests themselves."""
    told = {name: value for name, value in description.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _read_weights(folder: Path, digests: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    if unproved := [name for name in (WEIGHTS, "description") if name not in digests]:
        _log.warning(
            "%s cannot be checked for changes: %s records no sha256 of %s",
            *(folder, DESCRIPTION, " and ".join(unproved)),
        )
    try:
        refuse_endless(folder / WEIGHTS)
        if WEIGHTS in digests and digests[WEIGHTS] != sha256(folder / WEIGHTS):
            raise T5Error(
                f"{folder}/{WEIGHTS} is not the file that t5lib.save wrote: its sha256 is not what {DESCRIPTION} "
                f'records; copy it again, or, if the change is meant, take "{WEIGHTS}" out of the entry "sha256" there'
            )
        return load_file(folder / WEIGHTS, device=str(device))
    except (OSError, SafetensorError) as error:
        raise T5Error(f"{folder}/{WEIGHTS} cannot be read ({reason(error)}); save or copy the folder again") from None


@contextmanager
def _writing(folder: Path | str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise T5Error(
            f"{folder} cannot be written ({reason(error)}); name another place, or make room there"
        ) from error


def _check_replaceable(folder: Path) -> None:
    """A slip such as `t5 convert -o .` must not cost anybody their files."""
    refuse_inside_model(folder)
    if folder.is_dir():
        held = {path.name for path in folder.iterdir()}
        if held and not ((folder / WEIGHTS).is_file() and (folder / DESCRIPTION).is_file()):
            raise T5Error(f"{folder} is not a saved model, and saving would replace it; pass a new folder")
        if others := sorted(held - {WEIGHTS, DESCRIPTION}):
            raise T5Error(
                f"{folder} holds {', '.join(others[:4])} besides a saved model; move it away, or pass a new folder"
            )
    elif folder.exists():
        raise T5Error(f"{folder} is a file, not a saved model, and saving would replace it; pass a new folder")


def _check_plain(architecture: str, arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        try:
            json.dumps(value)
        except TypeError:
            raise T5Error(
                f"{architecture} was created with {name}={value!r}, which JSON cannot hold, so that it could not be "
                "loaded again; create it with a name that timm knows (such as act_layer='relu')"
            ) from None


def _check_same(model: nn.Module, twin: nn.Module) -> None:
    """Changes of other people's, of an adapter's or a quantizer's would not come back."""
    if found := differences(model, twin):
        raise T5Error(
            f"{', '.join(found[:3])}: t5.json cannot record that, so the model would be loaded without it and compute "
            "something else; take the change out first (a hook: its handle's remove()), or save the state_dict beside "
            "the code that makes the model"
        )


def _check_values(weights: dict[str, torch.Tensor]) -> None:
    if meta := [name for name, value in weights.items() if value.is_meta]:
        raise T5Error(f"{', '.join(meta[:3])} are on the meta device and have no values to save; load weights first")
    check_numbers(weights, "the model")
