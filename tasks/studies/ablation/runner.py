"""An ablation from its definition to one JSON file with every variant and seed that is done."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t5lib.utils.config import one_of, to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json
from tasks.studies.ablation.crew import Crew, Task, result_file
from tasks.studies.ablation.definition import Plan, Unit, checksum

FORMAT = 1
Result = dict[str, Any]


def run(
    plan: Plan,
    *,
    work: Path,
    out: Path,
    seeds: list[int],
    only: list[str] | None = None,
    jobs: int = 1,
    until: float | None = None,
    commit: str,
    on_result: Callable[[Result, dict[str, Any]], None] = lambda result, record: None,
) -> Result:
    """Run what is not done yet and write all results to `out`, after every variant.

    Args:
        work: for sources, decoded images and single results; what is found there or in `out` is not made again.
        only: the variants to run; None for all.
        until: seconds after which no variant is begun.
        on_result: called with the result file's content and each new record.

    Raises:
        T5Error: an unknown variant, or `out` holds something else; and, once all else is done, what broke by a bug.
    """
    begun = time.monotonic()
    for variant in only or ():
        one_of(variant, [unit.variant for unit in plan.units], "variant")
    result = _collected(plan, work, out)
    todo = [(unit, _missing(result, unit, seeds)) for unit in plan.units if not only or unit.variant in only]
    todo = [(unit, left) for unit, left in todo if left]
    problems: dict[str, str] = {}
    if todo:
        prepare(plan, work)
        with Crew(plan, work, jobs, commit) as crew:
            _sources(crew, sorted({seed for _, left in todo for seed in left}))

            def report(task: Task, problem: str | None) -> None:
                variant, left = task[1]
                for seed in left:
                    if _take_in(result, plan.unit(variant), seed, work):
                        on_result(result, result["records"][variant][str(seed)])
                write_json(out, result)
                if problem:
                    problems[variant] = problem
                print(_line(result, variant, left, problem, time.monotonic() - begun), flush=True)

            tasks = [("unit", (unit.variant, left)) for unit, left in todo]
            unbegun = crew.do(tasks, report, lambda: until is None or time.monotonic() - begun < until)
        if unbegun:
            print("not begun in time: " + ", ".join(task[1][0] for task in unbegun), flush=True)
    write_json(out, result)
    if problems:
        raise T5Error("\n".join(f"{variant} broke: {problem}" for variant, problem in problems.items()))
    return result


def make_sources(plan: Plan, *, work: Path, seeds: list[int], jobs: int) -> None:
    """Everything that comes before the first variant."""
    prepare(plan, work)
    with Crew(plan, work, jobs, commit="") as crew:
        _sources(crew, seeds)


def prepare(plan: Plan, work: Path) -> None:
    from tasks.studies.ablation import context  # loads torch and timm

    context.prepare(plan, work)


def _sources(crew: Crew, seeds: list[int]) -> None:
    def report(task: Task, problem: str | None) -> None:
        if problem:
            raise T5Error(f"the source of seed {task[1]} could not be made: {problem}")

    crew.do([("source", seed) for seed in seeds], report)


def _collected(plan: Plan, work: Path, out: Path) -> Result:
    """What is done already, from `out` and from `work`; results of other settings are moved to a file beside it."""
    known = load(out) if out.is_file() else {"ablation": plan.name, "records": {}}
    if known["ablation"] != plan.name:
        raise T5Error(f"{out} holds the ablation '{known['ablation']}', not '{plan.name}'; pass another --out")
    result = {
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
        print(f"{out}: made with other settings, and moved to {kept}: {', '.join(other)}", flush=True)
    return result


def _take_in(result: Result, unit: Unit, seed: int, work: Path) -> bool:
    """Put a record that lies in `work` into the result, if it is one of these settings."""
    file = result_file(work, unit.variant, seed)
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
        raise T5Error(f"{file} is no result of `python -m tasks.studies.ablation run` (format {FORMAT}); pass one")
    return result


def told(stopped: str) -> str:
    """What a table says of a training's error: at which step it diverged, or that it could not be."""
    step = re.search(r"\bstep (\d+)", stopped)
    return f"diverged at step {step[1]}" if step else "not possible"


def _line(result: Result, variant: str, seeds: list[int], problem: str | None, seconds: float) -> str:
    """What a log shows of a finished variant."""
    said = []
    for seed in seeds:
        record = result["records"].get(variant, {}).get(str(seed))
        if record:
            scores = [f"{name} {score['top1']:.2f}" for name, score in record["models"].items() if name != "source"]
            said.append(f"seed {seed}: " + ", ".join(scores + [f"{at} stopped" for at in record["stopped"]]))
    broke = f"; broke: {problem.strip().splitlines()[-1]}" if problem else ""
    return f"[{seconds:5.0f} s] {variant}: {'; '.join(said) or 'no result'}{broke}"
