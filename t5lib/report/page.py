"""One self-contained HTML page, and a short Markdown summary, of what a conversion did to quality and speed."""

from typing import Any

import jinja2
import yaml
from matplotlib.figure import Figure

from t5lib.analysis.summary_text import explanation_reading
from t5lib.benchmarks.resolution_sweep import break_even_sentence
from t5lib.report import explanation_plots, plots, theme
from t5lib.report.common import RUNS, Quality, conditions, count, decimals, duration, short, significant, speed_tile
from t5lib.report.data import ReportData
from t5lib.utils.markdown import table


def html(data: ReportData, quality: Quality) -> str:
    """The page: no script, font or picture from elsewhere; pictures are SVG inside it.

    Args:
        quality: the part that depends on the kind of model, of t5lib.report.classifier or t5lib.report.denoiser.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("t5lib.report", "template"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        count=count, short=short, number=significant, conditions=conditions, variable=theme.variable
    )
    return environment.get_template("report.html.j2").render(
        data=data,
        colours={"light": theme.css(dark=False), "dark": theme.css(dark=True)},
        quality=quality,
        headline=headline(data, quality),
        tiles=[*quality.tiles, *([speed_tile(data.benchmark)] if data.benchmark else [])],
        figures={name: theme.drawing(plots.svg(figure)) for name, figure in (quality.figures | _figures(data)).items()},
        samples=data.samples and theme.photograph(data.samples),
        maps=[theme.photograph(content) for content in data.maps],
        explained=explanation_reading(data.explanation) if data.explanation else [],
        shift_reading=_shift_reading(data),
        calibration_reading=_calibration_reading(data),
        softmax_choice=_softmax_choice(data),
        alignment_reading=_alignment_reading(data),
        speed=_speed_rows(data),
        parameters=yaml.safe_dump(data.parameters, sort_keys=False, allow_unicode=True),
    )


def summary(data: ReportData, quality: Quality) -> str:
    """The table and a few lines, in Markdown."""
    titles = [title.replace("\n", " ") for title in quality.columns]
    columns = [title[:1].lower() + title[1:] if title[1:2].islower() else title for title in titles]  # FD stays FD
    rows = []
    for row in quality.rows:
        kind = "softmax" if row["softmax"] else "T5"
        rows.append([f"{row['label']} ({kind})", *(text for text, _ in row["cells"]), row["time"]])
    lines = [
        f"# {data.target}: {data.description['architecture']} with linear-cost attention",
        "",
        *table(("model", *columns, "training"), rows, numbers=True),
    ]
    lines += ["", *(f"- {line}" for line in headline(data, quality))]
    if data.benchmark:
        lines[-1] += f" Measured on {conditions(data.benchmark)}."
    numbers = data.metrics["convert"]
    lines += [
        f"- {short(numbers['inherited'])} parameters inherited, {short(numbers['new'])} new, "
        f"{short(numbers['dropped'])} dropped, in {numbers['layers']} converted layers.",
        f"- {quality.caveat}",
    ]
    return "\n".join(lines) + "\n"


def headline(data: ReportData, quality: Quality) -> list[str]:
    """Quality kept, what calibration alone gives, and speed on this device: one sentence each, as far as known."""
    return quality.sentences + ([break_even_sentence(data.benchmark)] if data.benchmark else [])


def _figures(data: ReportData) -> dict[str, Figure]:
    figures = {}
    if data.shift:
        figures["shift"] = plots.shift_ratio_map(**{k: data.shift[k] for k in ("layers", "shift_ratio", "random_init")})
    if errors := _layer_errors(data):
        figures["layers"] = plots.layer_errors(*errors)
    if data.explanation:
        figures |= {f"explain-{name}": figure for name, figure in explanation_plots.curves(data.explanation).items()}
    if data.histories.get("calibrate"):
        figures["calibration"] = plots.calibration_curve(data.histories["calibrate"])
    if data.histories.get("align"):
        figures["alignment"] = plots.alignment_curve(data.histories["align"])
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


def _softmax_choice(data: ReportData) -> dict[str, Any] | None:
    """Which layers were given back to softmax, and what each alone would have brought; None where none was chosen."""
    found = data.metrics["calibrate"]
    if "model_error" not in found:
        return None
    prefix, own = "model_error_with_softmax.", "softmax."
    order = {key.removeprefix(own): value for key, value in found.items() if key.startswith(own)}
    chosen = sorted(order, key=lambda layer: order[layer])
    alone = sorted((value, key.removeprefix(prefix)) for key, value in found.items() if key.startswith(prefix))
    text = (
        f"Softmax is back in {' and '.join(chosen)}, where the whole model misses it most: the error of its features "
        f"and output fell from {significant(found['model_error'])} to {significant(found['model_error_chosen'])} of "
        "their variance. The table shows what one softmax layer alone would have left."
    )
    rows = [(layer, significant(error), layer in chosen) for error, layer in alone]
    return {"text": text, "rows": rows}


def _alignment_reading(data: ReportData) -> str | None:
    """What alignment took, and what it did to the error of the model's output; None where there was none."""
    found = data.metrics.get("align") or {"steps": 0}
    if not found["steps"]:
        return None
    return (
        f"In {count(found['steps'])} steps ({duration(found['seconds'])}) the error of the model's output fell from "
        f"{significant(found['error_before.output'])} to {significant(found['error_after.output'])} of its variance."
    )


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
