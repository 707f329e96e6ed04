"""Run all stages of a target in one process, without DVC: does everything run, how long, and in how much memory.

    python -m tasks.studies.profile sd35-medium --out profile.json --set fetch.source=file:sd35-random finetune.steps=3

writes OUT after every stage: its metrics, its seconds, and the most memory that it took of a GPU. The outputs lie under
--work as in a repository. Stages that are done with the same settings are not run again.
"""

import time
from pathlib import Path
from typing import Any

import torch

from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json
from tasks.runtime import command_line
from tasks.studies import common
from tasks.targets import resolve
from tasks.targets.run import run_stage

GIB = 2**30


def run(target: str, settings: dict[str, Any], stages: list[str], out: Path, root: Path) -> dict[str, Any]:
    """Run `stages` in `root` and write what each took to `out`; an error ends the run and is written too.

    Raises:
        T5Error: a stage broke.
    """
    result: dict[str, Any] = {"target": target, **common.machine(), "settings": settings}
    known = read_json(out) if out.is_file() else {}
    done = known["stages"] if result.items() <= known.items() else {}
    result["stages"] = {}
    for name in stages:
        if "error" not in done.get(name, {"error": None}) and (root / f"data/out/{target}/{name}").is_dir():
            result["stages"][name] = done[name]
            continue
        done = {}  # what follows was made from something else
        record = _measured(name, target, settings, root)
        result["stages"][name] = record
        write_json(out, result)
        memory = f", {record['peak_gib']:.1f} GiB" if "peak_gib" in record else ""
        print(f"{name}: {record['seconds']:.1f} s{memory}", flush=True)
        if "error" in record:
            raise T5Error(f"stage '{name}' of '{target}' failed: {record['error']}")
    return result


def _measured(name: str, target: str, settings: dict[str, Any], root: Path) -> dict[str, Any]:
    """A stage's metrics or error, its seconds, and on a GPU its memory."""
    on_gpu = torch.cuda.is_available()
    common.clean_up()  # models of the stage before
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begun = time.monotonic()
    try:
        record: dict[str, Any] = {"metrics": run_stage(name, target, params=settings, root=root)}
    except Exception as error:
        record = {"error": f"{type(error).__name__}: {error}"}
    record["seconds"] = round(time.monotonic() - begun, 2)
    if on_gpu:
        record["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
    return record


def main() -> None:
    parser = common.parser("profile", __doc__)
    command_line.add_target(parser)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file for the results")
    parser.add_argument(
        "--work", type=Path, default=Path("data/scratch/profile"), help="folder for the outputs of the stages"
    )
    parser.add_argument(
        "--stages", nargs="+", metavar="STAGE", help="stages to run (default: all, in the order of dvc.yaml)"
    )
    common.add_changes(parser)
    arguments = parser.parse_args()
    with common.reported("profile"):
        target, root = arguments.target, common.workspace(arguments.work / arguments.target)
        settings = resolve(Path("."), target, arguments.set)
        result = run(target, settings, arguments.stages or common.stages_of(Path(".")), arguments.out, root)
        print(f"all stages: {sum(record['seconds'] for record in result['stages'].values()):.0f} s")


if __name__ == "__main__":
    main()
