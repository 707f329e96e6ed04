"""What a report shows, as the stages wrote it."""

from dataclasses import dataclass, field
from typing import Any

from t5lib.report.models import final
from t5lib.utils.errors import T5Error

REQUIRED = ("convert", "calibrate", "finetune", "evaluate")  # stages that a report cannot do without


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything the report shows, as the stages wrote it.

    Attributes:
        target: its name in params.yaml.
        metrics: by stage; convert, calibrate, finetune and evaluate are needed, the others may be absent.
        histories: by stage, the points of its curve; empty or absent where there is none.
        account: names of the inherited, new and dropped parameters.
        description: t5.json of the fine-tuned model.
        shift: layers, shift_ratio and random_init of `diagnose`, if it ran.
        explanation: what `explain` found (t5lib.analysis.explanation, as dictionary), if it ran.
        maps: its attention maps, PNG files' content.
        samples: a picture of every model's samples, a PNG file's content, of models that draw.
        benchmark: the result of t5lib.benchmarks.resolution_sweep.benchmark, if it ran.
        parameters: resolved settings by section.
        provenance: what else identifies the run, by label: versions, device, commit, date.
    """

    target: str
    metrics: dict[str, dict[str, Any]]
    histories: dict[str, list[dict[str, float]]]
    account: dict[str, list[str]]
    description: dict[str, Any]
    shift: dict[str, Any] | None = None
    explanation: dict[str, Any] | None = None
    maps: tuple[bytes, ...] = ()
    samples: bytes | None = None
    benchmark: dict[str, Any] | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        absent = [stage for stage in REQUIRED if stage not in self.metrics]
        if absent:
            raise T5Error(
                f"the report of '{self.target}' needs the metrics of {', '.join(absent)}; run these stages first"
            )
        if "source" not in self.evaluated:
            raise T5Error(f"evaluate measured {', '.join(self.evaluated)}; the report also needs source")
        final(self.evaluated)

    @property
    def evaluated(self) -> dict[str, dict[str, Any]]:
        return self.metrics["evaluate"]["models"]

    @property
    def skipped(self) -> str | None:
        """Why there is neither fine-tune nor control; None where there is."""
        return self.metrics["finetune"].get("skipped")
