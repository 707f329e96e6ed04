"""A small pipeline in a git repository of its own, with the real flow, DVC and tasks/ machinery and stand-in stages."""

import gc
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tasks import targets
from tasks.runtime import tracking
from tasks.runtime.tracking import store

ROOT = Path(__file__).resolve().parents[1]
FORK_NOTHING = ("tests/kernels", "tests/t5lib/layers")
# pytest gives loggers that do not propagate its handler, and with any handler torch writes out all that it traces.
logging.getLogger("torch.__trace").propagate = True
# Operations this small take longer to hand out to threads than to do, all the more beside another worker. A process
# forked from here would also wait without end for threads that it does not have.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):  # nothing here may reach a server of the user's
    os.environ.pop(name, None)

# The kind of target that the stand-in has, in the place of classifiers. What a stage does is a setting: `fail` is the
# message it fails with, `seconds` how long it takes.
TARGET = """
from t5lib.utils.config import settings
from tasks.runtime.needs import Needs

@settings
class Config:
    inner: str = "swiglu"
    steps: int = 3
    seconds: float = 0.0
    fail: str = ""
    retryable: bool = False
    crash: bool = False

@settings
class ConvertConfig(Config):
    key_norm: str = ""
    locality: str = ""

class ClassifierTarget:
    SECTIONS = {"fetch": Config, "convert": ConvertConfig, "evaluate": Config}

    @classmethod
    def check(cls, sections, root):
        pass

    @classmethod
    def needs(cls, sections, root, target, *, online, pieces):
        return Needs()

    def __init__(self, stage):
        self.stage = stage
"""
STAGE = """
import time

from t5lib.utils.errors import SourceError, T5Error
from tasks.targets.run import main

READS = ("{name}",)

def run(target):
    stage = target.stage
    config = stage.params(target.SECTIONS["{name}"])
    inputs = [stage.input(name).joinpath("result.txt").read_text() for name in {inputs}]
    print(f"{name} at work")
    with (stage.root / f"data/{name}.calls").open("a") as calls:
        calls.write("called\\n")
    time.sleep(config.seconds)
    if config.fail:
        raise SourceError(config.fail, retryable=True) if config.retryable else T5Error(config.fail)
    if config.crash:
        raise ZeroDivisionError("division by zero")
    for step in range(config.steps):
        stage.log({{"loss": 1 / (1 + step)}}, step)
    (stage.out / "result.txt").write_text(config.inner + "".join(inputs))
    stage.artifact(stage.out / "result.txt")
    return {{"score": float(config.steps), "told": config.inner}}

if __name__ == "__main__":
    main(run)
"""

PARAMS = """\
enabled: [small]   # a comment that must survive
targets:
  small:
    takes: a moment
    fetch: {inner: "2"}
    convert: {inner: swiglu, key_norm: instance, locality: none}
    evaluate: {steps: 0}
  other:
    fetch: {inner: "3"}
    convert: {inner: two_layer, key_norm: instance, locality: none}
    evaluate: {steps: 0}
"""

INPUTS = {"fetch": [], "convert": ["fetch"], "evaluate": ["fetch", "convert"]}


@pytest.fixture(autouse=True)
def collections_look_at_what_is_new():
    """What a test finds in memory stays, modules above all. A full collection, as Accelerate asks for after every
    training, would look through it for half a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or nanobind would tell of leaks


def pytest_collection_modifyitems(items) -> None:
    """Tests that run Prefect in process come late: its threads make DataLoader workers forked later exit with 1.

    Those that need a card are skipped where there is none.
    """
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    """1 for tests that run Prefect in process, 2 for those that fork nothing and may follow them or run beside them.

    The latter take as long as the former: of two workers neither is left without work.
    """
    group = item.get_closest_marker("xdist_group")
    if group is not None and group.args[0] == "prefect":
        return 1
    return 2 if any(item.path.is_relative_to(ROOT / folder) for folder in FORK_NOTHING) else 0


@pytest.fixture(scope="session")
def groups():
    """Groups of two and of four processes that work together (tests/helpers/group.py), for the tests of one worker."""
    from group import Group

    with Group(2) as two, Group(4) as four:
        yield {2: two, 4: four}


class SmallRepo:
    """A repository with the stages fetch → convert → evaluate, and what tests do with it."""

    STAGES = tuple(INPUTS)

    def __init__(self, root: Path):
        self.root = root

    def set(self, old: str, new: str, file: str = "params.yaml") -> None:
        """Replace the first `old` in a file."""
        text = (self.root / file).read_text()
        assert old in text
        (self.root / file).write_text(text.replace(old, new, 1))

    def calls(self) -> list[int]:
        """How often each stage was run, in order."""
        files = [self.root / f"data/{name}.calls" for name in self.STAGES]
        return [len(file.read_text().splitlines()) if file.exists() else 0 for file in files]

    def run(self, *command: str, **extra: str) -> subprocess.CompletedProcess:
        """Run a command there, with this Python first on the path."""
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **extra}
        return subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True, timeout=120)

    def recorded(self, **tags: str) -> list:
        """The MLflow runs with these tags, oldest first."""
        client = store.client(self.root)
        runs = client.search_runs([store.experiment(client, self.root)], order_by=["start_time ASC"])
        return [run for run in runs if tags.items() <= run.data.tags.items()]

    def git(self, *arguments: str) -> str:
        me = {f"GIT_{who}_{what}": "t5@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        run = self.run("git", *arguments, **me)
        assert run.returncode == 0, run.stderr
        return run.stdout


LIBRARIES = ("mlflow.store.tracking.sqlalchemy_store",)  # the stages import nothing else that takes long


@pytest.fixture
def small_repo(tmp_path, monkeypatch) -> SmallRepo:
    """It is also the working folder."""
    monkeypatch.setattr(targets, "_LIBRARIES", {"classifier": LIBRARIES})
    repo = made_repo(tmp_path / "repo")
    monkeypatch.chdir(repo.root)
    return repo


def made_repo(root: Path) -> SmallRepo:
    for module in ("__init__", "targets/__init__", "targets/__main__", "targets/run", "targets/diffusers_folder"):
        (root / f"tasks/{module}.py").parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f"tasks/{module}.py", root / f"tasks/{module}.py")
    shutil.copytree(ROOT / "tasks/runtime", root / "tasks/runtime", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tasks/targets/classifier.py").write_text(TARGET)
    kinds = root / "tasks/targets/__init__.py"
    kinds.write_text(f"{kinds.read_text()}\n_LIBRARIES = {{'classifier': {LIBRARIES}}}\n")
    for name, inputs in INPUTS.items():
        (root / f"tasks/{name}.py").write_text(STAGE.format(name=name, inputs=inputs))
    (root / "params.yaml").write_text(PARAMS)
    (root / "dvc.yaml").write_text("stages:\n" + "".join(_dvc_stage(name, inputs) for name, inputs in INPUTS.items()))
    for name in (".gitignore", "prefect.toml", ".dvcignore", ".dvc/config", ".dvc/.gitignore"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "flows", root / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    repo = SmallRepo(root)
    repo.git("init", "-q")
    repo.git("add", "-A")
    repo.git("commit", "-qm", "start")
    return repo


def _dvc_stage(name: str, inputs: list[str]) -> str:
    deps = [f"tasks/{name}.py", *(f"data/out/${{item}}/{other}" for other in inputs)]
    stage = f"""\
        {name}:
          foreach: ${{enabled}}
          do:
            cmd: python -m tasks.{name} ${{item}}
            deps: {deps}
            params: ["targets.${{item}}.{name}"]
            outs: ["data/out/${{item}}/{name}"]
            metrics: ["data/out/${{item}}/{name}.json"]
        """
    return textwrap.indent(textwrap.dedent(stage), "  ")


@pytest.fixture(scope="session")
def make_small_repo():
    """For tests that share a small repository: a function that makes one in a folder."""
    return made_repo


@pytest.fixture
def as_stage(monkeypatch):
    """Make a function the stage `tasks.<name>` for run_stage; it is given the stage itself."""

    def register(name: str, config: type, run) -> None:
        def bare(stage):
            """A kind of target that adds nothing to its stage."""
            return stage

        module = ModuleType(f"tasks.{name}")
        module.READS, module.run, bare.SECTIONS = (name,), run, {name: config}
        monkeypatch.setitem(sys.modules, f"tasks.{name}", module)
        monkeypatch.setattr("tasks.targets.run.kind", lambda settings: bare)

    return register


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory) -> Path:
    """An MLflow store without runs; making its tables takes seconds."""
    root = tmp_path_factory.mktemp("mlflow")
    store.client(root)
    return root / tracking.FOLDER


@pytest.fixture
def mlflow_repo(small_repo, empty_mlflow) -> SmallRepo:
    """The small repository with an MLflow store."""
    shutil.copytree(empty_mlflow, small_repo.root / tracking.FOLDER)
    return small_repo


@pytest.fixture
def unrecorded(small_repo, monkeypatch):
    """Child processes run as if MLflow were not installed: they are quicker, and it must work."""
    (small_repo.root / "site").mkdir()
    (small_repo.root / "site/sitecustomize.py").write_text('import sys; sys.modules["mlflow"] = None')
    monkeypatch.setenv("PYTHONPATH", str(small_repo.root / "site"), prepend=os.pathsep)
