"""What an ablation is: a section of `ablations` in params.yaml, checked and resolved before any work.

    ablations:
      dinov2-fashion:
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
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t5lib.utils.config import from_dict, one_of, to_dict
from t5lib.utils.errors import T5Error
from tasks.runtime import params

PROTOCOLS = ("freeze", "finetune")
SOURCE_SECTIONS = ("fetch", "shards", "data", "source")  # what decides about the model that variants start from


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """How calibration's learning rates are chosen, without labels, the same way for every variant.

    Each entry of `grid` (settings of CalibrateConfig) is tried for `steps`; the one with the lowest held-out error is
    taken. What a variant sets itself is not tried. `steps: 0`: no pilot.
    """

    steps: int = 0
    grid: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Images:
    """How many images of each split are used, the first ones; null for all."""

    train: int | None = None
    val: int | None = None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Settings that one variant adds to the shared ones, by section.

    `convert: null` is the softmax source itself; `calibrate: null` goes without attention transfer.
    """

    convert: dict[str, Any] | None = field(default_factory=dict)
    calibrate: dict[str, Any] | None = field(default_factory=dict)
    freeze: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows to show side by side.

    Attributes:
        rows: what the table calls a row, and the variant it shows.
        protocols: the trainings that are shown (of PROTOCOLS).
        paper: figures to stand beside, {row: {protocol: number or text}}; paper_says: what they are of.
        note: what a reader must know.
    """

    title: str
    rows: dict[str, str]
    protocols: tuple[str, ...] = PROTOCOLS
    paper: dict[str, dict[str, Any]] = field(default_factory=dict)
    paper_says: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A section of `ablations` (see the top of this file).

    `resolution`: pixels in place of the target's; `source`: changes to the target's section; `control`: the variant
    that every table shows for comparison. `note`: what a reader must know of all tables.
    """

    target: str
    resolution: int | None = None
    images: Images = field(default_factory=Images)
    seeds: tuple[int, ...] = (0, 1)
    fetch: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    convert: dict[str, Any] = field(default_factory=dict)
    calibrate: dict[str, Any] = field(default_factory=dict)
    pilot: Pilot = field(default_factory=Pilot)
    freeze: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)
    control: str | None = None
    variants: dict[str, Any]
    tables: dict[str, Any]
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
    settings: dict[str, Any]
    key: str
    protocols: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A resolved ablation: `settings` are the target's sections with the ablation's changes, `units` in order."""

    name: str
    target: str
    seeds: tuple[int, ...]
    images: Images
    settings: dict[str, Any]
    source_key: str
    units: tuple[Unit, ...]
    tables: dict[str, Table]
    control: str | None
    note: str

    def unit(self, variant: str) -> Unit:
        return next(unit for unit in self.units if unit.variant == variant)


def resolve(root: Path, name: str, changes: dict[str, Any] | None = None) -> Plan:
    """Read and check the ablation `name`.

    Args:
        changes: values to replace, by dotted name: {"finetune.epochs": 0.5}.

    Raises:
        T5Error: an unknown ablation, target, variant or setting, or a value that does not fit.
    """
    where = f"params.yaml: ablations.{name}"
    raw = _read(root, name)
    for key, value in (changes or {}).items():
        _set(raw, key.split("."), value, where)
    ablation = from_dict(Ablation, raw, where)
    written = _target_written(root, ablation)
    settings = _target_settings(root, ablation, written)
    odd = [variant for variant in ablation.variants if not re.fullmatch(r"[\w-]+", variant)]
    if odd:
        raise T5Error(f"{where}.variants: {', '.join(map(repr, odd))}: expected letters, digits, _ and - in a name")
    variants = {key: from_dict(Variant, own, f"{where}.variants.{key}") for key, own in ablation.variants.items()}
    tables = {key: _table(own, variants, f"{where}.tables.{key}") for key, own in ablation.tables.items()}
    if ablation.control is not None:
        one_of(ablation.control, variants, f"{where}.control")
    resolver = _Resolver(ablation, settings, written, where)
    protocols = _protocols(tables, ablation.control)
    units = tuple(resolver.unit(key, variants[key], protocols[key]) for key in protocols)
    return Plan(
        name=name,
        target=ablation.target,
        seeds=ablation.seeds,
        images=ablation.images,
        settings=settings,
        source_key=checksum(resolver.source_written),
        units=units,
        tables=tables,
        control=ablation.control,
        note=ablation.note,
    )


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `change`, sections within sections too."""
    result = dict(base)
    for key, value in change.items():
        both = key != "layers" and isinstance(value, dict) and isinstance(base.get(key), dict)  # a map is one value
        result[key] = merged(base[key], value) if both else value
    return result


class _Resolver:
    """Makes units: the shared settings, a variant's own on top, and what they are with all defaults."""

    def __init__(self, ablation: Ablation, settings: dict[str, Any], written: dict[str, Any], where: str):
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

    def _written(self, variant: Variant, protocols: tuple[str, ...]) -> dict[str, Any]:
        """The sections as params.yaml means them, without defaults: these may change, results stay what they are."""
        shared, TTTConfig = self.ablation, _classes()["convert"]
        written: dict[str, Any] = {"convert": None, "calibrate": None, "pilot": {"steps": 0, "grid": []}}
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


def _grid(pilot: Pilot, own: dict[str, Any]) -> list[dict[str, Any]]:
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


def _target_written(root: Path, ablation: Ablation) -> dict[str, Any]:
    """The target's sections as params.yaml has them, with the ablation's changes."""
    changes = {"fetch": ablation.fetch, "data": ablation.data, "source": ablation.source}
    if ablation.resolution:
        changes = merged(
            {"fetch": {"model_args": {"img_size": ablation.resolution}}, "data": {"img_size": ablation.resolution}},
            changes,
        )
    return merged(params.read_target(root, ablation.target), changes)


def _target_settings(root: Path, ablation: Ablation, written: dict[str, Any]) -> dict[str, Any]:
    where = f"params.yaml: targets.{ablation.target} with the ablation's changes"
    settings = params.checked(root, written, where)
    recipe = settings["source"]["finetune"]
    if recipe:
        _refuse_augmentation(recipe, f"{where}, source.finetune")
    return settings


def _refuse_augmentation(recipe: dict[str, Any], where: str) -> None:
    """All runs take their images from the device's memory, where only the mirror image is to be had."""
    more = [key for key, value in recipe["augment"].items() if value and key != "hflip"]
    if more:
        raise T5Error(f"{where}: an ablation's images know no augmentation but hflip, got {', '.join(more)}; drop it")


def _table(own: Any, variants: dict[str, Variant], where: str) -> Table:
    table = from_dict(Table, own, where)
    for variant in table.rows.values():
        one_of(variant, variants, f"{where}.rows: variant")
    for row, figures in table.paper.items():
        one_of(row, table.rows, f"{where}.paper: row")
        for protocol in figures:
            one_of(protocol, PROTOCOLS, f"{where}.paper.{row}: protocol")
    for protocol in table.protocols:
        one_of(protocol, PROTOCOLS, f"{where}.protocols")
    return table


def _protocols(tables: dict[str, Table], control: str | None) -> dict[str, tuple[str, ...]]:
    """The variants in the order in which they are run, control first, and the trainings that some table shows."""
    found: dict[str, tuple[str, ...]] = {control: ("finetune",)} if control else {}
    for table in tables.values():
        for variant in table.rows.values():
            shown = (*found.get(variant, ()), *table.protocols)
            found[variant] = tuple(protocol for protocol in PROTOCOLS if protocol in shown)
    return found


def _read(root: Path, name: str) -> dict[str, Any]:
    ablations = params.read(root).get("ablations") or {}
    if name not in ablations:
        near = difflib.get_close_matches(name, ablations, n=1, cutoff=0.3)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise T5Error(f"params.yaml has no ablation '{name}'; {hint}Ablations: {', '.join(ablations) or 'none'}")
    return json.loads(json.dumps(ablations[name]))  # YAML's anchors share objects, which changes must not


def _set(section: dict[str, Any], path: list[str], value: Any, where: str) -> None:
    for key in path[:-1]:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise T5Error(f"{where}: cannot set {'.'.join(path)}, since {key} is {section!r}, not a section")
    section[path[-1]] = value


def checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
