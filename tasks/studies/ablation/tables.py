"""The tables of an ablation as Markdown and pictures, from its result file alone."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from t5lib.report import plots
from t5lib.report.models import OF_STAGE
from t5lib.utils import markdown
from t5lib.utils.config import from_dict
from t5lib.utils.errors import T5Error
from tasks.studies.ablation.definition import PROTOCOLS, Table
from tasks.studies.ablation.runner import Result, why_stopped
from tasks.studies.common import plus_minus, spread

MODEL_OF = {protocol: OF_STAGE[protocol].key for protocol in PROTOCOLS}
# What may stand between a variant and a figure of it, in the order of the work.
BEFORE: dict[str, tuple[str, ...]] = {"calibrated": ("convert", "calibrate")}
BEFORE |= {model: ("convert", "calibrate", protocol) for protocol, model in MODEL_OF.items()}
TITLES = {"calibrated": "before training", "frozen": "freeze", "finetuned": "fine-tuned"}
PAPER_TITLES = {"freeze": "paper: freeze", "finetune": "paper: fine-tuned"}
REFERENCE_NAMES = {"source": "softmax source", "control": "softmax trained like the fine-tuned ones (control)"}

# In pictures, a model's marker, fill, edge and label. Shape and fill tell them apart as well as colour does.
LOOKS = {
    "calibrated": ("o", "white", plots.MUTED, "before training"),
    "frozen": ("s", plots.T5_LIGHT, plots.T5_LIGHT, "freeze protocol"),
    "finetuned": ("D", plots.T5, plots.T5, "fine-tuned"),
}
REFERENCES = {"control": ("-", "softmax trained alike"), "source": (":", "softmax source")}
# no grid through it
BESIDE_A_ROW: dict[str, Any] = {"va": "center", "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.3}}
SPAN = 15.0  # points that the axis shows at most: what differs by one must be seen; values further down are written out


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of one variant: its records by seed, and the control's of the same seeds."""

    label: str
    records: dict[str, dict[str, Any]]
    controls: dict[str, dict[str, Any]]
    paper: dict[str, Any]
    seeds: int

    def top1(self, model: str) -> dict[str, float] | None:
        """Mean and standard deviation over the seeds that have it. "calibrated" is "converted" where there is none."""
        values = [score["top1"] for record in self.records.values() if (score := _score(record, model))]
        return spread(values) if values else None

    def cell(self, model: str) -> str:
        values, problems = self.top1(model), [p for record in self.records.values() if (p := _problem(record, model))]
        if values is None:
            return ", ".join(dict.fromkeys(problems)) or ("–" if self.records else "not run")
        return self._cell(values, len(self.records) - len(problems))

    def gap(self) -> str:
        """Fine-tuned minus control, seed by seed."""
        gaps = []
        for seed, record in self.records.items():
            ours, theirs = _score(record, "finetuned"), _score(self.controls.get(seed, {"models": {}}), "control")
            if ours and theirs:
                gaps.append(ours["top1"] - theirs["top1"])
        return self._cell(spread(gaps), len(gaps)) if gaps else "–"

    def _cell(self, values: dict[str, float], count: int) -> str:
        """Mean and spread, with the number of seeds where that is not all."""
        return _text(values, count) + (f" ({count} of {self.seeds} seeds)" if count < self.seeds else "")

    def error(self) -> str:
        """Calibration error: mean over layers and seeds, as a share of the variance."""
        errors = [record["calibration"].get("error_after") for record in self.records.values()]
        known = [error for error in errors if error is not None]
        mean = sum(known) / len(known) if known else 0.0
        return (f"{mean:.1e}" if mean > 1000 else f"{mean:.3f}") if known else "–"

    def new(self) -> str:
        counts = {record["new_parameters"] for record in self.records.values()}
        return f"{max(counts) / 1e6:.2f}" if counts else "–"


def write(result: Result, out: Path) -> list[Path]:
    """Write `out`.md and a picture `out`-TABLE.png for every table; returns the files.

    Raises:
        T5Error: the result holds nothing yet.
    """
    if not result["records"]:
        raise T5Error(f"the ablation '{result['ablation']}' has no result yet; run it first")
    files = [out.with_name(f"{out.name}.md")]
    parts = [_head(result)]
    for name, shown in result["tables"].items():
        table = from_dict(Table, shown, f"table {name}")
        rows = rows_of(result, table)
        if any(row.records for row in rows):
            picture = out.with_name(f"{out.name}-{name}.png")
            plots.save(dots(table, rows, softmax(result)), picture)
            files.append(picture)
            parts.append(_section(table, rows, picture.name))
    markdown.write_page(files[0], "\n".join(parts))
    return files


def rows_of(result: Result, table: Table) -> list[Row]:
    controls = result["records"].get(result["control"], {})
    seeds = len({seed for records in result["records"].values() for seed in records})
    return [
        Row(
            label=label,
            records=result["records"].get(variant, {}),
            controls=controls,
            paper=table.paper.get(label, {}),
            seeds=seeds,
        )
        for label, variant in table.rows.items()
    ]


def softmax(result: Result) -> dict[str, dict[str, float]]:
    """Top-1 of the softmax models, as far as there are any: "source", and "control", which is trained alike."""
    top1: dict[str, dict[str, float]] = {"source": {}, "control": {}}
    for records in result["records"].values():
        for seed, record in records.items():
            for name, values in top1.items():
                if score := record["models"].get(name):
                    values[seed] = score["top1"]
    return {name: spread(list(values.values())) for name, values in top1.items() if values}


def _score(record: dict[str, Any], model: str) -> dict[str, Any] | None:
    scores = record["models"]
    return scores.get(model) or (scores.get("converted") if model == "calibrated" else None)


def _problem(record: dict[str, Any], model: str) -> str | None:
    """Why a record lacks a model that it should have; None where it is there, or was not to be made."""
    if _score(record, model):
        return None
    return next((why_stopped(record["stopped"][part]) for part in BEFORE[model] if part in record["stopped"]), None)


def _head(result: Result) -> str:
    records = [record for seeds in result["records"].values() for record in seeds.values()]
    seeds = sorted({seed for of_one in result["records"].values() for seed in of_one}, key=int)
    n = records[0]["models"]["source"]["n"]
    references = [f"{REFERENCE_NAMES[name]} {plus_minus(values)}" for name, values in softmax(result).items()]
    lines = [
        f"# {result['ablation']}",
        "",
        f"Top-1 in percent of {n:,} validation images, mean ± standard deviation over the seeds {', '.join(seeds)}.",
        f"{'; '.join(references).capitalize()}.",
        f"Device: {_all(records, 'device')}; torch {_all(records, 'torch')}; code {_all(records, 'git_commit')}.",
        _recipe(records),
    ]
    return "\n".join([*lines, "", result["note"], ""] if result["note"] else [*lines, ""])


def _recipe(records: list[dict[str, Any]]) -> str:
    """The budget that all share, as a sentence."""
    budgets: dict[str, set[str]] = {"calibration": set(), "freeze": set(), "finetune": set()}
    for record in records:
        settings = record["settings"]
        if settings.get("calibrate"):
            own = settings["calibrate"]
            budgets["calibration"].add(f"{own['steps']} steps of {own['batch_size']} images")
        for protocol in PROTOCOLS:
            if own := settings.get(protocol):
                budgets[protocol].add(f"epochs {own['epochs']:g}, batches of {own['batch_size']}")
    parts = [f"{part} {' or '.join(sorted(texts))}" for part, texts in budgets.items() if texts]
    return f"Budget: {'; '.join(parts)}."


def _section(table: Table, rows: list[Row], picture: str) -> str:
    columns = _columns(table, rows)
    lines = markdown.table(list(columns), [[text(row) for text in columns.values()] for row in rows])
    notes = [f"Paper: {table.paper_says}." if table.paper and table.paper_says else "", table.note]
    texts = [f"{note}\n" for note in notes if note]
    return "\n".join(["", f"## {table.title}", "", *lines, "", *texts, f"![{table.title}]({picture})", ""])


def _of_paper(row: Row, protocol: str) -> str:
    return _figure(row.paper.get(protocol))


def _columns(table: Table, rows: list[Row]) -> dict[str, Callable[[Row], str]]:
    """What a row says under each heading."""
    models = ["calibrated", *(MODEL_OF[protocol] for protocol in table.protocols)]
    models = [model for model in models if any(row.cell(model) not in ("–", "not run") for row in rows)]
    columns: dict[str, Callable[[Row], str]] = {"": lambda row: row.label}
    columns |= {TITLES[model]: functools.partial(Row.cell, model=model) for model in models}
    if "finetuned" in models:
        columns["minus control"] = Row.gap
    columns |= {
        PAPER_TITLES[protocol]: functools.partial(_of_paper, protocol=protocol)
        for protocol in table.protocols
        if any(protocol in row.paper for row in rows)
    }
    return columns | {"calibration error": Row.error, "new parameters (M)": Row.new}


def _text(values: dict[str, float], count: int) -> str:
    return plus_minus(values) if count > 1 else f"{values['mean']:.2f}"  # one seed has no spread


def _figure(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.2f}"


def _all(records: list[dict[str, Any]], key: str) -> str:
    return ", ".join(dict.fromkeys(str(record[key]) for record in records))


@plots.styled
def dots(table: Table, rows: list[Row], softmax: dict[str, dict[str, float]]) -> Figure:
    """Mean top-1 of every row as dots on a line, softmax for reference; whiskers are standard deviations over seeds."""
    shown = [model for model in LOOKS if model == "calibrated" or model in map(MODEL_OF.get, table.protocols)]
    figure, axes = plots.new_axes(1.3 + 0.3 * len(rows), table.title, "top-1 accuracy (%)", "")
    for name, (line, label) in REFERENCES.items():
        if name in softmax:
            axes.axvline(softmax[name]["mean"], color=plots.SOFTMAX, linestyle=line, linewidth=1.3, label=label)
    for model in shown:
        _draw(axes, rows, model)
    floor = _limits(axes, rows, shown, softmax)
    for number, row in enumerate(rows):
        words = " ".join(text for text in (_far_below(row, shown, floor), _missing(row, shown)) if text)
        axes.text(0.01, number - 0.36, words, transform=axes.get_yaxis_transform(), fontsize=7, **BESIDE_A_ROW)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], color=plots.INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    columns = (len(axes.get_legend_handles_labels()[0]) + 1) // 2  # two lines of entries
    figure.legend(loc="outside lower center", ncols=columns, handletextpad=0.3, columnspacing=1.2, fontsize=8)
    return figure


def _draw(axes: Axes, rows: list[Row], model: str) -> None:
    marker, fill, edge, label = LOOKS[model]
    points = [(number, values) for number, row in enumerate(rows) if (values := row.top1(model))]
    if points:
        axes.errorbar(
            [values["mean"] for _, values in points],
            [number for number, _ in points],
            xerr=[values["std"] for _, values in points],
            fmt=marker,
            color=fill,
            markeredgecolor=edge,
            ecolor=edge,
            elinewidth=1.2,
            label=label,
        )


def _limits(axes: Axes, rows: list[Row], shown: list[str], softmax: dict[str, dict[str, float]]) -> float:
    """As near as the values are, with room for the whiskers; returns the lowest value that is shown."""
    values = [values for row in rows for model in shown if (values := row.top1(model))] + list(softmax.values())
    if not values:
        return 0.0
    high = max(value["mean"] + value["std"] for value in values)
    near = [value["mean"] - value["std"] for value in values if value["mean"] - value["std"] > high - SPAN]
    room = max(0.06 * (high - min(near)), 0.2)
    floor = min(near) - room
    axes.set_xlim(floor, min(high + room, 100.5))
    return floor


def _far_below(row: Row, shown: list[str], floor: float) -> str:
    """Values left of the axis, in words."""
    below = {LOOKS[model][3]: values["mean"] for model in shown if (values := row.top1(model))}
    return ", ".join(f"◀ {label} {mean:.1f}" for label, mean in below.items() if mean < floor)


def _missing(row: Row, shown: list[str]) -> str:
    """Why dots are missing, once where it is the same for all."""
    reasons = {LOOKS[model][3]: row.cell(model) for model in shown if row.top1(model) is None}
    if len(reasons) == len(shown) and len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return ", ".join(f"{label}: {reason}" for label, reason in reasons.items() if reason != "–")
