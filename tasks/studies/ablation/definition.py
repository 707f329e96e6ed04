"""What an ablation is: a YAML file beside this one, or the user's own, checked and resolved before any work.

    target: dinov2-fashion-24k       # gives the model, the images and the source (fetch, shards, data, source)
    convert: {inner: swiglu}         # what all variants share: these settings and the recipes below,
    calibrate: {steps: 600}          # each the section of that name in a target; `freeze` is a recipe by itself
    pilot: {steps: 100, grid: [{lr: 0.003}, {lr: 0.01}]}
    freeze: {epochs: 1}
    finetune: {epochs: 1}
    variants:
      softmax: {convert: null}       # the control: the softmax source, fine-tuned alike
      swiglu: {}
      linear: {convert: {inner: linear}}
    tables:
      inner: {title: Inner models, rows: {linear: linear, swiglu: swiglu}, paper: {linear: {freeze: 3.71}}}

A variant adds its own settings to the shared ones. It is run once, with every protocol that some table shows of it.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from t5lib.utils.config import AtLeastOne, Several, WholeNumber, from_dict, one_of, settings, to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_text
from tasks import targets
from tasks.runtime import params
from tasks.studies.ablation import FOLDER, names
from tasks.studies.common import checksum

PROTOCOLS: tuple[Literal["freeze", "finetune"], ...] = ("freeze", "finetune")
SOURCE_SECTIONS = ("fetch", "shards", "data", "source")  # what decides about the model that variants start from
Settings = dict[str, Any]


@settings
class Pilot:
    """How calibration's learning rates are chosen, without labels, the same way for every variant.

    Each entry of `grid` (settings of CalibrateConfig) is tried for `steps`; the one with the lowest held-out error is
    taken. What a variant sets itself is not tried. `steps: 0`: no pilot.
    """

    steps: WholeNumber = 0
    grid: Several[Settings] = ()


@settings
class Images:
    """How many images of each split are used, the first ones; null for all."""

    train: AtLeastOne | None = None
    val: AtLeastOne | None = None


@settings
class Variant:
    """Settings that one variant adds to the shared ones, by section.

    `convert: null` is the softmax source itself; `calibrate: null` goes without attention transfer.
    """

    convert: Settings | None = Field(default_factory=dict)
    calibrate: Settings | None = Field(default_factory=dict)
    freeze: Settings = Field(default_factory=dict)
    finetune: Settings = Field(default_factory=dict)


@settings
class Table:
    """Rows to show side by side.

    Attributes:
        rows: what the table calls a row, and the variant it shows.
        protocols: the trainings that are shown.
        paper: figures to stand beside, {row: {protocol: number or text}}; paper_says: what they are of.
        note: what a reader must know.
    """

    title: str
    rows: dict[str, str]
    protocols: Several[Literal["freeze", "finetune"]] = PROTOCOLS
    paper: dict[str, Settings] = Field(default_factory=dict)
    paper_says: str = ""
    note: str = ""


@settings
class Ablation:
    """The content of an ablation's file (see the top of this one).

    Attributes:
        target: a section of `targets` in params.yaml.
        resolution: pixels in place of the target's.
        images, seeds: what all variants are tried on and with.
        fetch, data, source: changes to the target's sections of these names.
        convert, calibrate, pilot, freeze, finetune: what all variants share.
        control: the variant that every table shows for comparison.
        variants, tables: each a Variant and a Table, by name.
        note: what a reader must know of all tables.
    """

    target: str
    resolution: AtLeastOne | None = None
    images: Images = Field(default_factory=Images)
    seeds: Several[WholeNumber] = (0, 1)
    fetch: Settings = Field(default_factory=dict)
    data: Settings = Field(default_factory=dict)
    source: Settings = Field(default_factory=dict)
    convert: Settings = Field(default_factory=dict)
    calibrate: Settings = Field(default_factory=dict)
    pilot: Pilot = Field(default_factory=Pilot)
    freeze: Settings = Field(default_factory=dict)
    finetune: Settings = Field(default_factory=dict)
    control: str | None = None
    variants: Settings
    tables: Settings
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One variant: the least that is run by itself.

    Attributes:
        settings: by section as in params.yaml, all defaults filled in; "seed" stands at 0 everywhere.
        key: a checksum of the settings as they are written: results with another key are of other settings.
        protocols: the trainings to run.
    """

    variant: str
    settings: Settings
    key: str
    protocols: tuple[str, ...]

    def result_file(self, work: Path, seed: int) -> Path:
        """Where the record of a run with that seed is written."""
        return work / f"results/{self.variant}--seed-{seed}.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A resolved ablation: `settings` are the target's sections with the ablation's changes, `units` in order."""

    name: str
    target: str
    seeds: tuple[int, ...]
    images: Images
    settings: Settings
    source_key: str
    units: tuple[Unit, ...]
    tables: dict[str, Table]
    control: str | None
    note: str

    def unit(self, variant: str) -> Unit:
        return next(unit for unit in self.units if unit.variant == variant)


def resolve(root: Path, name: str, changes: Iterable[str] = ()) -> Plan:
    """Read and check an ablation.

    Args:
        name: of a file beside this one, such as smoke; or the path of a file, such as my.yaml, from `root` on.
        changes: words such as `finetune.epochs=0.5` that replace values (tasks.runtime.params.changed).

    Raises:
        T5Error: an unknown ablation, target, variant or setting, or a value that does not fit.
    """
    file = _file(root, name)
    where = f"{file.name}: ablation"
    whole = to_dict(from_dict(Ablation, _read(file), where))  # every section is there, so that a change can reach it
    words = [f"ablation.{word}" for word in changes]  # an ablation is one section to --set: resolution=518 has no other
    ablation = from_dict(Ablation, params.changed({"ablation": whole}, words, file.name)["ablation"], where)
    written = _target_written(root, ablation)
    target = _target_settings(ablation, written)
    odd = [variant for variant in ablation.variants if not re.fullmatch(r"[\w-]+", variant)]
    if odd:
        raise T5Error(f"{where}.variants: {', '.join(map(repr, odd))}: expected letters, digits, _ and - in a name")
    variants = {key: from_dict(Variant, own, f"{where}.variants.{key}") for key, own in ablation.variants.items()}
    tables = {key: _table(own, variants, f"{where}.tables.{key}") for key, own in ablation.tables.items()}
    if ablation.control is not None:
        one_of(ablation.control, variants, f"{where}.control")
    resolver = _Resolver(ablation, target, written, file.name)
    protocols = _protocols(tables, ablation.control)
    units = tuple(resolver.unit(key, variants[key], protocols[key]) for key in protocols)
    return Plan(
        name=file.stem,
        target=ablation.target,
        seeds=ablation.seeds,
        images=ablation.images,
        settings=target,
        source_key=checksum(resolver.source_written),
        units=units,
        tables=tables,
        control=ablation.control,
        note=ablation.note,
    )


def merged(base: Settings, change: Settings) -> Settings:
    """`base` with the values of `change`, sections within sections too."""
    result = dict(base)
    for key, value in change.items():
        both = key != "layers" and isinstance(value, dict) and isinstance(base.get(key), dict)  # a map is one value
        result[key] = merged(base[key], value) if both else value
    return result


class _Resolver:
    """Makes units: the shared settings, a variant's own on top, and what they are with all defaults."""

    def __init__(self, ablation: Ablation, settings: Settings, written: Settings, where: str):
        self.ablation, self.where = ablation, where
        images = {"images": to_dict(ablation.images)}
        self.of_source = images | {section: settings[section] for section in SOURCE_SECTIONS}
        self.source_written = images | {section: written[section] for section in SOURCE_SECTIONS}

    def unit(self, name: str, variant: Variant, protocols: tuple[str, ...]) -> Unit:
        written = self._written(variant, protocols)
        settings = {}
        for section, value in written.items():
            cls = _classes().get(section)
            where = f"{self.where}, variant {name}, {section}"
            settings[section] = to_dict(from_dict(cls, value, where)) if cls and value is not None else value
        for candidate in settings["pilot"]["grid"]:  # a slip in one of them must show now, not an hour later
            from_dict(_classes()["calibrate"], merged(written["calibrate"], candidate), f"{self.where}.pilot.grid")
        runnable = tuple(protocol for protocol in PROTOCOLS if protocol in written)
        for protocol in runnable:
            _refuse_augmentation(settings[protocol], f"{self.where}, variant {name}, {protocol}")
        key = checksum(self.source_written | written)
        return Unit(variant=name, settings=self.of_source | settings, key=key, protocols=runnable)

    def _written(self, variant: Variant, protocols: tuple[str, ...]) -> Settings:
        """The sections as params.yaml means them, without defaults: these may change, results stay what they are."""
        from t5lib.layers.config import TTTConfig  # late, as in _classes

        shared = self.ablation
        written: Settings = {"convert": None, "calibrate": None, "pilot": {"steps": 0, "grid": []}}
        if variant.convert is not None:
            written["convert"] = merged(shared.convert, TTTConfig.expand(variant.convert))
        if variant.convert is not None and variant.calibrate is not None:
            written["calibrate"] = merged(shared.calibrate, variant.calibrate)
            written["pilot"] = {"steps": shared.pilot.steps, "grid": _grid(shared.pilot, variant.calibrate)}
        if "freeze" in protocols and variant.convert is not None:  # softmax has nothing new to train
            written["freeze"] = merged({"trainable": "new"} | shared.freeze, variant.freeze)
        if "finetune" in protocols:
            written["finetune"] = merged(shared.finetune, variant.finetune)
        return written


def _grid(pilot: Pilot, own: Settings) -> list[Settings]:
    """What is tried: the pilot's entries without what the variant sets itself, each once; none where none is left."""
    entries = [{key: value for key, value in entry.items() if key not in own} for entry in pilot.grid]
    distinct = [entry for index, entry in enumerate(entries) if entry and entry not in entries[:index]]
    return distinct if pilot.steps else []


def _classes() -> dict[str, type]:
    """The dataclass of each section of a unit; imported late, for they load torch."""
    from t5lib.layers.config import TTTConfig
    from t5lib.training.calibration import CalibrateConfig
    from t5lib.training.classifier import TrainConfig

    return {"convert": TTTConfig, "calibrate": CalibrateConfig, "freeze": TrainConfig, "finetune": TrainConfig}


def _target_written(root: Path, ablation: Ablation) -> Settings:
    """The target's sections as params.yaml has them, with the ablation's changes."""
    changes = {"fetch": ablation.fetch, "data": ablation.data, "source": ablation.source}
    if ablation.resolution:
        changes = merged(
            {"fetch": {"model_args": {"img_size": ablation.resolution}}, "data": {"img_size": ablation.resolution}},
            changes,
        )
    return merged(params.read_target(root, ablation.target), changes)


def _target_settings(ablation: Ablation, written: Settings) -> Settings:
    from tasks.targets.classifier import ClassifierTarget

    if not issubclass(targets.kind(written), ClassifierTarget):
        raise T5Error(
            f"the target '{ablation.target}' is a denoiser, and an ablation compares classifiers; "
            "`python -m tasks.studies.curves` compares layer sets of a denoiser"
        )
    where = f"params.yaml: targets.{ablation.target} with the ablation's changes"
    resolved = targets.checked(written, where)
    recipe = resolved["source"]["finetune"]
    if recipe:
        _refuse_augmentation(recipe, f"{where}, source.finetune")
    return resolved


def _refuse_augmentation(recipe: Settings, where: str) -> None:
    """All runs take their images from the device's memory, where only the mirror image is to be had."""
    more = [key for key, value in recipe["augment"].items() if value and key != "hflip"]
    if more:
        raise T5Error(f"{where}: an ablation supports no augmentation but hflip, got {', '.join(more)}; drop it")


def _table(own: Any, variants: dict[str, Variant], where: str) -> Table:
    table = from_dict(Table, own, where)
    for variant in table.rows.values():
        one_of(variant, variants, f"{where}.rows: variant")
    for row, figures in table.paper.items():
        one_of(row, table.rows, f"{where}.paper: row")
        for protocol in figures:
            one_of(protocol, PROTOCOLS, f"{where}.paper.{row}: protocol")
    return table


def _protocols(tables: dict[str, Table], control: str | None) -> dict[str, tuple[str, ...]]:
    """The variants in the order in which they are run, control first, and the trainings that some table shows."""
    shown: dict[str, set[str]] = {control: {"finetune"}} if control else {}
    for table in tables.values():
        for variant in table.rows.values():
            shown.setdefault(variant, set()).update(table.protocols)
    return {variant: tuple(each for each in PROTOCOLS if each in protocols) for variant, protocols in shown.items()}


def _file(root: Path, name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        return root / name
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise T5Error(f"there is no ablation '{name}'; {hint}Known: {', '.join(known)}, or a file: NAME.yaml")
    return FOLDER / f"{name}.yaml"


def _read(file: Path) -> Any:
    try:
        return params.parsed(read_text(file), str(file))
    except FileNotFoundError:
        raise T5Error(f"{file} does not exist; expected an ablation in YAML, such as {FOLDER / 'smoke.yaml'}") from None
    except UnicodeDecodeError as error:
        raise T5Error(f"{file} is not valid YAML: {error}") from None
