"""Layer choice by measurement: what each layer loses when it alone is converted, and the best map for a time budget.

Calibration fits every layer on its own to the softmax model's activations (t5lib.training.calibration), so one
calibrated model of each kind holds every layer "calibrated alone", and any mixture of softmax and calibrated layers is
a model (`hybrid`). `scan` measures the increase of a loss for every layer and kind by itself; `choose` finds the map
with the smallest sum of increases that a budget allows, exactly; because layers do add to each other's errors, `select`
measures the few best maps as whole models and takes the best. `compare_rules` puts it beside maps made without
measuring.

A kind is a value of a layer map (TTTConfig.layers); an assignment names the kind of every layer.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t5lib.conversion import convert
from t5lib.families import family_of
from t5lib.families.inputs import count as images_in
from t5lib.families.inputs import placed
from t5lib.layers.attention import TTTAttention
from t5lib.layers.config import SOFTMAX, TTTConfig
from t5lib.layers.layer_map import format_layers
from t5lib.utils.config import one_of
from t5lib.utils.errors import T5Error

Assignment = Sequence[str]
Costs = Sequence[Mapping[str, float]]  # milliseconds of each layer's block, by kind, "softmax" among them
CROSS_ENTROPY, KL, COSINE = "cross-entropy", "kl", "cosine"


def layer_text(assignment: Assignment) -> str:
    """The assignment as `t5 convert --layers` takes it: "0-5=softmax,6-11=swiglu"."""
    return ",".join(f"{numbers}={kind}" for numbers, kind in format_layers(list(assignment)).items())


def hybrid(softmax: nn.Module, calibrated: Mapping[str, nn.Module], assignment: Assignment) -> nn.Module:
    """The model whose layer i is the softmax model's, or the one of the calibrated model of kind `assignment[i]`.

    All weights are copies. It carries t5_config and t5_report as t5lib.convert's models do, so that t5lib.save keeps
    it; with softmax in every layer it is a plain copy.

    Raises:
        T5Error: another number of layers, a kind that is not calibrated, or calibrated models whose settings no single
            TTTConfig with a layer map can tell.
    """
    names = _check(softmax, calibrated, assignment)
    if set(assignment) == {SOFTMAX}:
        return copy.deepcopy(softmax).eval()
    places = {kind: name for name, kind in zip(names, assignment, strict=True) if kind != SOFTMAX}
    used = {kind: calibrated[kind].get_submodule(name).mixer.config for kind, name in places.items()}
    model = convert(softmax, dataclasses.replace(_base(used), layers=format_layers(list(assignment))))
    for name, kind in zip(names, assignment, strict=True):
        if kind != SOFTMAX:
            layer, source = model.get_submodule(name), calibrated[kind].get_submodule(name)
            _check_settings(kind, layer.mixer.config, source.mixer.config)
            layer.load_state_dict(source.state_dict())
    return model.eval()


def scan(
    softmax: nn.Module,
    calibrated: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    precision: str = "fp32",
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """What the loss gains when one layer alone is converted, for every layer and kind.

    Args:
        calibrated: by kind, the softmax model converted in all layers and calibrated.
        batches: images (B, 3, H, W), or (images, labels (B,)), each image once; not the ones that were calibrated on.
        precision, on_batch: as in t5lib.evaluate.

    Returns:
        JSON-ready: loss ("cross-entropy" with labels; "kl" from the softmax model's predictions without; "cosine", 1 −
        cosine of the features, for a model without head), images, softmax_loss, and for each layer by kind
        `increase` of the mean loss and its `standard_error` (over images, paired).

    Raises:
        T5Error: what `measure` refuses.
    """
    depth = len(_check(softmax, calibrated, []))
    alone = {(layer, kind): _only(layer, kind, depth) for layer in range(depth) for kind in calibrated}
    found = measure(softmax, calibrated, [[SOFTMAX] * depth, *alone.values()], batches, precision, on_batch)
    base = found[(SOFTMAX,) * depth]
    table = [{kind: base.rise(found[tuple(alone[layer, kind])]) for kind in calibrated} for layer in range(depth)]
    return {
        "loss": base.kind,
        "images": len(base.losses),
        "softmax_loss": base.loss,
        "increase": [{kind: mean for kind, (mean, _) in row.items()} for row in table],
        "standard_error": [{kind: error for kind, (_, error) in row.items()} for row in table],
    }


def choose(increase: Sequence[Mapping[str, float]], cost: Costs, budget: float) -> list[str]:
    """The assignment with the smallest sum of increases whose cost is within `budget`, found exactly.

    Args:
        increase: for each layer by kind, as in `scan`'s table; softmax is 0.
        cost: for each layer by kind, in milliseconds, as t5lib.planning.cost_model's Plan.block_costs.
        budget: of the summed cost, in the same unit.

    Raises:
        T5Error: no assignment is within the budget; says what the cheapest costs.
    """
    return shortlist(increase, cost, budget, 1)[0]


def shortlist(increase: Sequence[Mapping[str, float]], cost: Costs, budget: float, count: int) -> list[list[str]]:
    """The `count` best assignments (fewer where there are no more), best first; see `choose`.

    A multiple-choice knapsack as an integer program: one variable for every layer and kind, one kind a layer, the cost
    within the budget; each assignment found is then forbidden and the next one sought.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    _check_budget(cost, budget)
    losses = [{SOFTMAX: 0.0} | dict(row) for row in increase]
    options = [(layer, kind) for layer, row in enumerate(losses) for kind in row]
    owner = np.array([[float(layer == other) for layer, _ in options] for other in range(len(losses))])
    values = np.array([losses[layer][kind] for layer, kind in options])
    costs = np.array([cost[layer][kind] for layer, kind in options])
    limits = [LinearConstraint(owner, 1, 1), LinearConstraint(costs / budget, -np.inf, 1 + 1e-9)]
    scale = np.abs(values).max() or 1.0  # the solver's tolerances are absolute
    found: list[list[str]] = []
    while len(found) < count:
        result = milp(
            values / scale, constraints=limits, bounds=Bounds(0, 1), integrality=1, options={"mip_rel_gap": 0.0}
        )
        if result.x is None:
            break
        picked = result.x > 0.5
        found.append([kind for (_, kind), taken in zip(options, picked, strict=True) if taken])
        limits.append(LinearConstraint(picked.astype(float), -np.inf, len(losses) - 1))
    return found


def fixed_rules(depth: int, count: int, kind: str) -> dict[str, list[str]]:
    """Maps made without measuring: `kind` in the first `count` layers, the last, or evenly spaced ("every n-th").

    Raises:
        T5Error: more layers than there are.
    """
    if not 0 <= count <= depth:
        raise T5Error(f"{count} layers of {depth}: expected a number from 0 to {depth}")
    chosen = {
        "first": range(count),
        "last": range(depth - count, depth),
        "evenly spaced": [int((index + 0.5) * depth / count) for index in range(count)],
    }
    return {rule: [kind if layer in layers else SOFTMAX for layer in range(depth)] for rule, layers in chosen.items()}


def rules_within(cost: Costs, budget: float) -> dict[str, list[str]]:
    """Every fixed rule with every kind, at the fewest layers that bring it within `budget`; by name.

    Rules that no number of layers brings there are left out, and equal maps named once.
    """
    found: dict[str, list[str]] = {}
    for kind in [kind for kind in cost[0] if kind != SOFTMAX]:
        for rule in ("first", "last", "evenly spaced"):
            for count in range(1, len(cost) + 1):
                assignment = fixed_rules(len(cost), count, kind)[rule]
                if total(cost, assignment) <= budget * (1 + 1e-9):
                    name = f"all {kind}" if count == len(cost) else f"{rule} {count} {kind}"
                    found[name] = assignment
                    break
    return found


def total(cost: Costs, assignment: Assignment) -> float:
    """What `assignment` costs."""
    return math.fsum(row[kind] for row, kind in zip(cost, assignment, strict=True))


def select(
    softmax: nn.Module,
    calibrated: Mapping[str, nn.Module],
    increase: Sequence[Mapping[str, float]],
    cost: Costs,
    budgets: Sequence[float],
    batches: Iterable[Any],
    *,
    count: int = 8,
    precision: str = "fp32",
    on_batch: Callable[[int], None] | None = None,
) -> list[list[str]]:
    """For each budget the assignment with the smallest loss as a whole model, on `batches`.

    Tried are the solver's `count` best, and the fixed rules within the budget: increases add up only as long as layers
    do not disturb each other, so the sum makes the short list, and the measurement decides. Arguments as in `scan` and
    `choose`; give the images of the scan, and keep others to report on.

    Raises:
        T5Error: a budget that no assignment is within, or what `measure` refuses.
    """
    tried = [[*shortlist(increase, cost, budget, count), *rules_within(cost, budget).values()] for budget in budgets]
    every = [assignment for candidates in tried for assignment in candidates]
    found = measure(softmax, calibrated, every, batches, precision, on_batch)
    return [min(candidates, key=lambda assignment: found[tuple(assignment)].loss) for candidates in tried]


def compare_rules(
    softmax: nn.Module,
    calibrated: Mapping[str, nn.Module],
    cost: Costs,
    budgets: Sequence[float],
    chosen: Sequence[Mapping[str, Assignment]],
    batches: Iterable[Any],
    *,
    precision: str = "fp32",
    on_batch: Callable[[int], None] | None = None,
) -> list[list[dict[str, Any]]]:
    """Chosen maps beside every fixed rule at equal cost, as whole models on `batches`, each read once.

    Args:
        chosen: for each budget, maps by name; the first is what the others are compared with.

    Returns:
        For each budget JSON-ready rows, the chosen first: name, layers (a layer map), kinds (how many layers of each),
        cost, the figures of `Outcome.as_dict`, and `behind`: its loss minus the first one's, with `behind_error`, the
        standard error of that difference over the images.
    """
    tables = [{**given, **rules_within(cost, budget)} for budget, given in zip(budgets, chosen, strict=True)]
    every = [assignment for table in tables for assignment in table.values()]
    found = measure(softmax, calibrated, every, batches, precision, on_batch)
    return [[_row(name, table, cost, found) for name in table] for table in tables]


def _row(
    name: str, table: Mapping[str, Assignment], cost: Costs, found: Mapping[tuple[str, ...], "Outcome"]
) -> dict[str, Any]:
    assignment, outcome = table[name], found[tuple(table[name])]
    behind, error = found[tuple(next(iter(table.values())))].rise(outcome)
    return {
        "name": name,
        "layers": format_layers(list(assignment)),
        "kinds": {kind: list(assignment).count(kind) for kind in sorted(set(assignment))},
        "cost": total(cost, assignment),
        **outcome.as_dict(),
        "behind": behind,
        "behind_error": error,
    }


@dataclass(frozen=True)
class Outcome:
    """How one assignment did, image by image.

    Attributes:
        kind: what the loss is, see `scan`.
        losses: (n,) float64; the mean is `loss`.
        correct, agrees: (n,) bool, with the label and with the softmax model's top class; None where there is none.
    """

    kind: str
    losses: Tensor
    correct: Tensor | None
    agrees: Tensor | None

    @property
    def loss(self) -> float:
        return self.losses.mean().item()

    def rise(self, other: "Outcome") -> tuple[float, float]:
        """How much larger the other's mean loss is, and the standard error of that over the images (paired)."""
        difference = other.losses - self.losses
        return difference.mean().item(), (difference.std(correction=0) / len(difference) ** 0.5).item()

    def as_dict(self) -> dict[str, float]:
        """loss; top1 and agreement in percent, where they exist; images."""
        shares = {"top1": self.correct, "agreement": self.agrees}
        found = {name: 100 * hits.double().mean().item() for name, hits in shares.items() if hits is not None}
        return {"loss": self.loss, **found, "images": len(self.losses)}


Judged = tuple[Tensor, Tensor | None, Tensor | None]  # losses, correct, agrees; see Outcome


@torch.no_grad()
def measure(
    softmax: nn.Module,
    calibrated: Mapping[str, nn.Module],
    assignments: Iterable[Assignment],
    batches: Iterable[Any],
    precision: str = "fp32",
    on_batch: Callable[[int], None] | None = None,
) -> dict[tuple[str, ...], Outcome]:
    """The outcome of every different assignment on the same images, read once; the loss is as in `scan`.

    Raises:
        T5Error: no images, labels with some batches alone, or what `hybrid` refuses.
    """
    one_of(precision, ("fp32", "bf16"), "precision")
    family = family_of(softmax)
    switch, different = _Switch(softmax, calibrated), dict.fromkeys(tuple(a) for a in assignments)
    parts: dict[tuple[str, ...], list[Judged]] = {assignment: [] for assignment in different}
    device, done, kind = next(softmax.parameters()).device, 0, ""
    for batch in batches:
        inputs = placed(family.inputs(batch), device)
        labels = batch[1].to(device) if isinstance(batch, tuple | list) and len(batch) > 1 else None
        before, kind = kind, COSINE if not softmax.num_classes else KL if labels is None else CROSS_ENTROPY
        if before not in ("", kind):
            raise T5Error("some batches have labels and others have none; pass all of them with labels, or all without")
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            reference = family.call(switch((SOFTMAX,) * len(switch.names)), inputs).flatten(1).double()
            for assignment, found in parts.items():
                found.append(
                    _judged(kind, family.call(switch(assignment), inputs).flatten(1).double(), reference, labels)
                )
        done += images_in(inputs)
        if on_batch:
            on_batch(done)
    if not done:
        raise T5Error("there is no image to measure on; pass batches that are not used up")
    return {assignment: _outcome(kind, found) for assignment, found in parts.items()}


def _judged(kind: str, output: Tensor, reference: Tensor, labels: Tensor | None) -> Judged:
    """Of one batch: losses, correct, agrees; see Outcome."""
    if kind == COSINE:
        return 1 - F.cosine_similarity(output, reference, dim=-1), None, None
    top = output.argmax(-1)
    agrees = top == reference.argmax(-1)
    if labels is not None:
        return F.cross_entropy(output, labels, reduction="none"), top == labels, agrees
    given, wanted = output.log_softmax(-1), reference.log_softmax(-1)
    return F.kl_div(given, wanted, reduction="none", log_target=True).sum(-1), None, agrees


def _outcome(kind: str, found: list[Judged]) -> Outcome:
    losses, correct, agrees = zip(*found, strict=True)
    return Outcome(kind, torch.cat(losses).cpu(), _joined(correct), _joined(agrees))


def _joined(column: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in column if part is not None]
    return torch.cat(present).cpu() if present else None


class _Switch:
    """One copy of the softmax model whose attention layers are exchanged in place for those of an assignment."""

    def __init__(self, softmax: nn.Module, calibrated: Mapping[str, nn.Module]):
        self.names = _check(softmax, calibrated, [])
        self.model = copy.deepcopy(softmax).eval()
        self.layers = {(SOFTMAX, name): self.model.get_submodule(name) for name in self.names}
        family_of(self.model).carry_grid(self.model)
        for kind, model in calibrated.items():
            for name in self.names:
                layer = copy.deepcopy(model.get_submodule(name)).eval()
                self.layers[kind, name] = layer

    def __call__(self, assignment: Assignment) -> nn.Module:
        for name, kind in zip(self.names, assignment, strict=True):
            if (kind, name) not in self.layers:
                raise T5Error(f"no calibrated model of kind '{kind}' was passed for {name}")
            self.model.set_submodule(name, self.layers[kind, name])
        return self.model


def _only(layer: int, kind: str, depth: int) -> list[str]:
    return [kind if index == layer else SOFTMAX for index in range(depth)]


def _check(softmax: nn.Module, calibrated: Mapping[str, nn.Module], assignment: Assignment) -> list[str]:
    """Names of the attentions, once all models fit each other; an empty assignment stands for any."""
    family = family_of(softmax)
    family.check_convertible(softmax)
    names = family.attention_names(softmax)
    if assignment and len(assignment) != len(names):
        raise T5Error(f"the assignment names {len(assignment)} layers; this model has {len(names)}")
    for kind in {*assignment} - {SOFTMAX}:
        one_of(kind, calibrated, "layer")
    for kind, model in calibrated.items():
        if TTTConfig().named(kind) is None:
            raise T5Error("calibrated holds 'softmax', which is the first argument; pass the new kinds only")
        wanted = range(len(names)) if not assignment else [i for i, own in enumerate(assignment) if own == kind]
        for name in (names[index] for index in wanted):
            _check_layer(kind, name, model)
    return names


def _check_layer(kind: str, name: str, model: nn.Module) -> None:
    layer = model.get_submodule(name)
    if not isinstance(layer, TTTAttention):
        raise T5Error(f"{name} of the model for '{kind}' is a {type(layer).__name__}; convert and calibrate all layers")
    if layer.mixer.config.inherit == "attention":
        raise T5Error(f"'{kind}' starts its MLPs afresh (inherit: attention), so none of its layers works alone")


def _base(used: Mapping[str, TTTConfig]) -> TTTConfig:
    """The config of which the kinds of a map are variants: the default, or the first layer's that fits all."""
    own = [dataclasses.replace(config, locality=config.convolution) for config in used.values()]
    fits = (b for b in (TTTConfig(), *own) if all(_is_named(kind, b, c) for kind, c in used.items()))
    return next(fits, own[0])


def _is_named(kind: str, base: TTTConfig, config: TTTConfig) -> bool:
    """Whether `kind` stands for `config` in a layer map of `base`."""
    named = base.named(kind)
    return named is not None and not _differing(named, config)


def _check_settings(kind: str, ours: TTTConfig, theirs: TTTConfig) -> None:
    """The layer map says only the kind's name: all else must be the same in every calibrated model."""
    for name in _differing(ours, theirs)[:1]:
        raise T5Error(
            f"the model calibrated as '{kind}' has {name} {getattr(theirs, name)!r}, but in a layer map '{kind}' "
            f"stands for {getattr(ours, name)!r}; convert it with TTTConfig().named('{kind}')"
        )


def _differing(ours: TTTConfig, theirs: TTTConfig) -> list[str]:
    """Settings of a layer that are not the same; what only its first weights came from does not count."""
    names = [field.name for field in dataclasses.fields(TTTConfig) if field.name not in ("layers", "seed", "init_std")]
    return [name for name in names if getattr(ours, name) != getattr(theirs, name)]


def _check_budget(cost: Costs, budget: float) -> None:
    cheapest = math.fsum(min(row.values()) for row in cost)
    if budget < cheapest * (1 - 1e-9) or budget <= 0:
        raise T5Error(
            f"a budget of {budget:.4g} is out of reach: the cheapest assignment costs {cheapest:.4g}; allow that"
        )
