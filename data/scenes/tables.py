"""What study.py measured, as one file of figures, tables and a picture of predicted maps.

    python data/scenes/tables.py --work WORK --scenes SCENES --out docs/results/scenes

Writes OUT.json (every run, and all folds of an arm together), OUT-tables.md, and OUT-maps.webp where `--pictures` left
maps in WORK. SCENES needs the first few scenes of each fold only (compose.py --per-fold 6).

Folds of an arm are put together by adding the sums of their entities: every tested object then counts once. Intervals
of 95 % are a bootstrap over tested objects and backgrounds. "lost" is the source's mIoU against the truth minus the
student's; its bound is the upper one of 95 %, one-sided, of the mean over folds (Student's t), each with its own seed.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compose import Composed
from matplotlib.figure import Figure

from t5lib.evaluation.dense import DenseSums, summary
from t5lib.evaluation.level import upper_bound
from t5lib.report import plots
from t5lib.utils import markdown
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json, write_text

SOURCE = "the source, mirrored"
MEASURES = ("cosine", "fidelity_miou", "agreement", "miou", "own_probe_miou")
SHOWN = 4  # scenes in the picture
COLOURS = np.array([(232, 232, 232), (0, 114, 178), (0, 158, 115), (213, 94, 0)]) / 255  # by class, as in the truth


def read_runs(work: Path) -> dict[str, list[dict[str, Any]]]:
    """By arm, its runs that came to an end: what was recorded, and the sums by size."""
    runs = defaultdict(list)
    for file in sorted(work.glob("source-*.json")):
        runs[SOURCE].append(_run(file, "mirrored"))
    for file in sorted(work.glob("arm-*.json")):
        record = read_json(file)
        if "aligned" in record["measured"]:
            runs[record["arm"]].append(_run(file, "aligned"))
    if not runs:
        raise T5Error(f"{work} holds no finished run of study.py")
    return runs


def _run(file: Path, stage: str) -> dict[str, Any]:
    record = read_json(file)
    with np.load(file.with_suffix(".npz")) as arrays:
        sums = {
            size: DenseSums(
                **{part: torch.from_numpy(arrays[f"{stage}/{size}/{part}"]) for part in DenseSums.__annotations__}
            )
            for size in record["measured"][stage]
        }
    return {"record": record, "stage": stage, "sums": sums}


def together(runs: list[dict[str, Any]], kinds: torch.Tensor) -> dict[str, Any]:
    """All runs of an arm: by size the measures with their intervals, and what was lost in the mean of the folds."""
    result: dict[str, Any] = {"folds": [run["record"]["fold"] for run in runs], "sizes": {}}
    for size, first in runs[0]["sums"].items():
        sums = first
        for run in runs[1:]:
            sums = sums + run["sums"][size]
        lost = [run["record"]["measured"][run["stage"]][size]["lost_miou"] for run in runs]
        own = {"lost_by_fold": lost, "lost": float(np.mean(lost)), "lost_at_most": upper_bound(lost)}
        focus = [run["record"]["focus"][size] for run in runs if run["record"].get("focus")]
        if focus:
            own["focus"] = {name: float(np.mean([each[name] for each in focus])) for name in focus[0]}
        result["sizes"][size] = summary(sums, kinds) | own
        if not all(run["record"].get("own_probes") for run in runs):
            del result["sizes"][size]["own_probe_miou"]
    return result


def tables(arms: dict[str, dict[str, Any]]) -> str:
    lines = []
    for size in next(iter(arms.values()))["sizes"]:
        columns = ["arm", "folds", "cosine", "fidelity mIoU", "agreement %", "mIoU", "own probe", "lost", "at most"]
        rows = [[name, len(arm["folds"]), *_cells(arm["sizes"][size])] for name, arm in arms.items()]
        lines += [f"**{size} px**", "", *markdown.table(columns, rows, numbers=True), ""]
    with_focus = {name: arm for name, arm in arms.items() if any("focus" in each for each in arm["sizes"].values())}
    if with_focus:
        columns = ["heat maps", "size", "correlation", "distance, % of the diagonal", "same focus, %"]
        rows = [
            [name, size, f"{f['correlation']:.3f}", f"{f['distance']:.1f}", f"{f['same_focus']:.0f}"]
            for name, arm in with_focus.items()
            for size, f in ((size, each["focus"]) for size, each in arm["sizes"].items())
        ]
        lines += [*markdown.table(columns, rows, numbers=True), ""]
    return "\n".join(lines)


def _cells(size: dict[str, Any]) -> list[str]:
    def cell(name: str) -> str:
        if name not in size:
            return ""
        digits = 3 if name == "cosine" else 1
        value, low, high = (f"{size[name][part]:.{digits}f}" for part in ("value", "low", "high"))
        return f"{value} ({low} to {high})"

    at_most = "" if size["lost_at_most"] is None else f"{size['lost_at_most']:.1f}"
    return [*map(cell, MEASURES), f"{size['lost']:.1f}", at_most]


def picture(work: Path, composed: Composed, out: Path) -> None:
    """Scenes, the truth, what source and student predict, and where they differ: two scenes of each of two folds."""
    files = sorted(work.glob("maps-*.npz"))
    rows = []
    for file in files[:2]:
        fold = int(file.stem.split("-")[-2])
        with np.load(file) as maps:
            for scene in range(SHOWN // min(2, len(files))):
                rows.append((composed.images(fold)[scene], *(maps[n][scene] for n in ("truth", "source", "student"))))
    titles = ("scene", "truth", "source", "student", "where they differ")
    with plots.matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(8, 1.7 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), len(titles), squeeze=False)
        for line, (image, truth, source, student) in zip(axes, rows, strict=True):
            differ = np.where(source != student, 0.1, 0.92)
            shown = (image, COLOURS[truth], COLOURS[source], COLOURS[student], np.repeat(differ[..., None], 3, -1))
            for axis, part in zip(line, shown, strict=True):
                axis.imshow(part, interpolation="nearest")
                axis.set_axis_off()
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title, loc="center")
        figure.savefig(out, dpi=110, pil_kwargs={"quality": 80})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("work", "scenes", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    composed, runs = Composed.read(options.scenes), read_runs(options.work)
    kinds = torch.from_numpy(composed.class_of_entity)
    arms = {name: together(own, kinds) for name, own in runs.items()}
    records = [run["record"] for own in runs.values() for run in own]
    write_json(options.out.with_name(f"{options.out.name}.json"), {"arms": arms, "runs": records})
    text = tables(arms)
    write_text(options.out.with_name(f"{options.out.name}-tables.md"), text)
    print(text)
    if list(options.work.glob("maps-*.npz")):
        picture(options.work, composed, options.out.with_name(f"{options.out.name}-maps.webp"))


if __name__ == "__main__":
    main()
