"""What our files import, and what a stage comes to use of it by way of its target; read from the code, nothing runs."""

import ast
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import t5lib

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {"flows": "flows", "tasks": "tasks", "t5lib": "t5lib", "t5kernels": "kernels/t5kernels"}


def files_of(folder: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py"))


TARGETS = files_of("tasks/targets")


@functools.cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


@functools.cache
def modules(file: str) -> frozenset[str]:
    """The full names of all modules that a file imports, in functions too."""
    names: set[str] = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; the rules here are told by full names"
            names.add(node.module)
    return frozenset(names)


@functools.cache
def imports(file: str) -> frozenset[str]:
    """Our files that a file imports, in functions too, or names as an attribute of a package, such as t5lib.load."""
    return frozenset(_named(file)) - {file}


def _named(file: str) -> Iterator[str]:
    for node in ast.walk(tree(file)):
        names: list[tuple[str, str | None]] = []
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in LAYERS:
            names = [(node.value.id, node.attr)]
        for module, name in names:
            if found := file_of(module, name):
                yield found


def file_of(module: str, name: str | None) -> str | None:
    """The file of ours that `name` of `module` comes from; None for other people's."""
    top, *rest = module.split(".")
    if top not in LAYERS:
        return None
    if module == "t5lib" and name in t5lib._HOMES:
        rest, name = t5lib._HOMES[name].split("."), None
    base = ROOT.joinpath(LAYERS[top], *rest)
    options = [base / f"{name}.py", base / f"{name}/__init__.py", base.with_suffix(".py"), base / "__init__.py"]
    return next(str(path.relative_to(ROOT)) for path in options if path.is_file())


def circles(edges: dict[str, Iterable[str]]) -> list[list[str]]:
    """Groups of more than one node that reach each other."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for node in edges.get(todo.pop(), ()):
                if node not in seen:
                    seen.add(node)
                    todo.append(node)
        return seen

    reach = {node: reached(node) for node in edges}
    groups = {frozenset(n for n in reach if n in reach[m] and m in reach[n]) for m in reach if m in reach[m]}
    return sorted(sorted(group) for group in groups)


def used_by(stage: str) -> set[str]:
    """Our files, those of tasks/targets aside, that a stage uses, directly or through what it asks of its target.

    Of tasks/targets only the methods and functions count that the stage calls, whichever kind they are of; of other
    files everything they import does.
    """
    files, seen, todo = set(), set(), [(f"tasks/{stage}.py", None)]
    while todo:
        place = todo.pop()
        if place in seen:
            continue
        seen.add(place)
        file, name = place
        for node in [tree(file)] if name is None else _definitions(file).get(name, []):
            for found, inner in _references(file, node):
                if found == "tasks/targets/run.py":
                    continue  # how a stage is run, and that all settings are checked before, decides about no result
                if found in TARGETS:
                    todo.append((found, inner))
                elif found.count("/") == 1 and found.startswith("tasks/"):
                    todo.append((found, None))  # another stage
                    files.add(found)
                else:
                    files.add(found)
    return files | {f"tasks/{stage}.py"}


def closure(files: Iterable[str], stop: frozenset[str]) -> set[str]:
    """These files and all that they import; imports of those in `stop` are not followed."""
    seen, todo = set(), list(files)
    while todo:
        file = todo.pop()
        if file in seen or file in TARGETS:
            continue
        seen.add(file)
        if file not in stop and not file.startswith("tasks/"):
            todo += imports(file)
    return seen


@functools.cache
def _definitions(file: str) -> dict[str, list[ast.AST]]:
    """Functions by name, methods by ".name", and of a class its __init__."""
    found: dict[str, list[ast.AST]] = {}
    for node in tree(file).body:
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    name = node.name if method.name == "__init__" else f".{method.name}"
                    found.setdefault(name, []).append(method)
    return found


def _references(file: str, node: ast.AST) -> Iterator[tuple[str, str | None]]:
    """(file, name) of what of ours is named inside of `node`."""
    bound = _bound(file)
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id in bound:
            yield bound[part.id]
        elif isinstance(part, ast.Name) and part.id in _definitions(file):
            yield file, part.id
        elif isinstance(part, ast.Attribute):
            if isinstance(part.value, ast.Name) and part.value.id == "t5lib":
                yield file_of("t5lib", part.attr), None
            yield from ((other, f".{part.attr}") for other in TARGETS if f".{part.attr}" in _definitions(other))


@functools.cache
def _bound(file: str) -> dict[str, tuple[str, str]]:
    """Names that imports bind in a file, and what of ours they stand for."""
    nodes = [node for node in ast.walk(tree(file)) if isinstance(node, ast.ImportFrom)]
    pairs = [(alias, file_of(node.module, alias.name)) for node in nodes for alias in node.names]
    return {alias.asname or alias.name: (found, alias.name) for alias, found in pairs if found}
