"""An ablation from its definition to one JSON file with every variant and seed that is done."""

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t5lib.utils.config import one_of, to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json
from tasks.studies.ablation.definition import Plan, Unit
from tasks.studies.common import Outcome, checksum, run_jobs

FORMAT = 1
Result = dict[str, Any]
OnResult = Callable[[Result, dict[str, Any]], None]  # the result file's content, and a new record in it


def run(
    plan: Plan,
    *,
    work: Path,
    out: Path,
    seeds: list[int],
    only: list[str] | None = None,
    jobs: int = 1,
    until: float = math.inf,
    commit: str,
    on_result: OnResult = lambda result, record: None,
) -> Result:
    """Run what is not done yet and write all results to `out`, after every variant.

    Args:
        work: for sources, decoded images and single results; what lies there or in `out` is not made again.
        only: the variants to run; None for all.
        jobs: processes at once.
        until: seconds after which no variant is begun.
        on_result: called with each new record.

    Raises:
        T5Error: an unknown variant, or `out` holds something else; and, once all else is done, what broke by a bug.
    """
    begun, work = time.time(), work.resolve()
    for variant in only or ():
        one_of(variant, [unit.variant for unit in plan.units], "variant")
    result = _collected(plan, work, out)
    todo = {unit.variant: _missing(result, unit, seeds) for unit in plan.units if not only or unit.variant in only}
    todo = {variant: missing for variant, missing in todo.items() if missing}
    problems: dict[str, str] = {}
    if todo:
        make_sources(plan, work=work, seeds=sorted({seed for missing in todo.values() for seed in missing}), jobs=jobs)
        for outcome in _variants(plan, work, todo, jobs, commit, begun + until):
            variant = outcome.job.variant
            missing = todo.pop(variant)
            for seed in missing:
                if _take_in(result, plan.unit(variant), seed, work):
                    on_result(result, result["records"][variant][str(seed)])
            write_json(out, result)
            if outcome.problem:
                problems[variant] = outcome.problem
            print(f"[{time.time() - begun:5.0f} s] {_line(result, variant, missing, outcome)}", flush=True)
        if todo:
            print(f"not started in time: {', '.join(todo)}", flush=True)
    write_json(out, result)
    if problems:
        raise T5Error("\n".join(f"{variant} failed: {problem}" for variant, problem in problems.items()))
    return result


def make_sources(plan: Plan, *, work: Path, seeds: list[int], jobs: int) -> None:
    """Everything that comes before the first variant: weights, images and the softmax source of every seed."""
    from tasks.studies.ablation import context  # loads torch and timm

    work = work.resolve()
    context.prepare(plan, work)
    sources = [context.SourceJob(plan, work, seed) for seed in seeds]
    for outcome in run_jobs(context.make_source, [job for job in sources if not job.done], jobs, logs=_logs(work)):
        if outcome.problem:
            raise T5Error(f"the source of seed {outcome.job.seed} could not be made: {outcome.problem}")


def _variants(plan: Plan, work: Path, todo: dict[str, list[int]], jobs: int, commit: str, until: float):
    """The outcomes of the variants of `todo`, with the seeds that it names."""
    from tasks.studies.ablation.variant import VariantJob, make_variant

    shared: dict[str, Any] = {"plan": plan, "work": work, "commit": commit, "shared_card": jobs > 1}
    variants = [VariantJob(variant=variant, seeds=tuple(seeds), **shared) for variant, seeds in todo.items()]
    return run_jobs(make_variant, variants, jobs, until=until, logs=_logs(work))


def _logs(work: Path) -> Path:
    return work / "logs"


def _collected(plan: Plan, work: Path, out: Path) -> Result:
    """What is done already, from `out` and from `work`; results of other settings are moved to a file beside it."""
    known: Result = load(out) if out.is_file() else {"ablation": plan.name, "records": {}}
    if known["ablation"] != plan.name:
        raise T5Error(f"{out} holds the ablation '{known['ablation']}', not '{plan.name}'; pass another --out")
    result: Result = {
        "format": FORMAT,
        "ablation": plan.name,
        "target": plan.target,
        "note": plan.note,
        "control": plan.control,
        "images": to_dict(plan.images),
        "tables": {name: to_dict(table) for name, table in plan.tables.items()},
        "records": {},
    }
    other: dict[str, dict[str, Any]] = {}
    keys = {unit.variant: unit.key for unit in plan.units}
    for variant, records in known["records"].items():
        same = {seed: record for seed, record in records.items() if record["key"] == keys.get(variant)}
        if same:
            result["records"][variant] = same
        if len(same) < len(records):
            other[variant] = {seed: record for seed, record in records.items() if seed not in same}
    for unit in plan.units:
        for file in sorted((work / "results").glob(f"{unit.variant}--seed-*.json")):
            _take_in(result, unit, int(file.stem.rpartition("-")[2]), work)
    if other:
        kept = out.with_name(f"{out.stem}.{checksum(other)}.json")
        write_json(kept, known | {"records": other})
        print(f"{out}: results with other settings were moved to {kept}: {', '.join(other)}", flush=True)
    return result


def _take_in(result: Result, unit: Unit, seed: int, work: Path) -> bool:
    """Put a record that lies in `work` into the result, if it is one of these settings."""
    file = unit.result_file(work, seed)
    record = read_json(file) if file.is_file() else {"key": None}
    if record["key"] != unit.key:
        return False
    result["records"].setdefault(unit.variant, {})[str(seed)] = record
    return True


def _missing(result: Result, unit: Unit, seeds: list[int]) -> list[int]:
    return [seed for seed in seeds if str(seed) not in result["records"].get(unit.variant, {})]


def load(file: Path) -> Result:
    """A result file. Raises T5Error when it is something else."""
    result = read_json(file)
    if not isinstance(result, dict) or result.get("format") != FORMAT or "records" not in result:
        raise T5Error(f"{file} is not a result of `python -m tasks.studies.ablation run` (format {FORMAT}); pass one")
    return result


def why_stopped(message: str) -> str:
    """What a table says of a training's error: at which step it diverged, or that it could not be."""
    step = re.search(r"\bstep (\d+)", message)
    return f"diverged at step {step[1]}" if step else "not possible"


def _line(result: Result, variant: str, seeds: list[int], outcome: Outcome) -> str:
    """What a log shows of a variant that ended."""
    parts = []
    for seed in seeds:
        record = result["records"].get(variant, {}).get(str(seed))
        if record:
            scores = [f"{name} {score['top1']:.2f}" for name, score in record["models"].items() if name != "source"]
            parts.append(f"seed {seed}: " + ", ".join(scores + [f"{at} stopped" for at in record["stopped"]]))
    broke = f"; failed: {outcome.last_words}" if outcome.problem else ""
    return f"{variant}: {'; '.join(parts) or 'no result'}{broke}"
