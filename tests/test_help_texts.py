"""Every command's help has an example, the default of every option, and the names that it can be given."""

import argparse
import re

import pytest
import typer
from imports import ROOT
from parsers import TARGETS, parsers

from flows.ablate import ablate
from flows.t5 import t5
from t5lib.cli import app

MACHINERY = {"tasks.runtime.warm", "flows.process"}  # started by us, not by people


def commands() -> list[str]:
    """What `python -m` runs."""
    files = [file for folder in ("tasks", "flows", "t5lib") for file in (ROOT / folder).rglob("*.py")]
    own = [file for file in files if '\nif __name__ == "__main__":\n' in file.read_text()]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for file in own]
    return sorted(set(names) - MACHINERY)


@pytest.mark.parametrize("name", commands())
def test_help_has_an_example_that_parses_and_defaults(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")
    found = parsers(name)
    for parser in found:
        text = parser.format_help()
        start = rf"^ +(?:python|torchrun --nproc_per_node \d+) -m {re.escape(name)}"
        examples = re.findall(rf"{start} ((?:.*\\\n)*.*)$", text, re.MULTILINE)
        assert examples, text
        for example in examples:
            found[0].parse_args(example.replace("\\\n", " ").split())
        for action in parser._actions:
            told = parser._get_formatter()._expand_help(action) if action.help else ""
            assert told or isinstance(action, argparse._SubParsersAction), f"{name}: {action.dest} is not explained"
            if action.option_strings and action.nargs != 0 and not action.required:
                assert "default" in told, f"{name}: what is {action.option_strings[0]} unless given?"
            if action.dest == "target":
                assert told.endswith(": " + ", ".join(TARGETS))


@pytest.mark.parametrize("flow", [t5, ablate], ids=lambda flow: flow.name)
def test_the_form_that_starts_a_deployment_explains_every_field(flow):
    assert not [name for name, field in flow.parameters.properties.items() if not field.get("description")]


def test_help_of_a_target_needs_no_params_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [parser] = parsers("tasks.fetch")
    assert "params.yaml, such as dinov2-fashion" in " ".join(parser.format_help().split())


@pytest.mark.parametrize("name", sorted(typer.main.get_command(app).commands))
def test_every_command_of_t5_has_examples_and_tells_defaults(name):
    command = typer.main.get_command(app).commands[name]
    assert f"**Examples**\n\n- `t5 {name} " in command.help
    for each in command.params:
        assert each.help, f"{name}: {each.name} is not explained"
        assert each.required or each.default in (None, False) or each.show_default, f"{name}: {each.name}"
