"""Which models convert: every architecture of timm, transformers' vision models and diffusers' transformers, tried.

    python -m t5lib.families.coverage --only vit_* --library timm --out vits

Without options it takes all and writes docs/results/coverage.md and coverage.json, in about ten minutes.

Models are made on the meta device at their own size, without weights, and converted. Those that convert also run once
there, so that shapes are known to fit; that values are right is what tests/t5lib/families/test_positions.py holds. A
model that needs `drop_position_bias` is counted apart. Anything but a T5Error ends the run.
"""

import fnmatch
import inspect
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from t5lib.families import family_of, refusals
from t5lib.families.base import Adapter
from t5lib.families.inputs import ExampleSize, placed
from t5lib.families.replacement import chosen_layers, replace_attentions
from t5lib.layers.config import TTTConfig
from t5lib.utils import command_line
from t5lib.utils.errors import T5Error
from t5lib.utils.extras import extras_named
from t5lib.utils.files import write_json, write_text
from t5lib.utils.markdown import table
from t5lib.utils.progress import progress

ACCEPTED, ON_REQUEST, REFUSED, NOT_MADE = "accepted", "without position bias", "refused", "not made"
RESOLUTIONS = (224, 256, 240, 512)  # one is a multiple of what a token covers
TASKS = ("IMAGE", "IMAGE_CLASSIFICATION", "BACKBONE", "DEPTH_ESTIMATION", "MASK_GENERATION")  # transformers' lists
FILLED = {
    getattr(Tensor, f"{name}_") for name in ("uniform", "normal", "fill", "zero", "erfinv", "clamp", "mul", "add")
}

Make = Callable[[], nn.Module]


@dataclass(frozen=True)
class Verdict:
    """What came of one architecture.

    Attributes:
        kind: the class of the model.
        attends: whether it has attention at all.
        result: ACCEPTED, ON_REQUEST, REFUSED or NOT_MADE (its library makes none by default).
        reason: of the last two, a sentence.
        ran: whether the converted model ran. One that reads the values of its inputs (Flux, its positions) cannot.
    """

    library: str
    name: str
    kind: str
    attends: bool
    result: str
    reason: str = ""
    ran: bool = False


def verdicts(libraries: Sequence[str], pattern: str = "*") -> list[Verdict]:
    """One for every architecture of `libraries` (names of CATALOGUES) whose name is like `pattern`.

    Raises:
        Exception: whatever a conversion raised that is no T5Error, or the forward of a converted model.
    """
    known = {library: CATALOGUES[library]() for library in libraries}
    names = [(library, name) for library in libraries for name in fnmatch.filter(known[library], pattern)]
    found = []
    with progress("architectures", len(names)) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for done, (library, name) in enumerate(names, start=1):
            try:
                found.append(judged(library, name, known[library][name]))
            except Exception as error:
                error.add_note(f"while {name} of {library} was tried")
                raise
            bar.advance(done)
    return found


def judged(library: str, name: str, make: Make) -> Verdict:
    """Make the model, convert it as it is, or without its position bias, and run what came of it."""
    try:
        with _without_values():
            model = make()
    except Exception as error:  # whatever a library raises on its own defaults
        return Verdict(
            library, name, name, False, NOT_MADE, f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        )
    about = (library, name, type(model).__name__, refusals.attends(model))
    try:
        return Verdict(*about, ACCEPTED, ran=_converted(model, TTTConfig()))
    except T5Error as refused:
        reason = str(refused).removesuffix(refusals.CONVERTIBLE)
    try:
        return Verdict(*about, ON_REQUEST, ran=_converted(model, TTTConfig(drop_position_bias=True)))
    except T5Error:
        return Verdict(*about, REFUSED, reason)


def _converted(model: nn.Module, config: TTTConfig) -> bool:
    """Convert `model`, in place, and run it if that can be; returns whether it ran.

    Raises:
        T5Error: it is refused.
    """
    with torch.device("meta"):
        family = family_of(model)
        replace_attentions(family, model, config, chosen_layers(family, model, config))
        try:
            return _run(family, model)
        except T5Error as error:
            raise AssertionError(f"a converted {type(model).__name__} does not run") from error


@torch.no_grad()
def _run(family: Adapter, model: nn.Module) -> bool:
    """A forward at a size that the model takes; shapes alone are computed."""
    for resolution in RESOLUTIONS:
        size = ExampleSize(resolution)
        try:
            sized = family.at_resolution(model, size)
        except T5Error:
            continue
        try:
            family.call(sized, placed(family.example_inputs(sized, size), "meta"))
        except NotImplementedError:  # what torch raises where values are asked for
            return False
        return True
    raise T5Error(f"{type(model).__name__} takes none of {RESOLUTIONS} px; add one that it takes")


class _Unfilled(TorchFunctionMode):
    """New weights stay as they are: on the meta device they have no values, and to draw none takes the most time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func in FILLED else func(*args, **(kwargs or {}))


@contextmanager
def _without_values() -> Iterator[None]:
    with torch.device("meta"), _Unfilled():
        yield


# What there is.


def timm_models() -> dict[str, Make]:
    import timm

    return {name: partial(timm.create_model, name) for name in timm.list_models()}


def transformers_models() -> dict[str, Make]:
    """Vision models that transformers has under `AutoModel…`, with their default configurations."""
    with extras_named():
        import transformers
        from transformers.models.auto import modeling_auto

    found: dict[str, Make] = {}
    for task in TASKS:
        for names in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values():
            for name in [names] if isinstance(names, str) else names:
                kind = getattr(transformers, name)
                found[name] = partial(_with_defaults, kind)
    return found


def _with_defaults(kind: Any) -> nn.Module:
    return kind(kind.config_class())


def diffusers_models() -> dict[str, Make]:
    """The transformers of diffusers, with their default arguments."""
    with extras_named():
        import diffusers
        from diffusers.models import transformers as package

    kinds = [kind for _, kind in inspect.getmembers(package, inspect.isclass)]
    return {kind.__name__: kind for kind in kinds if issubclass(kind, diffusers.ModelMixin)}


CATALOGUES = {"timm": timm_models, "transformers": transformers_models, "diffusers": diffusers_models}


# What is written.


def page(found: list[Verdict]) -> str:
    """The verdicts as Markdown: counts, what converts by class, and reasons with the classes that each is of."""
    libraries = list(dict.fromkeys(verdict.library for verdict in found))
    lines = [
        "# Which models convert",
        "",
        "Made by `python -m t5lib.families.coverage`; every name: coverage.json.",
        "",
    ]
    columns = ("library", "architectures", "with attention", ACCEPTED, ON_REQUEST, REFUSED, NOT_MADE)
    lines += table(columns, [_counts(library, found) for library in libraries], numbers=True)
    for library in libraries:
        own = [verdict for verdict in found if verdict.library == library]
        lines += ["", f"## {library} {version(library)}", ""]
        lines += table(("class", ACCEPTED, ON_REQUEST, "ran"), _by_class(own), numbers=True)
        lines += ["", *table(("why not", "architectures", "classes"), _by_reason(own))]
    return "\n".join(lines) + "\n"


def _counts(library: str, found: list[Verdict]) -> list[object]:
    own = [verdict for verdict in found if verdict.library == library]
    results = Counter(verdict.result for verdict in own)
    attending = sum(verdict.attends for verdict in own)
    return [library, len(own), attending, *(results[each] for each in (ACCEPTED, ON_REQUEST, REFUSED, NOT_MADE))]


def _by_class(own: list[Verdict]) -> list[tuple[str, int, int, int]]:
    accepted, on_request = (Counter(v.kind for v in own if v.result == each) for each in (ACCEPTED, ON_REQUEST))
    ran = Counter(v.kind for v in own if v.ran)
    order = sorted({*accepted, *on_request}, key=lambda kind: (-accepted[kind] - on_request[kind], kind))
    return [(kind, accepted[kind], on_request[kind], ran[kind]) for kind in order]


def _by_reason(own: list[Verdict]) -> list[tuple[str, int, str]]:
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for verdict in own:
        if verdict.result in (REFUSED, NOT_MADE):
            kinds[_short(verdict)][verdict.kind] += 1
    order = sorted(kinds.items(), key=lambda item: -item[1].total())
    return [(why, count.total(), ", ".join(f"{kind} {n}" for kind, n in count.most_common())) for why, count in order]


def _short(verdict: Verdict) -> str:
    """The reason of a verdict without what is special to this one."""
    if verdict.result == NOT_MADE:
        return "its library makes none by default"
    known = (why for why in refusals.KNOWN if why in verdict.reason)
    return next(known, verdict.reason.partition(":")[0].replace(verdict.kind, "it"))


def main() -> None:
    parser = command_line.parser("t5lib.families.coverage", __doc__)
    parser.add_argument(
        "--only", metavar="PATTERN", default="*", help="only names like this, with * for anything (default: all)"
    )
    parser.add_argument(
        "--library", choices=CATALOGUES, nargs="+", default=list(CATALOGUES), help="the libraries to go through"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/coverage"), help="files; .md and .json are added"
    )
    arguments = parser.parse_args()
    found = verdicts(arguments.library, arguments.only)
    versions = {library: version(library) for library in arguments.library}
    write_json(arguments.out.with_suffix(".json"), {"versions": versions, "models": [asdict(each) for each in found]})
    write_text(arguments.out.with_suffix(".md"), page(found))
    print(page(found))


if __name__ == "__main__":
    main()
