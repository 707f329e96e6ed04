"""One self-contained HTML page, and a short Markdown summary, of what a conversion did to quality and speed."""

import math
from dataclasses import dataclass, field
from typing import Any

import jinja2
import yaml
from matplotlib.figure import Figure

from t5lib import explanation_plots, plots
from t5lib.benchmark import break_even_sentence, cost_ratios
from t5lib.data import DataConfig
from t5lib.errors import T5Error
from t5lib.reading import explanation_reading

THIN, MINUS = "\u202f", "\u2212"
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class _Model:
    """A row of the table. `trained_by`: the stages whose time made it, counted from the source classifier on."""

    key: str
    label: str
    what: str
    colour: str
    trained_by: tuple[str, ...] = ()

    @property
    def softmax(self) -> bool:
        return self.colour == plots.SOFTMAX


MODELS = (
    _Model("source", "Source", "softmax, the classifier that is converted", plots.SOFTMAX),
    _Model("converted", "Converted", "T5, nothing trained yet", plots.T5_PALE),
    _Model("calibrated", "Calibrated", "T5, attention transfer, no labels", plots.T5_LIGHT, ("calibrate",)),
    _Model("frozen", "Freeze protocol", "T5, only new parameters trained", plots.T5_LIGHT, ("calibrate", "freeze")),
    _Model("finetuned", "Fine-tuned", "T5, all parameters trained", plots.T5, ("calibrate", "finetune")),
    _Model("control", "Control", "softmax, fine-tuned with the same budget", plots.SOFTMAX, ("control",)),
)
RUNS = {
    "control": ("control", plots.SOFTMAX),
    "freeze": ("freeze", plots.T5_LIGHT),
    "finetune": ("fine-tune", plots.T5),
}


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything the report tells, as the stages wrote it.

    Attributes:
        target: its name in params.yaml.
        metrics: by stage; convert, calibrate, finetune and evaluate are needed, the others may be absent.
        histories: by stage, the points of its curve; empty or absent where there is none.
        account: names of the inherited, new and dropped parameters.
        description: t5.json of the fine-tuned model.
        data: how its images are prepared.
        shift: layers, shift_ratio and random_init of `diagnose`, if it ran.
        explanation: what `explain` found (t5lib.explanation, as dictionary), if it ran.
        maps: its attention maps, PNG files' content.
        benchmark: the result of t5lib.benchmark.benchmark, if it ran.
        parameters: resolved settings by section.
        provenance: what else identifies the run, by label: versions, device, commit, date.
    """

    target: str
    metrics: dict[str, dict[str, Any]]
    histories: dict[str, list[dict[str, float]]]
    account: dict[str, list[str]]
    description: dict[str, Any]
    data: DataConfig
    shift: dict[str, Any] | None = None
    explanation: dict[str, Any] | None = None
    maps: tuple[bytes, ...] = ()
    benchmark: dict[str, Any] | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        absent = [stage for stage in ("convert", "calibrate", "finetune", "evaluate") if stage not in self.metrics]
        if absent:
            raise T5Error(
                f"the report of '{self.target}' needs the metrics of {', '.join(absent)}; run these stages first"
            )
        absent = [key for key in ("source", "finetuned") if key not in self.evaluated]
        if absent:
            raise T5Error(f"evaluate measured {', '.join(self.evaluated)}; the report also needs {', '.join(absent)}")

    @property
    def evaluated(self) -> dict[str, dict[str, float]]:
        return self.metrics["evaluate"]["models"]


def html(data: ReportData) -> str:
    """The page: no script, font or picture from elsewhere; pictures are SVG inside it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("t5lib"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        count=count, short=short, percent=percent, signed=signed, number=significant, conditions=conditions
    )
    return environment.get_template("report.html.j2").render(
        data=data,
        colours=plots,
        rows=model_rows(data),
        images=data.evaluated["finetuned"]["n"],
        headline=headline(data),
        tiles=_tiles(data),
        figures={name: plots.data_uri(figure) for name, figure in _figures(data).items()},
        maps=[plots.png_uri(content) for content in data.maps],
        explained=explanation_reading(data.explanation) if data.explanation else [],
        shift_reading=_shift_reading(data),
        calibration_reading=_calibration_reading(data),
        speed=_speed_rows(data),
        snippet=loading_snippet(data),
        parameters=yaml.safe_dump(data.parameters, sort_keys=False, allow_unicode=True),
    )


def summary(data: ReportData) -> str:
    """The table and a few lines, in Markdown."""
    rows, images = model_rows(data), data.evaluated["finetuned"]["n"]
    columns = {"top-1": "top1", "top-5": "top5", "agrees with source": "agreement"}
    columns = {title: key for title, key in columns.items() if any(row[key] is not None for row in rows)}
    lines = [
        f"# {data.target}: {data.description['architecture']} with linear-cost attention",
        "",
        f"| model | {' | '.join(columns)} | training |",
        f"|---|{'--:|' * (len(columns) + 1)}",
    ]
    for row in rows:
        values = [percent(row[key]) for key in columns.values()]
        kind = "softmax" if row["softmax"] else "T5"
        lines.append(f"| {row['label']} ({kind}) | {' | '.join(values)} | {row['time']} |")
    lines += ["", *(f"- {line}" for line in headline(data))]
    if data.benchmark:
        lines[-1] += f" Measured on {conditions(data.benchmark)}."
    numbers = data.metrics["convert"]
    lines += [
        f"- {short(numbers['inherited'])} parameters inherited, {short(numbers['new'])} new, "
        f"{short(numbers['dropped'])} dropped, in {numbers['layers']} converted layers.",
        f"- ± is one binomial standard error on {count(images)} images; one seed.",
    ]
    return "\n".join(lines) + "\n"


def headline(data: ReportData) -> list[str]:
    """Quality kept, what calibration alone gives, and speed on this device: one sentence each, as far as known."""
    models, tuned = data.evaluated, data.evaluated["finetuned"]
    sentence = f"Fine-tuned, the converted model gets {percent(tuned['top1'])} of {count(tuned['n'])} test images right"
    if "control" in models:
        gap, error = difference(tuned, models["control"])
        sentence += (
            f"; the softmax original, fine-tuned with the same budget, {percent(models['control']['top1'])} "
            f"({signed(gap)} ± {error:.1f} points)"
        )
    else:
        sentence += f"; the softmax source {percent(models['source']['top1'])}"
    sentences = [sentence + "."]
    if "calibrated" in models:
        sentences.append(
            f"Calibrated only, before any fine-tune and without labels: {percent(models['calibrated']['top1'])} "
            f"(source {percent(models['source']['top1'])})."
        )
    if data.benchmark:
        sentences.append(break_even_sentence(data.benchmark))
    return sentences


def model_rows(data: ReportData) -> list[dict[str, Any]]:
    """The rows of the main table, in the order of the pipeline; None for what is not known."""
    numbers, rows = data.metrics["convert"], []
    for model in (model for model in MODELS if model.key in data.evaluated):
        result = data.evaluated[model.key]
        times = [data.metrics.get(stage, {}).get("seconds") for stage in model.trained_by]
        rows.append(
            {
                "label": model.label,
                "what": model.what,
                "colour": model.colour,
                "softmax": model.softmax,
                "final": model.key == "finetuned",
                "top1": result["top1"],
                "error": standard_error(result),
                "top5": result.get("top5"),
                "agreement": result.get("agreement"),
                "new": 0 if model.softmax else numbers["new"],
                "inherited": numbers["inherited"] + (numbers["dropped"] if model.softmax else 0),
                "time": "–" if None in times or not times else duration(sum(times)),
            }
        )
    return rows


def standard_error(result: dict[str, float]) -> float:
    """One binomial standard error of result["top1"], in points: sqrt(p (100 - p) / n)."""
    return math.sqrt(result["top1"] * (100 - result["top1"]) / result["n"])


def difference(ours: dict[str, float], theirs: dict[str, float]) -> tuple[float, float]:
    """Difference of top-1 in points, and a standard error as if the models had seen different images.

    They see the same ones, which makes the true error of the difference smaller.
    """
    return ours["top1"] - theirs["top1"], math.hypot(standard_error(ours), standard_error(theirs))


def _tiles(data: ReportData) -> list[dict[str, str]]:
    models, tuned = data.evaluated, data.evaluated["finetuned"]
    error = standard_error(tuned)
    tiles = [_tile(percent(tuned["top1"]), "top-1, T5 fine-tuned", f"± {error:.1f} on {count(tuned['n'])} images")]
    if "control" in models:
        gap, error = difference(tuned, models["control"])
        tiles.append(
            _tile(signed(gap), "points against control", f"± {error:.1f}; control {percent(models['control']['top1'])}")
        )
    if "calibrated" in models:
        source = percent(models["source"]["top1"])
        tiles.append(_tile(percent(models["calibrated"]["top1"]), "calibrated, no labels", f"source {source}"))
    if data.benchmark:
        tokens, ratio = cost_ratios(data.benchmark["rows"])[-1]
        found = data.benchmark["break_even_tokens"]
        note = f"faster from {count(found)} tokens on" if found else "slower than softmax at this size"
        tiles.append(_tile(f"{1 / ratio:.2f}×", f"softmax speed, {count(tokens)} tokens", note))
    return tiles


def _tile(value: str, label: str, note: str) -> dict[str, str]:
    return {"value": value, "label": label, "note": note}


def _figures(data: ReportData) -> dict[str, Figure]:
    bars = [row | {"label": row["label"].lower()} for row in model_rows(data)]
    figures = {"quality": plots.quality_bars(bars)}
    if data.shift:
        figures["shift"] = plots.shift_ratio_map(**{k: data.shift[k] for k in ("layers", "shift_ratio", "random_init")})
    if errors := _layer_errors(data):
        figures["layers"] = plots.layer_errors(*errors)
    if data.explanation:
        figures |= {f"explain-{name}": figure for name, figure in explanation_plots.curves(data.explanation).items()}
    if data.histories.get("calibrate"):
        figures["calibration"] = plots.calibration_curve(data.histories["calibrate"])
    runs = {label: (data.histories[run], colour) for run, (label, colour) in RUNS.items() if data.histories.get(run)}
    if runs:
        histories, colours = ({label: run[part] for label, run in runs.items()} for part in (0, 1))
        figures["training"] = plots.training_curves(histories, colours)
    if bench := data.benchmark:
        figures["speed"] = plots.speed_curves(bench["rows"], bench["break_even_tokens"])
        figures["flops"] = plots.flops_curves(bench["rows"], bench["break_even_tokens_flops"])
    return figures


def _layer_errors(data: ReportData) -> tuple[list[str], list[float], list[float]] | None:
    """Layers, error before and error after, where calibrate gave both for each layer."""
    metrics, prefix = data.metrics["calibrate"], "error_after."
    layers = [key.removeprefix(prefix) for key in metrics if key.startswith(prefix)]
    if not layers or any(f"error_before.{layer}" not in metrics for layer in layers):
        return None
    return layers, [metrics[f"error_before.{layer}"] for layer in layers], [metrics[prefix + layer] for layer in layers]


def _shift_reading(data: ReportData) -> str | None:
    found = data.metrics.get("diagnose")
    if not found:
        return None
    mean, control = found["mean_shift_ratio"], found["mean_shift_ratio_random_init"]
    figures = (
        f"{mean:.2f} on average ({found['min']:.2f} to {found['max']:.2f}), against {control:.2f} with random weights"
    )
    norm = (data.description.get("t5") or {}).get("key_norm", "none")
    remedy = "takes that shift away" if norm in ("instance", "instance_no_std") else "does not take that shift away"
    if mean < 1.5 * control:
        return (
            f"Here the ratio is {figures}: hardly more than chance gives, so this model's keys need little correction."
        )
    return (
        f"Here the ratio is {figures}: pretraining has put a common shift into the keys. "
        f"The key norm used, {norm}, {remedy}."
    )


def _calibration_reading(data: ReportData) -> str:
    found = data.metrics["calibrate"]
    text = (
        f"In {count(found['steps'])} steps ({duration(found['seconds'])}) the mean error of the new layers fell from "
        f"{significant(found['error_before'])} to {significant(found['error_after'])} of the variance"
    )
    if errors := _layer_errors(data):
        ranked = sorted(zip(errors[2], errors[0], strict=True))
        (least, best), (most, worst) = ranked[0], ranked[-1]
        text += f"; {best} is fitted best ({significant(least)}), {worst} worst ({significant(most)})"
    return text + "."


def _speed_rows(data: ReportData) -> list[dict[str, Any]]:
    """One row a resolution, softmax and T5 side by side, as text with the same decimals down each pair of columns."""
    bench = data.benchmark["rows"] if data.benchmark else []
    sides = {(row["resolution"], row["model"]): row for row in bench}
    keys = [key for key in ("ms", "images_per_second", "gflops", "peak_mib") if bench and bench[0][key] is not None]
    digits = {key: decimals(min(row[key] for row in bench)) for key in keys}
    rows = []
    for resolution in sorted({row["resolution"] for row in bench}):
        softmax, t5 = sides[resolution, "softmax"], sides[resolution, "t5"]
        pairs = {key: [f"{row[key]:,.{digits[key]}f}" for row in (softmax, t5)] for key in keys}
        rows.append(pairs | {"resolution": resolution, "tokens": t5["tokens"], "speedup": softmax["ms"] / t5["ms"]})
    return rows


def conditions(bench: dict[str, Any]) -> str:
    """What a benchmark's times hold for."""
    compiled = "with torch.compile" if bench["compile"] else "without torch.compile"
    return f"{bench['device']}, in {bench['dtype']}, batch {bench['batch']}, {compiled}"


def loading_snippet(data: ReportData) -> str:
    """Python that loads the fine-tuned model and classifies a picture."""
    settings = {key: value for key, value in vars(data.data).items() if key not in ("workers", "eval_batch_size")}
    arguments = "".join(f"    {key}={value!r},\n" for key, value in settings.items())
    return (
        "import torch\n"
        "from PIL import Image\n\n"
        "import t5lib\n"
        "from t5lib.data import DataConfig, transform\n\n"
        f'model = t5lib.load("data/out/{data.target}/finetune")  # device="cuda" for a GPU\n'
        f"prepare = transform(DataConfig(\n{arguments}))\n"
        'image = prepare(Image.open("picture.png").convert("RGB"))\n'
        "with torch.inference_mode():\n"
        "    probabilities = model(image[None]).softmax(-1)[0]\n"
        "print(probabilities.argmax().item(), probabilities.max().item())\n"
    )


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}{THIN}%"


def signed(value: float) -> str:
    """-1.9 with a true minus sign, +0.4."""
    return f"{value:+.1f}".replace("-", MINUS)


def significant(value: float) -> str:
    """Three significant figures; very small values as 3.8×10⁻⁷."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    if abs(value) < 1e-4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}×10{str(int(exponent)).translate(SUPERSCRIPT)}"
    return f"{value:,.{decimals(value)}f}"


def decimals(value: float) -> int:
    """Digits behind the point that show three significant figures of `value`."""
    return max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0


def count(value: int) -> str:
    return f"{value:,}"


def short(value: int) -> str:
    """1,325,000 as 1.33 M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{significant(value / size)}{THIN}{unit}"
    return str(value)


def duration(seconds: float) -> str:
    """43 s, 2 min 46 s, 1 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}{THIN}s"
    if seconds < 3600:
        return f"{seconds // 60}{THIN}min {seconds % 60:02d}{THIN}s"
    return f"{seconds // 3600}{THIN}h {seconds % 3600 // 60:02d}{THIN}min"
