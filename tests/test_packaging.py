"""What a wheel installs, and that a library which is missing is told with the extra that it comes with."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from command_line import refused
from imports import ROOT

import t5lib
from t5lib.cli import pipelines
from t5lib.utils.errors import T5Error
from t5lib.utils.extras import EXTRAS, extras_named

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = "from setuptools import build_meta as b; b.build_sdist({0!r}); b.build_wheel({0!r})"
LOOK = "import t5lib; print(t5lib.__file__)"
USE = """
import timm, torch, t5lib
model = timm.create_model("deit_tiny_patch16_224", depth=1, embed_dim=32, num_heads=2, img_size=32, patch_size=8)
print(t5lib.__file__)
assert t5lib.convert(model)(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """Wheel and source distribution (.whl, .gz) of a copy of the repository, made without a network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in ("flows", "tasks", "t5lib", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    (source / "data").mkdir()
    subprocess.run([sys.executable, "-c", BUILD.format(str(out))], cwd=source, check=True, capture_output=True)
    return {path.suffix: path for path in out.iterdir()}


@pytest.fixture(scope="module")
def wheel(built) -> zipfile.ZipFile:
    return zipfile.ZipFile(built[".whl"])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "program"), [(".whl", USE), (".gz", LOOK)], ids=["wheel", "sdist"])
def test_a_fresh_environment_installs_it_and_finds_the_library_there(built, kind, program, tmp_path):
    """No network is asked: the libraries that it needs are lent by the environment of the tests."""
    venv.create(tmp_path / "env")
    python, environment = tmp_path / "env/bin/python", {**os.environ, "PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}
    [packages] = (tmp_path / "env").glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib"))

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        return done.stdout

    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, built[kind])
    assert run(python, "-c", program) == f"{packages}/t5lib/__init__.py\n"
    assert run(tmp_path / "env/bin/t5", "--version") == f"t5 {PROJECT['version']}\n"


def test_a_wheel_installs_the_two_packages_and_no_other_name(wheel):
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"t5lib", "t5kernels"}
    files = {f"t5lib/{path.relative_to(ROOT / 't5lib')}" for path in (ROOT / "t5lib").rglob("*.py")}
    assert files < {*wheel.namelist()}


def test_a_wheel_holds_what_is_no_code_and_the_command(wheel):
    names = wheel.namelist()
    assert {"t5lib/py.typed", "t5kernels/py.typed", "t5lib/report/template/report.html.j2"} < {*names}
    [commands] = [name for name in names if name.endswith("entry_points.txt")]
    assert "t5 = t5lib.cli:app" in wheel.read(commands).decode()


def test_every_library_of_an_extra_is_told_with_it():
    """A library is imported under another name than it is installed by, so the names are looked up."""
    distributions = {name: {d.lower().replace("_", "-") for d in of} for name, of in packages_distributions().items()}
    for library, extra in EXTRAS.items():
        needed = " ".join(PROJECT["optional-dependencies"][extra]).replace("_", "-")
        names = distributions[library] if library in distributions else {library.replace("_", "-")}
        assert any(name in needed for name in names), f"{library} is not in the extra {extra}"


def test_a_missing_library_names_its_extra_and_another_error_stays_as_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "t5lib.pipelines", raising=False)
    monkeypatch.delitem(vars(t5lib), "load_pipeline", raising=False)
    with pytest.raises(T5Error, match=r"diffusers is not installed; pip install 't5-ttt\[diffusion\]'"):
        t5lib.load_pipeline  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match="no_such_library"), extras_named():
        import no_such_library  # noqa: F401


def test_the_commands_name_the_extra_too(monkeypatch, tmp_path):
    def missing(_folder):
        raise ModuleNotFoundError(name="diffusers")

    monkeypatch.setattr(pipelines, "inspect", missing)
    (tmp_path / "model_index.json").write_text("{}")
    assert "diffusers is not installed; pip install 't5-ttt[diffusion]'" in refused("inspect", tmp_path)
