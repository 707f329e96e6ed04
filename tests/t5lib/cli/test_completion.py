"""Shells complete the commands and options of `t5`, without anything slow being imported for it."""

import os
import subprocess
import sys

import pytest
from command_line import run

SLOW = {"torch", "timm", "numpy", "transformers"}
COMPLETE = (
    "import sys; from t5lib.cli import app\ntry: app(prog_name='t5')\nfinally: print(*sys.modules, file=sys.stderr)"
)


def completed(shell: str, typed: str) -> tuple[str, set[str]]:
    """What a shell is offered for the words `typed`, and the modules that were imported for it."""
    asked = {"_T5_COMPLETE": f"complete_{shell}", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    asked |= {"_TYPER_COMPLETE_ARGS": typed, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    command = [sys.executable, "-c", COMPLETE]
    result = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, check=True)
    return result.stdout, set(result.stderr.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_are_completed_without_importing_torch(shell):
    offered, imported = completed(shell, "t5 exp")
    assert "export" in offered and "convert" not in offered
    assert not imported & SLOW


def test_options_are_completed():
    offered, _ = completed("bash", "t5 export --dyn")
    assert offered.split() == ["--dynamic-size"]


def test_the_script_of_a_shell_is_shown(monkeypatch):
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))  # tests may run without any
    result = run("--show-completion")
    assert "_T5_COMPLETE=complete_bash" in result.stdout and "complete -o default" in result.stdout
