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
import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import t5lib
from t5lib.benchmarks.resolution_sweep import count_flops
from t5lib.benchmarks.timing import describe_device
from t5lib.conversion import convert
from t5lib.data.images import DataConfig
from t5lib.data.in_memory import InMemoryImages, decode
from t5lib.data.shards import ShardSet
from t5lib.families import family_of
from t5lib.families.inputs import ExampleSize
from t5lib.layers.config import SOFTMAX
from t5lib.planning.cost_model import KINDS, Plan, PlanConfig, plan, settings_of, verify
from t5lib.planning.layer_search import choose, compare_rules, fixed_rules, scan, select, total
from t5lib.report import plots
from t5lib.training.calibration import CalibrateConfig
from t5lib.utils.config import AtLeastOne, Several, WholeNumber, from_dict, settings, to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, sha256, write_json
from t5lib.utils.markdown import write_page
from t5lib.utils.progress import progress
from tasks.studies import common, layer_choice_report
from tasks.studies.common import load_or_make
from tasks.studies.layer_choice_report import BY_SUM, SOLVER


@settings
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
        eval_batch_size: images per step of scan and comparison.
    """

    model: str
    train: str
    test: str
    resolution: AtLeastOne
    train_images: AtLeastOne = 4000
    test_images: AtLeastOne = 5000
    scan_images: AtLeastOne = 1000
    kinds: Several[str] = KINDS
    cost: Literal["time", "flops"] = "time"
    budgets: AtLeastOne = 4
    verify: WholeNumber = 8
    shortlist: AtLeastOne = 8
    eval_batch_size: AtLeastOne = 64
    calibrate: CalibrateConfig = Field(default_factory=CalibrateConfig)
    timing: PlanConfig = Field(default_factory=PlanConfig)

    def __post_init__(self):
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
    of_model = resolve_model_data_config(model)
    shared = {name: of_model[name] for name in ("mean", "std", "interpolation", "crop_pct")}
    data = DataConfig(img_size=settings.resolution, num_classes=model.num_classes, **shared)

    def read(where: str, limit: int) -> InMemoryImages:
        file = Path(where)
        if file.suffix != ".safetensors":
            file = decode(ShardSet.read(file), data, work, limit=limit)
        whole = InMemoryImages.load(file, data, device)
        return InMemoryImages(whole.images[:limit], whole.labels[:limit], data)

    train, test = read(settings.train, settings.train_images), read(settings.test, settings.test_images)
    fit = len(train) - settings.scan_images  # so many are left to calibrate on
    if fit < settings.calibrate.batch_size:
        raise T5Error(
            f"{settings.train} gives {len(train)} images, {settings.scan_images} of them for the scan; the rest does "
            f"not make a calibration batch of {settings.calibrate.batch_size}"
        )
    fitted = InMemoryImages(train.images[:fit], train.labels[:fit], data)
    held_out = InMemoryImages(train.images[fit:], train.labels[fit:], data)
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
    softmax = _softmax(settings).to(device)
    times = load_or_make(work / "plan.json", lambda: to_dict(_measured(softmax, settings, device)))
    planned = from_dict(Plan, times, str(work / "plan.json"))
    print(planned.verdict(), flush=True)
    prices = Prices.of(settings.cost, planned, softmax)
    budgets = wanted_budgets(prices.layers, settings.budgets)
    result: dict[str, Any] = {
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
        return load_or_make(work / f"verified-{name}.json", lambda: verify(planned, softmax, maps, device))

    fixed = fixed_maps(planned)[: settings.verify]
    result |= {"verified": verified("fixed", fixed), "seeds": {}}  # before the long work: it may be cut off
    write_json(out.with_suffix(".json"), result)
    images = open_images(settings, softmax, device, work.parent)
    for seed in seeds:
        folder = work / f"seed-{seed}"
        job = _Seed(settings, planned, prices.layers, softmax, images, seed, folder)
        result["seeds"][str(seed)] = load_or_make(folder / "result.json", functools.partial(job.run, budgets))
        write_json(out.with_suffix(".json"), result)
    chosen = chosen_maps(next(iter(result["seeds"].values())), fixed)[: settings.verify - len(fixed)]
    if chosen:  # softmax once more, to be measured beside
        result["verified"] = result["verified"] + verified("chosen", [planned.uniform(SOFTMAX), *chosen])[1:]
    result["summary"] = layer_choice_report.summarize(result)
    write_json(out.with_suffix(".json"), result)
    write_page(out.with_suffix(".md"), layer_choice_report.table(result))
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
        bare, size = copy.deepcopy(softmax), ExampleSize(planned.resolution)
        bare.blocks = nn.Sequential()
        rest = _gflops(bare, size)
        block = {SOFTMAX: (_gflops(softmax, size) - rest) / planned.depth}
        for kind in planned.kinds:
            settings = settings_of(kind)
            near = 4 * softmax.patch_embed.num_patches * softmax.embed_dim * (settings.window or 0) ** 2 / 1e9
            alone = convert(softmax, dataclasses.replace(settings, locality=settings.convolution))
            # `near` by hand: what attends to a neighborhood on the meta device computes every pair and masks most
            block[kind] = (_gflops(alone, size) - rest) / planned.depth + near
        return cls("GFLOPs", [block] * planned.depth, rest)

    def whole(self, blocks: float) -> float:
        """The cost of a model whose blocks cost `blocks` together."""
        return blocks + self.rest


def _gflops(model: nn.Module, size: ExampleSize) -> float:
    return count_flops(model, family_of(model).example_inputs(model, size)) / 1e9


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
    parts, new = {tuple(sorted(assignment)) for assignment in known}, []
    for assignment in first["chosen"]:
        if tuple(sorted(assignment)) not in parts:
            parts.add(tuple(sorted(assignment)))
            new.append(assignment)
    return new


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
        precision = "bf16" if next(self.softmax.parameters()).is_cuda else "fp32"
        table = load_or_make(self.folder / "scan.json", lambda: self._scan(calibrated, precision))
        chosen, rows = [], []
        if budgets:
            increase = table["increase"]
            chosen = load_or_make(
                self.folder / "chosen.json", lambda: self._choose(calibrated, increase, budgets, precision)
            )
            named = [
                {SOLVER: own, BY_SUM: choose(increase, costs, budget), SOFTMAX: self.planned.uniform(SOFTMAX)}
                for own, budget in zip(chosen, budgets, strict=True)
            ]
            with progress(f"seed {self.seed}: compare", self.settings.test_images) as bar:
                batches, models = self.images.test(), (self.softmax, calibrated)
                rows = compare_rules(*models, costs, budgets, named, batches, precision=precision, on_batch=bar.advance)
        return {"calibration_error": errors, "scan": table, "chosen": chosen, "compared": rows}

    def _scan(self, calibrated: dict[str, nn.Module], precision: str) -> dict[str, Any]:
        with progress(f"seed {self.seed}: scan", self.settings.scan_images) as bar:
            return scan(self.softmax, calibrated, self.images.scan(), precision=precision, on_batch=bar.advance)

    def _choose(
        self, calibrated: dict[str, nn.Module], increase: Any, budgets: list[float], precision: str
    ) -> list[list[str]]:
        models, count = (self.softmax, calibrated), self.settings.shortlist
        with progress(f"seed {self.seed}: choose", self.settings.scan_images) as bar:
            batches = self.images.scan()
            return select(
                *models,
                increase,
                self.costs,
                budgets,
                batches,
                count=count,
                precision=precision,
                on_batch=bar.advance,
            )

    def _calibrated(self, kind: str) -> tuple[nn.Module, dict[str, float]]:
        """The calibrated model, and the mean error of its layers before and after."""
        folder, device = self.folder / kind, next(self.softmax.parameters()).device
        if (folder / "calibration.json").is_file():
            return t5lib.load(folder, device), read_json(folder / "calibration.json")
        model = convert(self.softmax, dataclasses.replace(settings_of(kind), seed=self.seed))
        recipe = dataclasses.replace(self.settings.calibrate, seed=self.seed)
        print(f"seed {self.seed}: calibrating {kind}", flush=True)
        batches, partial = self.images.calibrate(self.seed), self.folder / f"{kind}.partial"
        report = t5lib.calibrate(model, teacher=self.softmax, batches=batches, config=recipe, resume_dir=partial)
        if recipe.compile is not False:
            torch.compiler.reset()  # the next kind compiles anew; without this torch soon gives up and runs eager
        errors = {"before": report.error_before, "after": report.error_after}
        means = {moment: statistics.mean(values.values()) for moment, values in errors.items()}
        t5lib.save(model, folder)
        write_json(folder / "calibration.json", means)
        return model.eval(), means


def _softmax(settings: Settings) -> nn.Module:
    model = t5lib.load(settings.model)
    return family_of(model).at_resolution(model, ExampleSize(settings.resolution))


def _measured(softmax: nn.Module, settings: Settings, device: torch.device) -> Plan:
    def tell(timing) -> None:
        blocks = ", ".join(f"{kind} {ms:.4g}" for kind, ms in timing.block_ms.items())
        print(f"{timing.resolution} px: ms a block: {blocks}; all else {timing.rest_ms:.4g}", flush=True)

    return plan(softmax, settings.resolution, device, settings.kinds, settings.timing, on_timing=tell)


def _fingerprint(settings: Settings, device: torch.device) -> str:
    weights = sha256(Path(settings.model) / "model.safetensors")  # a source may be trained anew at the same place
    return common.checksum([to_dict(settings), weights, describe_device(device), torch.__version__])


def main() -> None:
    arguments = _parser().parse_args()
    plain = ("model", "train", "test", "resolution", "train_images", "test_images", "scan_images", "budgets", "verify")
    recipe = {name: getattr(arguments, name) for name in ("steps", "batch_size", "compile")}
    with common.reported("layer_choice"):
        settings = Settings(
            **{name: getattr(arguments, name) for name in (*plain, "cost", "shortlist", "eval_batch_size")},
            kinds=tuple(arguments.kinds),
            calibrate=CalibrateConfig(**recipe),
            timing=PlanConfig(
                batch=arguments.batch, repeats=arguments.repeats, graphs=False if arguments.no_graphs else None
            ),
        )
        device = torch.device(arguments.device)
        result = run(settings, arguments.seeds, arguments.out, arguments.work, device)
        print(layer_choice_report.table(result))


PLAIN_OPTIONS = {
    "scan_images": "training images kept from calibration, to choose on",
    "budgets": "wanted costs, spread between softmax and the cheapest map",
    "verify": "most whole models to measure",
    "shortlist": "the solver's best maps that are measured before one is chosen",
    "eval_batch_size": "images per step of scan and comparison",
}


def _parser() -> argparse.ArgumentParser:
    parser = common.parser("layer_choice", __doc__)
    parser.add_argument("model", help="folder of a saved softmax model")
    for name, text in (("train", "to calibrate and choose on"), ("test", "for the last comparison")):
        parser.add_argument(f"--{name}", required=True, help=f"manifest of shards, or decoded images, {text}")
        usual = getattr(Settings, f"{name}_images")
        parser.add_argument(f"--{name}-images", type=int, default=usual, help="use at most this many of them")
    parser.add_argument("--resolution", type=int, required=True, help="side of the images in pixels")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="seeds of calibration; every seed makes a choice of its own"
    )
    parser.add_argument(
        "--kinds", nargs="+", default=list(KINDS), help="new layers to choose from, as convert.layers names them"
    )
    parser.add_argument("--cost", choices=["time", "flops"], default=Settings.cost, help="what a budget counts")
    for name, text in PLAIN_OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Settings, name), help=text)
    parser.add_argument("--batch", type=int, default=8, help="images in a timed pass")
    parser.add_argument("--repeats", type=int, default=30, help="timed passes")
    parser.add_argument("--no-graphs", action="store_true", help="time without CUDA graphs")
    parser.add_argument("--steps", type=int, default=CalibrateConfig.steps, help="steps of calibration for each kind")
    parser.add_argument(
        "--batch-size", type=int, default=CalibrateConfig.batch_size, help="images per step of calibration"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the calibration step")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="device that all of it runs on")
    parser.add_argument("--out", type=Path, required=True, help="path of the .json, .md and .png, with no file ending")
    parser.add_argument("--work", type=Path, default=Path("data/scratch/plan"), help="where partial work is kept")
    return parser


if __name__ == "__main__":
    main()
