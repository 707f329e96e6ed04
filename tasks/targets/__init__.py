"""The kinds of targets. Which kind a target is of, its `fetch` section says, and nothing else asks.

`python -m tasks.targets dinov2-fashion` checks a target's settings and prints all of them with their defaults.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t5lib.utils.config import to_dict
from t5lib.utils.errors import T5Error
from tasks.runtime import launch, params
from tasks.runtime.needs import Needs

if TYPE_CHECKING:
    from tasks.targets.base import Target

# fetch.format → module and class. Looked up by name: diffusers takes 15 seconds to import.
_KINDS: dict[str | None, tuple[str, str]] = {"pipeline": ("denoiser", "DenoiserTarget")}
_USUAL = ("classifier", "ClassifierTarget")
# Module → what its stages import that takes long (tasks.runtime.warm).
_EVERY_KIND = (
    "timm",
    "accelerate",
    "webdataset",
    "matplotlib.figure",
    "mlflow.store.tracking.sqlalchemy_store",
    "jinja2",
)
_LIBRARIES = {
    "classifier": _EVERY_KIND,
    "denoiser": ("diffusers.training_utils", "diffusers.pipelines.stable_diffusion_3", "transformers", *_EVERY_KIND),
}


def kind(settings: dict[str, Any]) -> "type[Target]":
    """The class of a target with these settings."""
    module, name = _kind(settings)
    return getattr(import_module(f"tasks.targets.{module}"), name)


def libraries(settings: dict[str, Any]) -> tuple[str, ...]:
    """What takes long to import, and the stages of a target with these settings need."""
    return _LIBRARIES[_kind(settings)[0]]


def is_pipeline(settings: dict[str, Any]) -> bool:
    """Whether a target with these settings is of a diffusers pipeline; known without importing diffusers."""
    return _kind(settings) != _USUAL


def _kind(settings: dict[str, Any]) -> tuple[str, str]:
    fetch = settings.get("fetch")
    form = fetch.get("format") if isinstance(fetch, dict) else None
    return _KINDS.get(form if isinstance(form, str) else None, _USUAL)


def needs(
    root: Path | str, target: str, settings: dict[str, Any], *, online: bool = False, pieces: int | None = None
) -> Needs:
    """See Target.needs; `settings` are those that `resolve` gives.

    Args:
        online: fetch the configs of what lies on a hub, some kilobytes, to learn its size and to check them.
        pieces: number of cards that FSDP2 spreads trainings over; default: what `launch` in params.yaml says.
    """
    of_kind, root = kind(settings), Path(root)
    pieces = pieces or launch.pieces(launch.config(root))
    sections = params.checked(settings, of_kind.SECTIONS, target)
    return of_kind.needs(sections, root, target, online=online, pieces=pieces)


def resolve(root: Path | str, target: str, changes: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """Every section of a target with its defaults filled in, as plain values.

    Args:
        changes: command line words that replace values, such as `evaluate.sampling.steps=20` (params.changed).

    Raises:
        T5Error: an unknown setting, a wrong value, a section that no stage reads, or settings that do not go together.
    """
    settings = params.changed(params.read_target(root, target), changes, target)
    return checked(settings, f"{target} with --set" if changes else f"params.yaml: targets.{target}", root)


def checked(settings: dict[str, Any], where: str, root: Path | str = ".") -> dict[str, Any]:
    """The sections of a target with their defaults filled in; `where` names their origin. Raises as `resolve` does."""
    of_kind = kind(settings)
    sections = params.checked(settings, of_kind.SECTIONS, where)
    try:
        of_kind.check(sections, Path(root))
    except T5Error as error:
        raise T5Error(f"{where}: {error}") from None
    return {name: to_dict(section) for name, section in sections.items()}
