"""The stages as DVC knows them. There is no second list of them anywhere."""

import re
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

from flows.process import environment
from t5lib.utils.errors import T5Error

EDGE = re.compile(r'^"(?P<before>[^"]+)" -> "(?P<after>[^"]+)";$')
NODE = re.compile(r'^"(?P<name>[^"]+)";$')


def stages(root: Path, target: str) -> list[str]:
    """The names of a target's stages, each after those it depends on.

    Raises:
        T5Error: DVC cannot read dvc.yaml, or it has no stages for this target.
    """
    names = order(dvc_dag(root), target)
    if not names:
        raise T5Error(f"dvc.yaml has no stages for '{target}'; is it listed under `enabled` in params.yaml?")
    return names


def order(dot: str, target: str) -> list[str]:
    """The stages of `target` in a graph as `dvc dag --dot` prints it, by name without the target.

    Of several that could come next, the first in dvc.yaml does: DVC prints them in that order.
    """
    graph: dict[str, set[str]] = {}
    for line in map(str.strip, dot.splitlines()):
        if node := NODE.match(line):
            graph.setdefault(node["name"], set())
        elif edge := EDGE.match(line):
            graph.setdefault(edge["after"], set()).add(edge["before"])
    sorter, position, ordered, ready = TopologicalSorter(graph), list(graph), [], set()
    sorter.prepare()
    while sorter.is_active():
        ready |= set(sorter.get_ready())
        first = min(ready, key=position.index)
        ready.remove(first)
        sorter.done(first)
        ordered.append(first)
    return [name.removesuffix(f"@{target}") for name in ordered if name.endswith(f"@{target}")]


def dvc_dag(root: Path) -> str:
    run = subprocess.run(
        ["dvc", "--wait-for-lock", "dag", "--dot"], cwd=root, env=environment({}), capture_output=True, text=True
    )
    if run.returncode:
        raise T5Error(f"`dvc dag` failed: {run.stderr.strip() or run.stdout.strip()}")
    return run.stdout
