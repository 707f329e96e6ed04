"""params.yaml: reading it, checking a whole target before any work starts, adding a target to `enabled`.

`python -m tasks.runtime.params dinov2-fashion` checks every section of that target and prints the settings with their defaults.
"""

import argparse
import ast
import difflib
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from t5lib.utils.config import from_dict, to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import write_text
from tasks.runtime import readiness


def read(root: Path | str = ".") -> dict[str, Any]:
    """The whole of params.yaml. Raises T5Error when it is missing, is not YAML, or has no `targets`."""
    path = Path(root) / "params.yaml"
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise T5Error(f"{path.resolve()} does not exist; run this from the repository's folder") from None
    except yaml.YAMLError as error:
        raise T5Error(f"{path} is not valid YAML: {error}") from None
    if not isinstance(params, dict) or not isinstance(params.get("targets"), dict):
        raise T5Error(f"{path} has no `targets:`; expected `targets: {{<name>: {{<section>: ...}}}}`")
    return params


def read_target(root: Path | str, target: str) -> dict[str, Any]:
    """The section `targets.<target>`. Raises T5Error that names the nearest target when there is none."""
    targets = read(root)["targets"]
    if target not in targets:
        near = difflib.get_close_matches(target, targets, n=1, cutoff=0.3)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise T5Error(f"params.yaml has no target '{target}'; {hint}Targets: {', '.join(targets)}")
    return targets[target]


def resolve(root: Path | str, target: str) -> dict[str, Any]:
    """Every section of a target with its defaults filled in, as plain values.

    Raises:
        T5Error: an unknown setting, a wrong type, or a section that no stage reads.
    """
    return checked(root, read_target(root, target), f"params.yaml: targets.{target}")


def checked(root: Path | str, settings: dict[str, Any], where: str) -> dict[str, Any]:
    """The sections of a target with their defaults filled in; `where` names their origin. Raises as `resolve` does."""
    classes = _sections(Path(root), settings)
    for section in settings:
        if section not in classes:
            raise T5Error(f"{where}.{section} is read by no stage; known sections: {', '.join(sorted(classes))}")
    missing = [section for section in classes if section not in settings]
    if missing:
        raise T5Error(
            f"{where} lacks the sections {', '.join(missing)}; add them, empty if need be: {missing[0]}: {{}}"
        )
    return {name: to_dict(from_dict(classes[name], settings[name], f"{where}.{name}")) for name in settings}


def resolve_with(root: Path | str, target: str, changes: list[str]) -> dict[str, Any]:
    """`resolve`, with values replaced by command line words such as `evaluate.sampling.steps=20`; values are YAML.

    Raises:
        T5Error: as `resolve`, and for a word without "=" or a setting inside of what is no section.
    """
    settings = resolve(root, target)
    for word in changes:
        path, equals, value = word.partition("=")
        *sections, name = path.split(".")
        if not equals or not sections:
            raise T5Error(f"--set {word}: expected SECTION.NAME=VALUE, such as finetune.steps=100")
        section = settings
        for key in sections:
            section = section.get(key)
            if not isinstance(section, dict):
                raise T5Error(f"--set {word}: '{key}' is no section of {target}; expected SECTION.NAME=VALUE")
        section[name] = yaml.safe_load(value)
    return checked(root, settings, f"{target} with --set")


def kind(settings: dict[str, Any]) -> str:
    """What a target's model is, which its fetch section tells: a diffusers pipeline's "denoiser", or a "classifier"."""
    return "denoiser" if (settings.get("fetch") or {}).get("format") == "pipeline" else "classifier"


def stage_module(name: str, settings: dict[str, Any]) -> ModuleType:
    """The module of stage `name` for a target with these settings: of some stages denoisers have their own."""
    special = f"tasks.denoisers.{name}"
    if kind(settings) == "denoiser" and importlib.util.find_spec(special):
        return importlib.import_module(special)
    return importlib.import_module(f"tasks.{name}")


def stage_modules(root: Path | str = ".") -> list[str]:
    """The names of the modules in tasks/ that are stages: those with a `SECTIONS`. Imports none of them."""
    return [path.stem for path in sorted((Path(root) / "tasks").glob("*.py")) if _assigns(path, "SECTIONS")]


def enable(root: Path | str, target: str) -> bool:
    """Add `target` to `enabled` in params.yaml, keeping its comments. False when it was there already."""
    read_target(root, target)
    if target in (read(root).get("enabled") or []):
        return False
    path = Path(root) / "params.yaml"
    write_text(path, with_enabled(path.read_text(encoding="utf-8"), target))
    return True


def with_enabled(text: str, target: str) -> str:
    """The text of params.yaml with `target` added to `enabled`, all else as it was."""
    import io

    from ruamel.yaml import YAML

    editor = YAML()  # round trip: comments and quotes survive
    editor.preserve_quotes = True
    editor.width = 10_000
    editor.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    params = editor.load(text)
    params["enabled"] = params.get("enabled") or []
    params["enabled"].append(target)
    out = io.StringIO()
    editor.dump(params, out)
    return out.getvalue()


def _sections(root: Path, settings: dict[str, Any]) -> dict[str, type]:
    classes: dict[str, type] = {}
    for name in stage_modules(root):
        classes.update(stage_module(name, settings).SECTIONS)
    return classes


def _assigns(path: Path, name: str) -> bool:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    targets = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
    return any(isinstance(t, ast.Name) and t.id == name for t in targets)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.runtime.params", description=__doc__)
    parser.add_argument("target", help="a section of `targets` in params.yaml")
    parser.add_argument("--ready", action="store_true", help="also see that its weights and images can be had")
    args = parser.parse_args()
    try:
        settings = resolve(".", args.target)
        if args.ready:
            readiness.check(Path("."), args.target, settings)
        print(json.dumps(settings))
    except T5Error as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
