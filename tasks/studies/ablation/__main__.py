"""Run an ablation: every variant of a model converted, calibrated and trained alike, on one device.

    python -m tasks.studies.ablation run dinov2-fashion --out docs/results/ablation.json --jobs 3
    python -m tasks.studies.ablation run my.yaml --out my.json

The ablations are the YAML files beside this one; definition.py says what they hold. Run again, it makes what is
missing; a variant whose settings changed is made anew.
"""

import argparse
import json
import math
from pathlib import Path

from t5lib.utils.config import to_dict
from tasks.runtime.tracking.about import git_commit
from tasks.studies import common
from tasks.studies.ablation import definition, names, runner


def run(arguments: argparse.Namespace) -> None:
    from tasks.studies.ablation.mlflow_import import Recorder

    plan = _plan(arguments)
    runner.run(
        plan,
        work=arguments.work / plan.name,
        out=arguments.out,
        seeds=arguments.seeds or list(plan.seeds),
        only=arguments.only,
        jobs=arguments.jobs,
        until=arguments.until,
        commit=arguments.commit or git_commit(Path(".")),
        on_result=Recorder(Path(".")),
    )


def record(arguments: argparse.Namespace) -> None:
    from tasks.studies.ablation.mlflow_import import import_result

    new, known = import_result(Path("."), runner.load(arguments.file))
    print(f"MLflow: {new} runs recorded, {known} were there already")


def prepare(arguments: argparse.Namespace) -> None:
    plan = _plan(arguments)
    seeds = arguments.seeds or list(plan.seeds)
    runner.make_sources(plan, work=arguments.work / plan.name, seeds=seeds, jobs=arguments.jobs)


def tables(arguments: argparse.Namespace) -> None:
    from tasks.studies.ablation.tables import write

    for file in write(runner.load(arguments.file), arguments.out):
        print(file)


def show(arguments: argparse.Namespace) -> None:
    print(json.dumps(to_dict(_plan(arguments))))


def _plan(arguments: argparse.Namespace) -> definition.Plan:
    return definition.resolve(Path("."), arguments.name, arguments.set)


def _parser() -> argparse.ArgumentParser:
    parser = common.parser("ablation", __doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, about: str, example: str, name: str | None = None) -> argparse.ArgumentParser:
        name = name or function.__name__
        text = f"{about[0].upper()}{about[1:]}.\n\n    python -m tasks.studies.ablation {name} {example}"
        sub = commands.add_parser(name, help=about, description=text, formatter_class=parser.formatter_class)
        sub.set_defaults(function=function)
        return sub

    about = "run what is missing and write all results to one file"
    sub = _on_device(_named(command(run, about, "smoke --out smoke.json")))
    sub.add_argument("--out", type=Path, required=True, help="the JSON file for the results; read too, if it is there")
    sub.add_argument("--only", nargs="+", metavar="VARIANT", help="run these variants alone (default: all)")
    words = "start no variant after this many seconds (default: no limit)"
    sub.add_argument("--until", type=float, default=math.inf, metavar="SECONDS", help=words)
    sub.add_argument("--commit", help="the code's version to record (default: that of this git clone)")
    _on_device(_named(command(prepare, "fetch the weights, decode the images and make the sources", "smoke")))
    _named(command(show, "check an ablation and print all of its settings, as JSON", "smoke"))
    about = "write OUT.md and a picture OUT-TABLE.png for every table, from a result file alone"
    sub = command(tables, about, "smoke.json --out smoke")
    sub.add_argument("file", type=Path, help="what `run` wrote")
    sub.add_argument("--out", type=Path, required=True, help="path of the .md and the pictures, with no file ending")
    about = "record a result file in MLflow; what is recorded already is skipped"
    sub = command(record, about, "smoke.json", name="import")
    sub.add_argument("file", type=Path, help="what `run` wrote, here or on another machine")
    return parser


def _named(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("name", help=f"an ablation ({', '.join(names())}) or a file, such as my.yaml")
    common.add_changes(parser)
    return parser


def _on_device(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    work = Path("data/scratch/ablation")
    parser.add_argument("--work", type=Path, default=work, help="where partial work is kept")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds to run (default: those of the ablation)")
    common.add_jobs(parser)
    return parser


def main() -> None:
    arguments = _parser().parse_args()
    with common.reported("ablation"):
        arguments.function(arguments)


if __name__ == "__main__":
    main()
