"""Run an ablation of params.yaml: every variant converted, calibrated and trained alike, on one device.

    python -m tasks.studies.ablation run dinov2-fashion --out docs/results/ablation.json --jobs 3

Run again, it makes what is missing; a variant whose settings changed is made anew.
"""

import argparse
import inspect
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import yaml

from t5lib.utils.config import to_dict
from t5lib.utils.errors import T5Error
from tasks.runtime import tracking
from tasks.studies.ablation import definition, runner


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
        commit=arguments.commit or tracking.git_commit(Path(".")),
        on_result=Recorder(Path(".")),
    )


def record(arguments: argparse.Namespace) -> None:
    from tasks.studies.ablation.mlflow_import import import_result

    new, known = import_result(Path("."), runner.load(arguments.file))
    print(f"MLflow: {new} runs recorded, {known} were there already")


def queue(arguments: argparse.Namespace) -> None:
    """Put the variants into DVC's queue of experiments, one for every variant and seed.

    Each experiment is the whole pipeline of the ablation's target, with the variant's settings, in a checkout of its
    own; `dvc queue start --jobs N` works through the queue, `dvc exp show` compares what is done. That is slower than
    `run`, which shares sources and images, but every stage is cached, and any experiment can be taken over with
    `dvc exp apply`. It starts from what is committed: commit first.
    """
    from tasks.studies.ablation import queue as dvc

    plan = _plan(arguments)
    experiments = dvc.experiments(plan, Path("."), arguments.seeds or list(plan.seeds), arguments.only)
    if arguments.dry_run:
        print("\n".join(shlex.join(experiment.command) for experiment in experiments))
        return
    for sentence in dvc.unsaid(plan):
        print(sentence, file=sys.stderr)
    dvc.put(experiments, Path("."))
    print(f"queued {len(experiments)} experiments; `dvc queue start` runs them, `dvc exp show` compares them")


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
    return definition.resolve(Path("."), arguments.name, _changes(arguments.set))


def _changes(items: list[str]) -> dict[str, Any]:
    changes = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise T5Error(f"--set {item}: expected NAME=VALUE, such as finetune.epochs=0.5")
        changes[key] = yaml.safe_load(value)
    return changes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tasks.studies.ablation", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, description: str, name: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name or function.__name__, help=description, description=description)
        sub.set_defaults(function=function)
        return sub

    def named(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub.add_argument("name", help="a section of `ablations` in params.yaml")
        sub.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings to replace")
        return sub

    def on_device(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--work", type=Path, default=Path("data/scratch/ablation"), help="where partial work is kept")
        sub.add_argument("--seeds", type=int, nargs="+", help="default: those of the ablation")
        sub.add_argument("--jobs", type=int, default=1, help="processes that share the device")

    sub = named(command(run, "run what is missing and write all results to one file"))
    on_device(sub)
    sub.add_argument("--out", type=Path, required=True, help="the JSON file for the results; read too, if it is there")
    sub.add_argument("--only", nargs="+", metavar="VARIANT")
    sub.add_argument("--until", type=float, metavar="SECONDS", help="begin no variant after that many seconds")
    sub.add_argument("--commit", help="the code's version to record where this is no git clone")
    on_device(named(command(prepare, "fetch the weights, decode the images and make the sources")))
    named(command(show, "check an ablation and print what it comes to, as JSON"))
    sub = named(command(queue, "put the variants into DVC's queue, as experiments of the whole pipeline"))
    sub.description = inspect.getdoc(queue)
    sub.add_argument("--seeds", type=int, nargs="+", help="default: those of the ablation")
    sub.add_argument("--only", nargs="+", metavar="VARIANT")
    sub.add_argument("--dry-run", action="store_true", help="print the commands and do nothing")
    sub = command(tables, "write OUT.md and a picture OUT-TABLE.png for every table, from a result file alone")
    sub.add_argument("file", type=Path, help="what `run` wrote")
    sub.add_argument("--out", type=Path, required=True, help="where they go, without ending")
    sub = command(record, "record a result file in MLflow; what is recorded already is not doubled", name="import")
    sub.add_argument("file", type=Path, help="what `run` wrote, here or on another machine")
    return parser


def main() -> None:
    arguments = _parser().parse_args()
    for stop in (signal.SIGINT, signal.SIGTERM):  # also where a background shell made us ignore Ctrl-C
        signal.signal(stop, signal.default_int_handler)
    try:
        arguments.function(arguments)
    except T5Error as error:
        sys.exit(f"ablate: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
