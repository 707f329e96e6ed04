"""Run all stages of a target in one process, without DVC: does everything run, how long, and in how much memory.

    python -m tasks.studies.profile sd35-medium --out chain.json --set fetch.source=file:/tmp/sd35-random finetune.steps=3

writes OUT after every stage: its metrics, its seconds, and the most memory that it took of a GPU. The outputs lie under
--work as in a repository. Stages that are done with the same settings are not run again.
"""

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from t5lib.benchmarks.resolution_sweep import describe_device
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json
from tasks.runtime.params import resolve_with
from tasks.runtime.stage import run_stage
from tasks.studies.seeds import workspace
from tasks.targets.classifier import device

GIB = 2**30


def chain(target: str, settings: dict[str, Any], stages: list[str], out: Path, root: Path) -> dict[str, Any]:
    """Run `stages` in `root` and write what each took to `out`; an error ends it, and stands there too."""
    result = {"target": target, "device": describe_device(device()), "torch": torch.__version__, "settings": settings}
    known = read_json(out) if out.is_file() else {}
    done = known["stages"] if result.items() <= known.items() else {}
    result["stages"] = {}
    for name in stages:
        if "error" not in done.get(name, {"error": None}) and (root / f"data/out/{target}/{name}").is_dir():
            result["stages"][name] = done[name]
            continue
        done = {}  # what follows was made from something else
        result["stages"][name] = _told(name, target, settings, root)
        write_json(out, result)
        print(f"{name}: {_line(result['stages'][name])}", flush=True)
        if "error" in result["stages"][name]:
            raise T5Error(f"stage '{name}' of '{target}' broke: {result['stages'][name]['error']}")
    return result


def stages_of(root: Path) -> list[str]:
    """All stages in the order of dvc.yaml, in which each comes after those that it needs."""
    return list(yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"])


def _told(name: str, target: str, settings: dict[str, Any], root: Path) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    gc.collect()  # models of the stage before
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begun = time.monotonic()
    try:
        told: dict[str, Any] = {"metrics": run_stage(name, target, params=settings, root=root)}
    except Exception as error:
        told = {"error": f"{type(error).__name__}: {error}"}
    torch.compiler.reset()  # every stage compiles new modules
    told["seconds"] = round(time.monotonic() - begun, 2)
    if on_gpu:
        told["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
    return told


def _line(told: dict[str, Any]) -> str:
    memory = f", {told['peak_gib']:.1f} GiB" if "peak_gib" in told else ""
    return f"{told['seconds']:.1f} s{memory}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.studies.profile", description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--work", type=Path, default=Path("data/scratch/chain"))
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="default: all, in the order of dvc.yaml")
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="settings to replace")
    args = parser.parse_args()
    try:
        settings = resolve_with(Path("."), args.target, args.set)
        stages = args.stages or stages_of(Path("."))
        result = chain(args.target, settings, stages, args.out, workspace(args.work / args.target))
    except T5Error as error:
        sys.exit(f"chain: {error}")
    print(f"all stages: {sum(told['seconds'] for told in result['stages'].values()):.0f} s")


if __name__ == "__main__":
    main()
