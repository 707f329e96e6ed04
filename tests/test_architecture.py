"""The rules that hold the packages, dvc.yaml, params.yaml and prefect.yaml together.

flows → tasks → t5lib → t5kernels; what a stage reads is what DVC watches; every deployment and target can be built.
"""

import ast
import functools
import importlib
import subprocess
from pathlib import Path

import pytest
import yaml

import t5lib
from tasks.runtime import params
from tasks.studies.ablation import definition

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {"flows": "flows", "tasks": "tasks", "t5lib": "t5lib", "t5kernels": "kernels/t5kernels"}
SERVICES = {"prefect", "dvc", "mlflow"}
DVC_STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
STAGES = params.stage_modules(ROOT)
OF_DENOISERS = [path.stem for path in (ROOT / "tasks/denoisers").glob("*.py") if path.stem in STAGES]

# How a stage is run and how files are read; none of it decides about a result.
PLUMBING = {
    *("tasks/runtime/stage.py", "tasks/runtime/params.py", "tasks/runtime/readiness.py", "tasks/runtime/tracking.py"),
    *(
        "t5lib/__init__.py",
        "t5lib/utils/errors.py",
        "t5lib/utils/config.py",
        "t5lib/utils/files.py",
        "t5lib/utils/progress.py",
    ),
}
# Code of which a stage uses a part that leads no further: an edit behind it must not cause a download or a calibration.
NOT_FOLLOWED = {
    "fetch": "t5lib/checkpoint.py",  # saves a softmax model
    "diagnose": "tasks/targets/classifier.py",  # device()
    "explain": "tasks/targets/classifier.py",  # device()
    "calibrate": "tasks/targets/classifier.py",  # device(), stream()
    "shards": "tasks/targets/classifier.py",  # device()
    "report": "t5lib/benchmarks/resolution_sweep.py",  # sentences about its rows
}


def python_files(layer):
    return sorted((ROOT / LAYERS[layer]).rglob("*.py"))


@functools.cache
def imports(path):
    """(module, name or None) of every import in a file, with names used as attributes of a package: t5lib.load."""
    found, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the rules here are told by full names"
            found |= {(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in LAYERS:
            found.add((node.value.id, node.attr))
    return frozenset(found)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer):
    order = list(LAYERS)
    above = set(order[: order.index(layer)])
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in python_files(layer)
        for module, _ in imports(path)
        if module.split(".")[0] in above
    ]
    assert wrong == []


@pytest.mark.parametrize("layer", LAYERS)
def test_each_service_is_used_by_its_one_owner(layer):
    owners = {"flows": {"prefect"}, "tasks": {"mlflow"}}.get(layer, set())
    for path in python_files(layer):
        used = {module.split(".")[0] for module, _ in imports(path)} & SERVICES
        allowed = owners if layer == "flows" or path.name == "tracking.py" else set()
        assert used <= allowed, f"{path.relative_to(ROOT)} imports {used - allowed}"


def test_the_kernels_know_neither_models_nor_the_library():
    known, optional = {"torch", "triton", "t5kernels"}, {"natten.py": {"natten"}}
    for path in python_files("t5kernels"):
        used = {module.split(".")[0] for module, _ in imports(path)}
        foreign = used - known - optional.get(path.name, set()) - set(__import__("sys").stdlib_module_names)
        assert foreign == set(), f"{path.relative_to(ROOT)} imports {foreign}"


def test_dvc_and_tasks_have_the_same_stages():
    assert sorted(DVC_STAGES) == sorted(STAGES)


@pytest.mark.parametrize("stage", DVC_STAGES)
def test_a_dvc_stage_runs_its_module_for_every_enabled_target_and_owns_its_outputs(stage):
    entry = DVC_STAGES[stage]
    assert entry["foreach"] == "${enabled}"
    assert entry["do"]["cmd"] == f"python -m tasks.{stage} ${{item}}"
    assert entry["do"]["outs"] == [f"data/out/${{item}}/{stage}"]
    assert entry["do"]["metrics"] == [{f"data/out/${{item}}/{stage}.json": {"cache": False}}]


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_watches_every_setting_that_a_stage_reads(stage):
    for module in modules_of(stage):
        names = sorted(f"targets.${{item}}.{name}" for name in importlib.import_module(module).SECTIONS)
        assert sorted(DVC_STAGES[stage]["do"].get("params", [])) == names


def modules_of(stage):
    """The stage's modules, for classifiers and, where they have their own, for denoisers."""
    return [f"tasks.{stage}", *([f"tasks.denoisers.{stage}"] if stage in OF_DENOISERS else [])]


def test_the_modules_of_denoisers_stand_for_stages():
    helpers = {"data", "judge", "latents", "pipeline", "real", "training"}
    assert {path.stem for path in (ROOT / "tasks/denoisers").glob("[!_]*.py")} == helpers | set(OF_DENOISERS)
    assert {params.kind(target) for target in PARAMS["targets"].values()} == {"classifier", "denoiser"}


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_watches_the_code_that_decides_about_a_stages_result(stage):
    needed = code_of(stage)
    deps = [dep for dep in DVC_STAGES[stage]["do"]["deps"] if not dep.startswith("data/")]
    wrong = [f"add {path}" for path in sorted(needed) if not any(covers(dep, path) for dep in deps)]
    wrong += [f"drop {dep}" for dep in deps if not any(covers(dep, path) for path in needed | {"t5lib/templates"})]
    assert not wrong, f"dvc.yaml, {stage}: {', '.join(wrong)}"


def covers(dep, path):
    return path == dep or path.startswith(f"{dep}/")


def code_of(stage):
    """Our files that a stage imports, directly or not, lazily or not."""
    seen, todo = set(), [f"{module.replace('.', '/')}.py" for module in modules_of(stage)]
    while todo:
        path = todo.pop()
        if path in seen or path in PLUMBING:
            continue
        seen.add(path)
        if path != NOT_FOLLOWED.get(stage):
            todo += [str(file.relative_to(ROOT)) for file in map(file_of, imports(ROOT / path)) if file]
    return seen


def file_of(imported):
    """The file of ours that (module, name) comes from; None for other people's."""
    module, name = imported
    top, *rest = module.split(".")
    if top not in LAYERS:
        return None
    if module == "t5lib" and name in t5lib._HOMES:
        rest, name = t5lib._HOMES[name].split("."), None
    base = ROOT.joinpath(LAYERS[top], *rest)
    options = [base / f"{name}.py", base / f"{name}/__init__.py", base.with_suffix(".py"), base / "__init__.py"]
    return next(path for path in options if path.is_file())


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_watches_every_input_that_a_stage_names(stage):
    deps = DVC_STAGES[stage]["do"]["deps"]
    for module in modules_of(stage):
        for method, ending in (("input", ""), ("metrics", ".json")):
            for name in named_in_calls(ROOT / f"{module.replace('.', '/')}.py", method):
                assert f"data/out/${{item}}/{name}{ending}" in deps


def named_in_calls(path, method):
    """The string literals in calls such as stage.input("convert")."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    methods = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == method]
    return {call.args[0].value for call in methods if call.args and isinstance(call.args[0], ast.Constant)}


@pytest.mark.parametrize("target", PARAMS["targets"])
def test_every_target_has_valid_settings_for_every_stage(target):
    settings = params.resolve(ROOT, target)
    told = {"inner", "key_norm", "locality"}  # the tags that tell runs apart
    assert told <= set(PARAMS["targets"][target]["convert"])
    assert settings.keys() == PARAMS["targets"][target].keys()


def test_enabled_targets_exist_and_adding_one_changes_one_line():
    assert set(PARAMS["enabled"]) <= set(PARAMS["targets"])
    before = (ROOT / "params.yaml").read_text().splitlines()
    after = params.with_enabled((ROOT / "params.yaml").read_text(), "deit-tiny").splitlines()
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 1
    assert "deit-tiny]" in changed[0]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_every_deployment_builds_a_target_or_an_ablation_that_exists(deployment):
    (parameter,) = deployment["parameters"].items()
    known = {"target": PARAMS["targets"], "name": PARAMS["ablations"]}
    assert parameter[1] in known[parameter[0]]
    assert deployment["entrypoint"] == {"target": "flows/t5.py:t5", "name": "flows/ablate.py:ablate"}[parameter[0]]


@pytest.mark.parametrize("name", PARAMS["ablations"])
def test_every_ablation_has_valid_settings_and_shows_every_variant(name):
    plan = definition.resolve(ROOT, name)
    assert {unit.variant for unit in plan.units} == set(PARAMS["ablations"][name]["variants"])
    assert plan.unit(plan.control).settings["convert"] is None


def test_no_section_is_another_ones_by_alias():
    """`dvc exp run -S` edits params.yaml as a tree; where two sections are one object, one undoes the other."""
    sections = [section for target in PARAMS["targets"].values() for section in target.values()]
    assert len({id(section) for section in sections}) == len(sections), "write {<<: *name} in place of *name"


def test_a_run_dirties_nothing_that_git_tracks():
    def ignored(path):
        return subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode == 0

    for made in ("out/x/convert/model.safetensors", "out/x/convert.json", "scratch/x", "mlflow/mlflow.db", "prefect/x"):
        assert ignored(f"data/{made}")
    assert not ignored("dvc.lock")  # DVC refuses to work otherwise; whoever wants to pin results commits it
    assert not ignored("data/fashion-mnist/train.json")
