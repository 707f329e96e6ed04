"""Plan and layer choice put to the test on one model: predicted against measured time, the solver against fixed rules.

    python -m tasks.studies.layer_choice data/out/dinov2-fashion/source --train data/fashion-mnist/train.json \\
        --test data/fashion-mnist/val.json --resolution 518 --seeds 0 1 --out docs/results/plan-dinov2-s

writes OUT.json, OUT.md and OUT.png. The time is measured once. For every seed all kinds are calibrated, each layer is
scanned and the maps are chosen on images held out of the training images; the test images are for the last comparison
only. What was finished is kept in --work and not done again. Needs neither Prefect, DVC nor MLflow.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import t5lib
from t5lib.benchmarks.resolution_sweep import at_resolution, count_flops, describe_device
from t5lib.conversion import convert
from t5lib.layers.config import SOFTMAX, TTTConfig
from t5lib.planning.cost_model import KINDS, Plan, PlanConfig, plan, verify
from t5lib.planning.layer_search import choose, compare_rules, fixed_rules, scan, select, total
from t5lib.report import plots
from t5lib.training.calibration import CalibrateConfig
from t5lib.utils.config import from_dict, one_of, to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, sha256, write_json, write_text
from t5lib.utils.progress import progress
from tasks.studies import layer_choice_report
from tasks.studies.layer_choice_report import BY_SUM, SOLVER


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is planned and how; every value decides about the result, apart from `seeds`.

    Attributes:
        model: folder of a saved softmax model.
        train, test: manifests of shards, or files of t5lib.data.in_memory.decode at this resolution.
        train_images, test_images: at most so many are used.
        scan_images: of the training images, kept from calibration and used to choose.
        resolution: side in pixels.
        kinds: new layers considered.
        cost: what a budget is of: "time" as measured here, or "flops", the same on every device, for a size at which no
            kind is faster yet.
        budgets: how many wanted costs, spread between softmax and the cheapest map.
        verify: at most so many whole models are measured.
        shortlist: the solver's best maps that are measured as whole models before one is chosen.
        eval_batch_size: images a step of scan and comparison.
    """

    model: str
    train: str
    test: str
    resolution: int
    train_images: int = 4000
    test_images: int = 5000
    scan_images: int = 1000
    kinds: tuple[str, ...] = KINDS
    cost: str = "time"
    budgets: int = 4
    verify: int = 8
    shortlist: int = 8
    eval_batch_size: int = 64
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    timing: PlanConfig = field(default_factory=PlanConfig)

    def __post_init__(self):
        one_of(self.cost, ("time", "flops"), "cost")
        for name in ("budgets", "shortlist", "scan_images", "eval_batch_size", "test_images"):
            if getattr(self, name) < 1:
                raise T5Error(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.scan_images >= self.train_images:
            raise T5Error(
                f"scan_images is {self.scan_images} of {self.train_images} training images; none would be left to "
                "calibrate on"
            )


@dataclass(frozen=True)
class Images:
    """Batches (images (B, 3, H, W), labels (B,)).

    Attributes:
        calibrate: from a seed to a function from a batch number to endless batches (t5lib.data.batches).
        scan, test: each image once, read anew at every call.
    """

    calibrate: Callable[[int], Callable[[int], Iterator[tuple[Tensor, Tensor]]]]
    scan: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    test: Callable[[], Iterator[tuple[Tensor, Tensor]]]


def open_images(settings: Settings, model: nn.Module, device: torch.device, work: Path) -> Images:
    """The images as `model` wants them. All access to data is here.

    Raises:
        T5Error: too few images.
    """
    from t5lib.data.images import DataConfig
    from t5lib.data.in_memory import InMemoryImages, decode
    from t5lib.data.shards import ShardSet

    found = resolve_model_data_config(model)
    shared = {name: found[name] for name in ("mean", "std", "interpolation", "crop_pct")}
    data = DataConfig(img_size=settings.resolution, num_classes=model.num_classes, **shared)

    def read(where: str, limit: int) -> InMemoryImages:
        file = Path(where)
        if file.suffix != ".safetensors":
            file = decode(ShardSet.read(file), data, work, limit=limit)
        whole = InMemoryImages.load(file, data, device)
        return InMemoryImages(whole.images[:limit], whole.labels[:limit], data)

    train, test = read(settings.train, settings.train_images), read(settings.test, settings.test_images)
    kept = len(train) - settings.scan_images
    if kept < settings.calibrate.batch_size:
        raise T5Error(
            f"{settings.train} gives {len(train)} images, {settings.scan_images} of them for the scan; the rest does "
            f"not make a calibration batch of {settings.calibrate.batch_size}"
        )
    fitted = InMemoryImages(train.images[:kept], train.labels[:kept], data)
    held_out = InMemoryImages(train.images[kept:], train.labels[kept:], data)
    return Images(
        calibrate=lambda seed: fitted.batches(settings.calibrate.batch_size, seed=seed, hflip=0.5),
        scan=lambda: held_out.eval_batches(settings.eval_batch_size),
        test=lambda: test.eval_batches(settings.eval_batch_size),
    )


def run(settings: Settings, seeds: list[int], out: Path, work: Path, device: torch.device) -> dict[str, Any]:
    """Measure, verify, calibrate, scan, choose and compare, and write `out`.json, .md and .png.

    `out`.json is there from the first verified times on, without "summary" until all is done.
    """
    work = work / _fingerprint(settings, device)
    softmax = at_resolution(t5lib.load(settings.model), settings.resolution).to(device)
    kept = _kept(work / "plan.json", lambda: to_dict(_measured(softmax, settings, device)))
    planned = from_dict(Plan, kept, str(work / "plan.json"))
    print(planned.verdict(), flush=True)
    prices = Prices.of(settings.cost, planned, softmax)
    budgets = wanted_budgets(prices.layers, settings.budgets)
    result = {
        "model": settings.model,
        "device": describe_device(device),
        "torch": torch.__version__,
        "settings": to_dict(settings),
        "plan": planned.as_dict(),
        "unit": prices.unit,
        "rest": prices.rest,
        "softmax_cost": prices.whole(total(prices.layers, planned.uniform(SOFTMAX))),
        "budgets": [{"blocks": blocks, "cost": prices.whole(blocks)} for blocks in budgets],
    }

    def verified(name: str, maps: list[list[str]]) -> list[dict[str, Any]]:
        return _kept(work / f"verified-{name}.json", lambda: verify(planned, softmax, maps, device))

    fixed = fixed_maps(planned)[: settings.verify]
    result |= {"verified": verified("fixed", fixed), "seeds": {}}  # before the long work: it may be cut off
    write_json(out.with_suffix(".json"), result)
    images = open_images(settings, softmax, device, work.parent)
    for seed in seeds:
        folder = work / f"seed-{seed}"
        job = _Seed(settings, planned, prices.layers, softmax, images, seed, folder)
        result["seeds"][str(seed)] = _kept(folder / "result.json", lambda job=job: job.run(budgets))
        write_json(out.with_suffix(".json"), result)
    chosen = chosen_maps(next(iter(result["seeds"].values())), fixed)[: settings.verify - len(fixed)]
    if chosen:  # softmax once more, to be measured beside
        result["verified"] = result["verified"] + verified("chosen", [planned.uniform(SOFTMAX), *chosen])[1:]
    result["summary"] = layer_choice_report.summarize(result)
    write_json(out.with_suffix(".json"), result)
    write_text(out.with_suffix(".md"), layer_choice_report.table(result))
    plots.save(layer_choice_report.picture(result), out.with_suffix(".png"))
    return result


@dataclass(frozen=True)
class Prices:
    """What layer maps cost: `layers`, of each layer's block by kind, and `rest`, of all else, in `unit`."""

    unit: str
    layers: list[dict[str, float]]
    rest: float

    @classmethod
    def of(cls, cost: str, planned: Plan, softmax: nn.Module) -> "Prices":
        """Milliseconds a pass as `planned`, or GFLOPs an image, counted (a multiply-add is 2)."""
        if cost == "time":
            return cls("ms", planned.block_costs(), planned.timing.rest_ms)
        bare = copy.deepcopy(softmax)
        bare.blocks = nn.Sequential()
        rest = _gflops(bare)
        block = {SOFTMAX: (_gflops(softmax) - rest) / planned.depth}
        for kind in planned.kinds:
            settings = TTTConfig().named(kind)
            near = 4 * softmax.patch_embed.num_patches * softmax.embed_dim * (settings.window or 0) ** 2 / 1e9
            alone = convert(softmax, dataclasses.replace(settings, locality=settings.convolution))
            block[kind] = (_gflops(alone) - rest) / planned.depth + near  # what runs on the meta device masks more
        return cls("GFLOPs", [block] * planned.depth, rest)

    def whole(self, blocks: float) -> float:
        """The cost of a model whose blocks cost `blocks` together."""
        return blocks + self.rest


def _gflops(model: nn.Module) -> float:
    return count_flops(model, torch.zeros(1, model.in_chans, *model.patch_embed.img_size)) / 1e9


def wanted_budgets(costs: list[dict[str, float]], count: int) -> list[float]:
    """Costs of all blocks: each what some number of the cheapest kind's layers brings, so that a fixed rule can use all
    of it. None where no kind is cheaper than softmax."""
    depth, kind = len(costs), min((kind for kind in costs[0] if kind != SOFTMAX), key=costs[0].__getitem__)
    if costs[0][kind] >= costs[0][SOFTMAX]:
        return []
    converted = sorted({max(1, round(depth * (index + 1) / (count + 1))) for index in range(count)})
    return [total(costs, fixed_rules(depth, number, kind)["first"]) for number in converted]


def fixed_maps(planned: Plan) -> list[list[str]]:
    """Assignments whose time is checked whatever is chosen: softmax, each kind in all layers, one in every second."""
    mixed = fixed_rules(planned.depth, max(1, planned.depth // 2), planned.kinds[0])["evenly spaced"]
    return [*(planned.uniform(kind) for kind in (SOFTMAX, *planned.kinds)), mixed]


def chosen_maps(first: dict[str, Any], known: list[list[str]]) -> list[list[str]]:
    """What the solver chose; none of like parts twice, or like a known one."""
    seen, found = {tuple(sorted(assignment)) for assignment in known}, []
    for assignment in first["chosen"]:
        if tuple(sorted(assignment)) not in seen:
            seen.add(tuple(sorted(assignment)))
            found.append(assignment)
    return found


@dataclass(frozen=True)
class _Seed:
    """One seed's calibrated models, scan and choices."""

    settings: Settings
    planned: Plan
    costs: list[dict[str, float]]
    softmax: nn.Module
    images: Images
    seed: int
    folder: Path

    def run(self, budgets: list[float]) -> dict[str, Any]:
        costs, calibrated, errors = self.costs, {}, {}
        for kind in self.planned.kinds:
            calibrated[kind], errors[kind] = self._calibrated(kind)
        how = {"precision": "bf16" if next(self.softmax.parameters()).is_cuda else "fp32"}
        table = _kept(self.folder / "scan.json", lambda: self._scan(calibrated, how))
        chosen, rows = [], []
        if budgets:
            increase = table["increase"]
            chosen = _kept(self.folder / "chosen.json", lambda: self._choose(calibrated, increase, budgets, how))
            named = [
                {SOLVER: own, BY_SUM: choose(increase, costs, budget), SOFTMAX: self.planned.uniform(SOFTMAX)}
                for own, budget in zip(chosen, budgets, strict=True)
            ]
            with progress(f"seed {self.seed}: compare", self.settings.test_images) as bar:
                batches, models = self.images.test(), (self.softmax, calibrated)
                rows = compare_rules(*models, costs, budgets, named, batches, on_batch=bar.advance, **how)
        return {"calibration_error": errors, "scan": table, "chosen": chosen, "compared": rows}

    def _scan(self, calibrated: dict[str, nn.Module], how: dict[str, str]) -> dict[str, Any]:
        with progress(f"seed {self.seed}: scan", self.settings.scan_images) as bar:
            return scan(self.softmax, calibrated, self.images.scan(), on_batch=bar.advance, **how)

    def _choose(
        self, calibrated: dict[str, nn.Module], increase: Any, budgets: list[float], how: dict[str, str]
    ) -> list[list[str]]:
        models, count = (self.softmax, calibrated), self.settings.shortlist
        with progress(f"seed {self.seed}: choose", self.settings.scan_images) as bar:
            batches = self.images.scan()
            return select(*models, increase, self.costs, budgets, batches, count=count, on_batch=bar.advance, **how)

    def _calibrated(self, kind: str) -> tuple[nn.Module, dict[str, float]]:
        """The calibrated model, and the mean error of its layers before and after."""
        folder, device = self.folder / kind, next(self.softmax.parameters()).device
        if (folder / "calibration.json").is_file():
            return t5lib.load(folder, device), read_json(folder / "calibration.json")
        model = convert(self.softmax, dataclasses.replace(TTTConfig().named(kind), seed=self.seed))
        recipe = dataclasses.replace(self.settings.calibrate, seed=self.seed)
        print(f"seed {self.seed}: calibrating {kind}", flush=True)
        batches, partial = self.images.calibrate(self.seed), self.folder / f"{kind}.partial"
        report = t5lib.calibrate(model, teacher=self.softmax, batches=batches, config=recipe, resume_dir=partial)
        if recipe.compile:
            torch.compiler.reset()  # the next kind compiles anew; without this torch soon gives up and runs eager
        errors = {"before": report.error_before, "after": report.error_after}
        found = {moment: statistics.mean(values.values()) for moment, values in errors.items()}
        t5lib.save(model, folder)
        write_json(folder / "calibration.json", found)
        return model.eval(), found


def _measured(softmax: nn.Module, settings: Settings, device: torch.device) -> Plan:
    def tell(timing) -> None:
        blocks = ", ".join(f"{kind} {ms:.4g}" for kind, ms in timing.block_ms.items())
        print(f"{timing.resolution} px: ms a block: {blocks}; all else {timing.rest_ms:.4g}", flush=True)

    return plan(softmax, settings.resolution, device, settings.kinds, settings.timing, on_timing=tell)


def _kept(file: Path, make: Callable[[], Any]) -> Any:
    """What `file` holds, made and written first if there is none."""
    if not file.is_file():
        write_json(file, make())
    return read_json(file)


def _fingerprint(settings: Settings, device: torch.device) -> str:
    weights = sha256(Path(settings.model) / "model.safetensors")  # a source may be trained anew at the same place
    about = [to_dict(settings), weights, describe_device(device), torch.__version__]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.studies.layer_choice", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a saved softmax model")
    for name, text in (("train", "to calibrate and choose on"), ("test", "for the last comparison")):
        parser.add_argument(f"--{name}", required=True, help=f"manifest of shards, or decoded images, {text}")
        parser.add_argument(f"--{name}-images", type=int, default=getattr(Settings, f"{name}_images"))
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--cost", choices=["time", "flops"], default=Settings.cost, help="what the budgets are of")
    for name in ("scan-images", "budgets", "verify", "shortlist", "eval-batch-size"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings, name.replace("-", "_")))
    parser.add_argument("--batch", type=int, default=8, help="images a timed pass")
    parser.add_argument("--repeats", type=int, default=30, help="timed passes")
    parser.add_argument("--no-graphs", action="store_true", help="time without CUDA graphs")
    parser.add_argument("--steps", type=int, default=CalibrateConfig.steps, help="of calibration, for each kind")
    parser.add_argument("--batch-size", type=int, default=CalibrateConfig.batch_size, help="images a calibration step")
    parser.add_argument("--compile", action="store_true", help="torch.compile the calibration step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, help="where the .json, .md and .png go, without ending")
    parser.add_argument("--work", type=Path, default=Path("data/scratch/plan"))
    given = parser.parse_args()
    plain = ("model", "train", "test", "resolution", "train_images", "test_images", "scan_images", "budgets", "verify")
    try:
        settings = Settings(
            **{name: getattr(given, name) for name in (*plain, "cost", "shortlist", "eval_batch_size")},
            kinds=tuple(given.kinds),
            calibrate=CalibrateConfig(steps=given.steps, batch_size=given.batch_size, compile=given.compile),
            timing=PlanConfig(batch=given.batch, repeats=given.repeats, graphs=False if given.no_graphs else None),
        )
        result = run(settings, given.seeds, given.out, given.work, torch.device(given.device))
    except T5Error as error:
        sys.exit(f"plan: {error}")
    print(layer_choice_report.table(result))


if __name__ == "__main__":
    main()
