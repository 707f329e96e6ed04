"""The parsers behind `python -m MODULE`, for tests of help texts and of the commands that pages show."""

import argparse
import importlib

import pytest
import yaml
from imports import ROOT

STAGES = list(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])
TARGETS = list(yaml.safe_load((ROOT / "params.yaml").read_text())["targets"])


class Asked(Exception):
    """Carries the parser of a command that began to read its arguments."""


def parsers(name: str) -> list[argparse.ArgumentParser]:
    """Of the command and its subcommands. Raises ModuleNotFoundError when there is none of that name."""

    def stop(parser, *_):
        raise Asked(parser)

    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Asked) as asked:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        module.main(module.run) if name.removeprefix("tasks.") in STAGES else module.main()
    [parser] = asked.value.args
    inner = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(each for choices in inner for each in choices.values())]
