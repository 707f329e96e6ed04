"""params.yaml: reading it, checking the settings of a target, adding a target, also to `enabled`."""

import argparse
import ast
import difflib
import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from t5lib.utils.config import from_dict, shown
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_text, write_text

MOST_VALUES = 100_000  # of a file, what aliases repeat counted as often as it stands there
# Entries of a target that are no sections:
TAKES = "takes"  # what building it takes, in words
MADE_BY = "made_by"  # the command that wrote the target here (`write_changed`)
TARGET_NAME = re.compile(r"\w[\w-]*", re.ASCII)  # what DVC takes for a part of a stage's name


def read(root: Path | str = ".") -> dict[str, Any]:
    """The whole of params.yaml. Raises T5Error when it is missing, is not YAML, or has no `targets`."""
    path = Path(root) / "params.yaml"
    try:
        params = parsed(read_text(path), str(path))
    except FileNotFoundError:
        raise T5Error(f"{path.resolve()} does not exist; run this from the repository's folder") from None
    except UnicodeDecodeError as error:
        raise T5Error(f"{path} is not valid YAML: {error}") from None
    if not isinstance(params, dict) or not isinstance(params.get("targets"), dict):
        raise T5Error(f"{path} has no `targets:`; expected `targets: {{<name>: {{<section>: ...}}}}`")
    return params


class _Loader(yaml.SafeLoader):
    """YAML where each key of a mapping stands once; the last of two would win without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"'{key.value[:100]}' is given twice in a mapping, again on line {line}; drop one")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


def parsed(text: str, where: str) -> Any:
    """The plain values of a YAML text. `where` names its origin.

    Raises:
        T5Error: it is not YAML, a key is given twice, or aliases blow it up.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        many = node is not None and _count(node, {}) > MOST_VALUES
        values = loader.construct_document(node) if node is not None and not many else None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: such as a number of thousands of digits
        raise T5Error(f"{where} is not valid YAML: {_fault(error)}") from None
    except RecursionError:
        raise T5Error(f"{where} is nested too deeply, or contains itself; flatten it") from None
    if many:
        raise T5Error(f"{where} holds more than {MOST_VALUES} values once its aliases are expanded; write fewer")
    return values


def _fault(error: Exception) -> str:
    """In one line, with the number of the line of the text."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)[:500]
    began = error.context_mark
    context = f" ({error.context}, which begins in line {began.line + 1})" if error.context and began else ""
    return f"line {error.problem_mark.line + 1}: {error.problem}{context}"


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values it stands for where every alias is spelled out."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        inner = [each for pair in node.value for each in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_count(each, known) for each in inner)
    return known[id(node)]


def read_target(root: Path | str, target: str) -> dict[str, Any]:
    """The sections of `targets.<target>`. Raises T5Error that names the nearest target when there is none."""
    entry = _entry(root, target)
    if not isinstance(entry, dict):
        raise T5Error(f"params.yaml: targets.{target} is {shown(entry)}; expected a mapping of its sections")
    return {name: section for name, section in entry.items() if name not in (TAKES, MADE_BY)}


def takes(root: Path | str, target: str) -> str:
    """What building the target takes, in the words of params.yaml; "" where it does not say."""
    return str(_entry(root, target).get(TAKES, ""))


def _entry(root: Path | str, target: str) -> dict[str, Any]:
    targets = read(root)["targets"]
    if target not in targets:
        near = difflib.get_close_matches(target, targets, n=1, cutoff=0.3)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise T5Error(f"params.yaml has no target '{target}'; {hint}Targets: {', '.join(targets)}")
    return targets[target]


def checked(settings: dict[str, Any], sections: dict[str, type], where: str) -> dict[str, Any]:
    """The sections of a target, each as what it is, with its defaults.

    Args:
        sections: those that its kind of target has, and what each is.
        where: names the origin of `settings` in messages.

    Raises:
        T5Error: an unknown setting, a wrong type, a section that no stage reads, or a missing one.
    """
    for section in settings:
        if section not in sections:
            raise T5Error(
                f"{where}.{str(section)[:100]} is read by no stage; known sections: {', '.join(sorted(sections))}"
            )
    missing = [section for section in sections if section not in settings]
    if missing:
        raise T5Error(
            f"{where} lacks the sections {', '.join(missing)}; add them, empty if need be: {missing[0]}: {{}}"
        )
    if empty := [name for name, section in settings.items() if section is None]:
        raise T5Error(f"{where}.{empty[0]} is null; expected its settings, {{}} for the defaults")
    return {name: from_dict(sections[name], settings[name], f"{where}.{name}") for name in settings}


def add_changes(parser: argparse.ArgumentParser) -> None:
    """`--set`, for `changed` and tasks.targets.resolve."""
    metavar = "SECTION.NAME=VALUE"
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar=metavar, help="settings to replace (default: none)"
    )


def parse_with_changes(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of a command line with a target and --set and --as, which make a target of its own of it.

    Its name is `name`; without changes that is the target's.
    """
    add_changes(parser)
    parser.add_argument("--as", dest="name", metavar="NAME", help="the target that --set makes; default: TARGET-set")
    arguments = parser.parse_args()
    if arguments.name and not arguments.set:
        parser.error(f"--as {arguments.name} needs the settings to change; add them: --set SECTION.NAME=VALUE")
    arguments.name = arguments.name or f"{arguments.target}{'-set' if arguments.set else ''}"
    return arguments


def changed(settings: dict[str, Any], changes: Iterable[str], target: str) -> dict[str, Any]:
    """A copy of `settings` with values replaced by words such as `evaluate.sampling.steps=20`; values are YAML.

    A section that is not there is made; whether there may be one, and what it says, the check of all settings tells.

    Raises:
        T5Error: a word without "=", or a setting inside what is not a section.
    """
    settings = _spelled_out(settings)
    for word in changes:
        path, equals, value = word.partition("=")
        *sections, name = path.split(".")
        if not equals or not name:
            raise T5Error(f"--set {word}: expected SECTION.NAME=VALUE, such as finetune.steps=100")
        section: Any = settings
        for key in sections:
            if section.get(key) is None:
                section[key] = {}
            section = section[key]
            if not isinstance(section, dict):
                raise T5Error(f"--set {word}: '{key}' is not a section of {target}; expected SECTION.NAME=VALUE")
        section[name] = parsed(value, f"--set {path}")
    return settings


def _spelled_out(values: Any) -> Any:
    """A copy in which nothing stands in two places: a YAML alias is one object wherever it is used."""
    if isinstance(values, dict):
        return {key: _spelled_out(value) for key, value in values.items()}
    return [_spelled_out(value) for value in values] if isinstance(values, list) else values


def stage_modules(root: Path | str = ".") -> list[str]:
    """The names of the modules in tasks/ that are stages: those with a `READS`. Imports none of them."""
    return [path.stem for path in sorted((Path(root) / "tasks").glob("*.py")) if _assigns(path, "READS")]


def enable(root: Path | str, target: str) -> bool:
    """Add `target` to `enabled` in params.yaml, keeping its comments. False when it was there already."""
    read_target(root, target)
    if target in (read(root).get("enabled") or []):
        return False
    _edit(root, lambda text: with_enabled(text, target))
    return True


def with_enabled(text: str, target: str) -> str:
    """The text of params.yaml with `target` added to `enabled`, all else as it was."""

    def add(params: Any) -> None:
        params["enabled"] = params.get("enabled") or []
        params["enabled"].append(target)

    return _edited(text, add)


def check_name(root: Path | str, name: str) -> None:
    """Raises T5Error unless `write_changed` may write a target of this name: a new one, or one that it wrote."""
    if not TARGET_NAME.fullmatch(name):
        raise T5Error(f"'{name[:100]}' is not a name for a target; expected letters, digits, - and _, such as my-quick")
    there = read(root)["targets"].get(name)
    if there is not None and not (isinstance(there, dict) and MADE_BY in there):
        raise T5Error(f"params.yaml already defines a target '{name}'; take another name, such as --as {name}-2")


def write_changed(root: Path | str, target: str, changes: Sequence[str], name: str) -> None:
    """Write a copy of `target` with values replaced (`changed`) to params.yaml, as the target `name`.

    Every setting is spelled out, for DVC and for readers. An earlier one that was written so is replaced.

    Raises:
        T5Error: as `changed` and `check_name`.
    """
    check_name(root, name)
    made_by = f"python -m flows.t5 {target} --set {' '.join(changes)}"
    entry = {MADE_BY: made_by, **changed(read_target(root, target), changes, target)}
    if read(root)["targets"].get(name) != entry:
        _edit(root, lambda text: _with_entry(text, name, entry))


def _with_entry(text: str, name: str, entry: dict[str, Any]) -> str:
    """The text of params.yaml with this target, in the place of one of this name or as the last."""
    # PyYAML chooses the words, for it is to read them: ruamel writes 5e-05, which is text to it
    worded = _editor().load(yaml.safe_dump(entry, sort_keys=False))
    return _edited(text, lambda params: params["targets"].update({name: worded}))


def _edit(root: Path | str, change: Callable[[str], str]) -> None:
    path = Path(root) / "params.yaml"
    write_text(path, change(path.read_text(encoding="utf-8")))


def _edited(text: str, change: Callable[[Any], None]) -> str:
    """A YAML text after `change` of what it holds; all else as it was."""
    editor, out = _editor(), io.StringIO()
    params = editor.load(text)
    change(params)
    editor.dump(params, out)
    return out.getvalue()


def _editor() -> Any:
    from ruamel.yaml import YAML

    editor = YAML()  # round trip: comments and quotes survive
    editor.preserve_quotes = True
    editor.width = 10_000
    editor.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    return editor


def _assigns(path: Path, name: str) -> bool:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    targets = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
    return any(isinstance(t, ast.Name) and t.id == name for t in targets)
