"""The tables of an ablation as Markdown and pictures, from its result file alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5lib.report import plots
from t5lib.utils.config import from_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import write_text
from tasks.studies.ablation import pictures
from tasks.studies.ablation.definition import Table
from tasks.studies.ablation.runner import Result, told
from tasks.studies.seeds import plus_minus, spread

# What may stand between a variant and a figure of it, in the order of the work.
BEFORE = {"calibrated": ("convert", "calibrate"), "frozen": ("convert", "calibrate", "freeze")}
BEFORE |= {"converted": ("convert",), "finetuned": ("convert", "calibrate", "finetune")}
MODEL_OF = {"freeze": "frozen", "finetune": "finetuned"}
TITLES = {"calibrated": "before training", "frozen": "freeze", "finetuned": "fine-tuned"}
PAPER_TITLES = {"freeze": "paper: freeze", "finetune": "paper: fine-tuned"}


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
        return self._told(values, len(self.records) - len(problems))

    def gap(self) -> str:
        """Fine-tuned minus control, seed by seed."""
        gaps = []
        for seed, record in self.records.items():
            ours, theirs = _score(record, "finetuned"), _score(self.controls.get(seed, {"models": {}}), "control")
            if ours and theirs:
                gaps.append(ours["top1"] - theirs["top1"])
        return self._told(spread(gaps), len(gaps)) if gaps else "–"

    def _told(self, values: dict[str, float], count: int) -> str:
        """Mean and spread, with the number of seeds where that is not all."""
        return _spelled(values, count) + (f" ({count} of {self.seeds} seeds)" if count < self.seeds else "")

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
            plots.save(pictures.dots(table, rows, softmax(result)), picture)
            files.append(picture)
            parts.append(_section(table, rows, picture.name))
    write_text(files[0], "\n".join(parts))
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
    seen: dict[str, dict[str, float]] = {"source": {}, "control": {}}
    for records in result["records"].values():
        for seed, record in records.items():
            for name, values in seen.items():
                if score := record["models"].get(name):
                    values[seed] = score["top1"]
    return {name: spread(list(values.values())) for name, values in seen.items() if values}


def _score(record: dict[str, Any], model: str) -> dict[str, Any] | None:
    scores = record["models"]
    return scores.get(model) or (scores.get("converted") if model == "calibrated" else None)


def _problem(record: dict[str, Any], model: str) -> str | None:
    """Why a record lacks a model that it should have; None where it is there, or was not to be made."""
    if _score(record, model):
        return None
    return next((told(record["stopped"][part]) for part in BEFORE[model] if part in record["stopped"]), None)


def _head(result: Result) -> str:
    records = [record for seeds in result["records"].values() for record in seeds.values()]
    seeds = sorted({seed for of_one in result["records"].values() for seed in of_one}, key=int)
    n = records[0]["models"]["source"]["n"]
    references = [f"{_REFERENCES[name]} {plus_minus(values)}" for name, values in softmax(result).items()]
    lines = [
        f"# {result['ablation']}",
        "",
        f"Top-1 in percent of {n:,} validation images, mean ± standard deviation over the seeds {', '.join(seeds)}.",
        f"{'; '.join(references).capitalize()}.",
        f"Device: {_all(records, 'device')}; torch {_all(records, 'torch')}; code {_all(records, 'git_commit')}.",
        _recipe(records),
    ]
    return "\n".join([*lines, "", result["note"], ""] if result["note"] else [*lines, ""])


_REFERENCES = {"source": "softmax source", "control": "softmax trained like the fine-tuned ones (control)"}


def _recipe(records: list[dict[str, Any]]) -> str:
    """The budget that all share, as a sentence."""
    found: dict[str, set[str]] = {"calibration": set(), "freeze": set(), "finetune": set()}
    for record in records:
        settings = record["settings"]
        if settings.get("calibrate"):
            own = settings["calibrate"]
            found["calibration"].add(f"{own['steps']} steps of {own['batch_size']} images")
        for protocol in ("freeze", "finetune"):
            if own := settings.get(protocol):
                found[protocol].add(f"epochs {own['epochs']:g}, batches of {own['batch_size']}")
    return (
        "Budget: " + "; ".join(f"{part} {' or '.join(sorted(texts))}" for part, texts in found.items() if texts) + "."
    )


def _section(table: Table, rows: list[Row], picture: str) -> str:
    models = ["calibrated", *(MODEL_OF[protocol] for protocol in table.protocols)]
    models = [model for model in models if any(row.cell(model) not in ("–", "not run") for row in rows)]
    columns = [("", lambda row: row.label)]
    columns += [(TITLES[model], lambda row, model=model: row.cell(model)) for model in models]
    if "finetuned" in models:
        columns.append(("minus control", Row.gap))
    columns += [
        (PAPER_TITLES[protocol], lambda row, protocol=protocol: _figure(row.paper.get(protocol)))
        for protocol in table.protocols
        if any(protocol in row.paper for row in rows)
    ]
    columns += [("calibration error", Row.error), ("new parameters (M)", Row.new)]
    lines = ["", f"## {table.title}", "", "| " + " | ".join(title for title, _ in columns) + " |"]
    lines.append("|---" * len(columns) + "|")
    lines += ["| " + " | ".join(text(row) for _, text in columns) + " |" for row in rows]
    notes = [f"Paper: {table.paper_says}." if table.paper and table.paper_says else "", table.note]
    return "\n".join([*lines, "", *(f"{note}\n" for note in notes if note), f"![{table.title}]({picture})", ""])


def _spelled(values: dict[str, float], count: int) -> str:
    return plus_minus(values) if count > 1 else f"{values['mean']:.2f}"  # one seed has no spread


def _figure(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.2f}"


def _all(records: list[dict[str, Any]], key: str) -> str:
    return ", ".join(dict.fromkeys(str(record[key]) for record in records))
