"""Every command that a page shows is there, with the options, stages, targets and deployments that it names.

Nothing is run: each line is read by the parser of the program that it calls.
"""

import functools
import re
import shlex
import uuid
from collections.abc import Iterator

import cyclopts
import pytest
import typer
import yaml
from dvc.cli import DvcParserError
from dvc.cli import parse_args as parse_dvc
from imports import ROOT
from pages import READ
from parsers import STAGES, TARGETS
from parsers import parsers as parsers_of

from t5lib.cli import app

PAGES = [page for page in READ if page.name != "CHANGELOG.md"]  # it tells what commands were called before, too
OURS = ("tasks", "flows", "t5lib", "t5kernels")
parsers = functools.cache(parsers_of)


class Wrong(Exception):
    """What a command does not take."""


REFUSALS = (Wrong, ImportError, SystemExit, typer.BadParameter.__base__, cyclopts.CycloptsError, DvcParserError)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each line of code, in blocks and between backticks; continued lines are joined."""
    text = re.sub(r"\\\n\s*", " ", text)
    lines = re.findall(r"^ {4,}(\S.*)$|`([^`\n]+)`", text, re.MULTILINE)
    for fenced in re.findall(r"^ *```(?:sh|bash)?\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        lines += [(line, "") for line in fenced.splitlines()]
    for line in map("".join, lines):
        for command in re.split(r"\s+#\s|\s{3,}", re.sub(r" \[[^]]*\]", "", line))[0].split(" && "):
            try:
                words = shlex.split(command)
            except ValueError:  # not of a shell
                continue
            yield [word for number, word in enumerate(words) if number or not re.fullmatch("[A-Z_0-9]+=.*", word)]


def check(words: list[str]) -> None:
    """Raises one of REFUSALS for a command that is not there; what is no command of ours passes."""
    program, *rest = words or [""]
    program = program.removeprefix(".venv/bin/")
    if program in ("python", "torchrun") and "-m" in rest[:-1]:
        name, *rest = rest[rest.index("-m") + 1 :]
        if name.partition(".")[0] in OURS:
            _module(name, rest)
    elif program in PROGRAMS and rest:
        PROGRAMS[program](rest)


def _module(name: str, words: list[str]) -> None:
    parser = parsers(name)[0]
    if words:
        _is_target(getattr(parser.parse_args(words), "target", None))


def _t5(words: list[str]) -> None:
    command, name = typer.main.get_command(app), words[0]
    if not name.startswith("-"):
        if name not in command.commands:
            raise Wrong(f"t5 has no {name}")
        command, words = command.commands[name], words[1:]
    options = {option for each in command.params for option in each.opts}
    if len(words) == 1 and words[0] in options:  # named, without its value
        return
    command.make_parser(typer.Context(command)).parse_args(list(words))


def _make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, setting, value = word.partition("=")
        if not re.search(rf"^{name} *\?=" if setting else rf"^{name}:", makefile, re.MULTILINE):
            raise Wrong(f"make has no {name}")
        if name == "TARGET":
            variants = (f"-{each}" for each in ("quick", "full") if f"{each.upper()}=1" in words)
            _is_target(value + "".join(variants))


def _dvc(words: list[str]) -> None:
    parse_dvc(words)
    for stage, target in (word.split("@") for word in words if re.fullmatch(r"\w+@[\w-]+", word)):
        if stage not in STAGES:
            raise Wrong(f"no stage {stage}")
        _is_target(target.removesuffix("-set"))


def _prefect(words: list[str]) -> None:
    from prefect.cli._app import _app as app

    known = [str(uuid.UUID(int=0)) if word == "UUID" else word for word in words]
    app.parse_args(known, exit_on_error=False, print_error=False)
    if words[:2] == ["deployment", "run"]:
        deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
        if words[2] not in [f"{each['entrypoint'].partition(':')[2]}/{each['name']}" for each in deployments]:
            raise Wrong(f"no deployment {words[2]}")
        for word in words:
            if word.startswith("target="):
                _is_target(word.removeprefix("target="))


def _pytest(words: list[str]) -> None:
    for word in words:
        if word.startswith("tests/") and not (ROOT / word).exists():
            raise Wrong(f"no {word}")


PROGRAMS = {"t5": _t5, "make": _make, "dvc": _dvc, "prefect": _prefect, "pytest": _pytest}


def _is_target(name: str | None) -> None:
    """TARGET, <target> and my-target stand for one."""
    if name and name not in TARGETS and not re.match("[A-Z<]|my-", name):
        raise Wrong(f"no target {name}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_there_with_their_options(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    wrong = []
    for words in commands(page.read_text()):
        try:
            check(words)
        except REFUSALS as error:
            wrong.append(f"{' '.join(words)}: {error!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "t5 plann x",
        "t5 plan x --resolutions 518",
        "make demmo",
        "make demo TARGET=dinov3-fashion",
        "make demo TARGET=deit-tiny FULL=1",
        "python -m tasks.redyness sd35-medium",
        "python -m tasks.readiness sd35-medum",
        "python -m tasks.studies.seeds dit-micro --seed-numbers 0",
        "torchrun --nproc_per_node 4 -m tasks.finetun TARGET",
        "prefect deployment run t5/convert-vitt",
        "prefect deployment run t5/convert-vit --wach",
        "prefect deployment run t5/convert-vit --param target=deit-tinny",
        "dvc repro --puls",
        "dvc repro reprt@dinov2-fashion",
        "pytest tests/kernel",
    ],
)
def test_a_slip_in_a_command_is_seen(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    for text in (f"Say `{line}`.", f"Say:\n\n    {line}   # now\n", f"```sh\n{line}\n```\n"):
        [words] = [words for words in commands(text) if words]
        with pytest.raises(REFUSALS):
            check(words)


def test_continued_lines_comments_and_what_may_be_left_out():
    text = "    A=1 t5 plan x \\\n        --batch 8 [--fast]   # or not\n    dvc push && git push\n"
    assert list(commands(text)) == [["t5", "plan", "x", "--batch", "8"], ["dvc", "push"], ["git", "push"]]
