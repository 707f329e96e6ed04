"""Command lines about a target: their help names those of params.yaml."""

import argparse

from t5lib.utils import command_line
from t5lib.utils.errors import T5Error
from tasks.runtime import params


class _Help(command_line.Help):
    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action)
        return text + _names().replace("%", "%%") if action.dest == "target" else text


def _names() -> str:
    try:
        return f": {', '.join(map(str, params.read()['targets']))}"
    except T5Error:  # told when it is needed
        return ", such as dinov2-fashion"


def parser(module: str, about: str) -> argparse.ArgumentParser:
    """Make a parser as t5lib.utils.command_line.parser does."""
    return command_line.parser(module, about, _Help)


def add_target(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """The argument `target`, which may be left out where there is a default."""
    about = "a section of `targets` in params.yaml"
    parser.add_argument("target", nargs="?" if default else None, default=default, help=about)
