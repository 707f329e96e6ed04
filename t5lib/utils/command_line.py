"""Command lines whose help shows an example, and the default of every option."""

import argparse
import textwrap
from typing import Any


class Help(argparse.HelpFormatter):
    """Paragraphs of the description are wrapped, indented ones stand as they are; options tell their defaults."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip("\n").split("\n\n")
        return "\n\n".join(each if each[0] == " " else "\n".join(self._split_lines(each, width)) for each in paragraphs)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # names are left whole

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.nargs == 0 or action.default in (None, []) or "default" in text:
            return text
        return f"{text} (default: {_in_words(action.default)})"


def _in_words(default: Any) -> str:
    values = default if isinstance(default, list | tuple) else [default]
    return " ".join(map(str, values)).replace("%", "%%")


def parser(module: str, about: str, formatter: type[Help] = Help) -> argparse.ArgumentParser:
    """The command line of `python -m MODULE`.

    Args:
        about: what its help says first, such as the module's docstring, with an example as an indented paragraph.
    """
    return argparse.ArgumentParser(prog=f"python -m {module}", description=about, formatter_class=formatter)
