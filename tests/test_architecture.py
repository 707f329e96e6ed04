"""The rules that hold the packages, dvc.yaml, params.yaml and prefect.yaml together.

flows → tasks → t5lib → t5kernels, and in order inside of them; what a stage reads is what DVC watches; two contracts
answer which kind of model it is; every deployment and target can be built.
"""

import ast
import importlib
import inspect
import subprocess
import sys

import pytest
import yaml
from imports import LAYERS, ROOT, circles, closure, files_of, imports, modules, tree, used_by

from t5lib import families
from t5lib.families.base import Adapter
from tasks import targets
from tasks.runtime import params
from tasks.studies.ablation import definition
from tasks.targets.base import Target

SERVICES = {"prefect", "dvc", "mlflow"}
DVC_STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
ABLATIONS = sorted(path.stem for path in (ROOT / "tasks/studies/ablation").glob("*.yaml"))
STAGES = params.stage_modules(ROOT)
KINDS = {name: targets.kind(target) for name, target in PARAMS["targets"].items()}

# Each may import what is in rows above its own, and nothing beside it in its row.
ORDER = [
    ["t5lib/utils"],
    ["t5lib/layers", "t5lib/data", "t5lib/download"],
    ["t5lib/families"],
    ["t5lib/conversion.py", "t5lib/checkpoint.py", "t5lib/model_card.py"],
    [
        "t5lib/pipelines.py",
        "t5lib/parallelism.py",
        "t5lib/onnx_export.py",
        "t5lib/weights",
        "t5lib/training",
        "t5lib/evaluation",
    ],
    ["t5lib/report/plots.py", "t5lib/report/models.py"],  # plain data in, a figure out: others draw with them too
    ["t5lib/analysis", "t5lib/benchmarks"],
    ["t5lib/planning", "t5lib/report"],
    ["t5lib/cli"],
]
TASKS_ORDER = [["tasks/runtime"], ["tasks/targets"], ["tasks"], ["tasks/studies"]]
ALONE = {"t5lib/data", "t5lib/download"}  # know t5lib/utils and nothing else

# How a stage is run, how files are read, and how models are saved, which changes no bit of them: none of it decides
# about a result.
PLUMBING = ("tasks/runtime", "t5lib/utils", "t5lib/__init__.py", "t5lib/checkpoint.py", "t5lib/model_card.py")
# What conversion made is in the model that it saved; others only ask it which layers are new.
OF_CONVERSION = "t5lib/conversion.py"
# Packages that a stage imports without its result depending on them: an edit there must not cause a download or an
# encoding (what draws samples is another matter), the report only quotes what benchmark found, and the pictures of some
# are not those of evaluated models.
MODELS = ("t5lib/families", "t5lib/layers", "kernels/t5kernels", "t5lib/training", "t5lib/evaluation")
NOT_WATCHED = {
    "fetch": (*MODELS, "t5lib/data"),
    "shards": (*MODELS[:-1], "t5lib/pipelines.py", "t5lib/evaluation/scores.py", "t5lib/evaluation/features.py"),
    "report": (*MODELS, "t5lib/data", "t5lib/download", "t5lib/weights", "t5lib/pipelines.py"),
}
NOT_WATCHED |= dict.fromkeys(("diagnose", "explain", "benchmark"), ("t5lib/report/models.py",))


def unit(file):
    """The package of a file, such as t5lib/layers; t5lib's own modules and the stages stand for themselves."""
    if file.startswith("kernels/"):
        return "kernels/t5kernels"
    return "/".join(file.split("/")[:2])


def rank(order, file):
    inside = [index for index, row in enumerate(order) if any(covers(member, file) for member in row)]
    return max(inside, default=None, key=lambda index: max(len(m) for m in order[index] if covers(m, file)))


def covers(dep, path):
    return path == dep or path.startswith(f"{dep}/")


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer):
    order = list(LAYERS)
    above = set(order[: order.index(layer)])
    files = files_of(LAYERS[layer])
    wrong = [f"{file} imports {name}" for file in files for name in modules(file) if name.split(".")[0] in above]
    assert files and wrong == []


@pytest.mark.parametrize(("folder", "order"), [("t5lib", ORDER), ("tasks", TASKS_ORDER)], ids=["t5lib", "tasks"])
def test_inside_of_a_layer_imports_run_one_way_too(folder, order):
    files = [file for file in files_of(folder) if file not in ("t5lib/__init__.py", "tasks/__init__.py")]
    assert [file for file in files if rank(order, file) is None] == []
    wrong = []
    for file in files:
        for other in imports(file):
            if not other.startswith(f"{folder}/") or other == f"{folder}/__init__.py":
                continue
            lower = rank(order, other) < rank(order, file)
            same = rank(order, other) == rank(order, file) and (folder == "tasks" or unit(other) == unit(file))
            if not (lower or same):
                wrong.append(f"{file} imports {other}")
    assert wrong == []


def test_one_module_opens_image_files():
    files = [file for folder in LAYERS.values() for file in files_of(folder)]
    opening = {
        file
        for file in files
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Attribute)
        if node.attr == "open" and isinstance(node.value, ast.Name) and node.value.id == "Image"
    }
    assert opening == {"t5lib/data/decoding.py"}


@pytest.mark.parametrize("package", sorted(ALONE))
def test_data_and_download_know_nothing_of_models(package):
    wrong = [
        f"{file} imports {other}"
        for file in files_of(package)
        for other in imports(file)
        if not covers(package, other) and not covers("t5lib/utils", other)
    ]
    assert wrong == []


def test_there_is_no_circle_of_files_not_even_through_an_import_in_a_function():
    files = [file for folder in LAYERS.values() for file in files_of(folder)]
    packages = {file for file in files if file.endswith("__init__.py")}
    edges = {file: [other for other in imports(file) if other not in packages or file in packages] for file in files}
    assert circles(edges) == []
    assert circles({"a": "b", "b": "c", "c": "a", "d": "a"}) == [["a", "b", "c"]]


@pytest.mark.parametrize("layer", LAYERS)
def test_each_service_is_used_by_its_one_owner(layer):
    owners = {"flows": {"prefect"}, "tasks": {"mlflow"}}.get(layer, set())
    for file in files_of(LAYERS[layer]):
        used = {name.split(".")[0] for name in modules(file)} & SERVICES
        allowed = owners if layer == "flows" or covers("tasks/runtime/tracking", file) else set()
        assert used <= allowed, f"{file} imports {used - allowed}"


def test_the_kernels_know_neither_models_nor_the_library():
    known, optional = {"numpy", "torch", "triton", "t5kernels"}, {"natten.py": {"natten"}}
    for file in files_of(LAYERS["t5kernels"]):
        used = {name.split(".")[0] for name in modules(file)}
        foreign = used - known - optional.get(file.rpartition("/")[2], set()) - set(sys.stdlib_module_names)
        assert foreign == set(), f"{file} imports {foreign}"


# The two contracts.


@pytest.mark.parametrize(
    ("contract", "kinds"),
    [
        (Adapter, [type(families.adapter(name)) for name in families._CLASSES.values()]),
        (Target, sorted(set(KINDS.values()), key=str)),
    ],
    ids=["Adapter", "Target"],
)
def test_every_kind_fulfils_its_contract_and_adds_nothing_to_it(contract, kinds):
    assert len(kinds) >= 2
    promised = {name for name in [*dir(contract), *contract.__annotations__] if not name.startswith("_")}
    for kind in kinds:
        assert issubclass(kind, contract) and not inspect.isabstract(kind)
        own = {name for name in vars(kind) if not name.startswith("_")}
        added = own - promised - EXTRA.get(kind.__name__, set())
        assert added == set(), f"{kind.__name__} adds {added}; is it a question for every kind?"


# Used inside of a kind's own family of classes, or by a study of that kind alone.
TIMM = {"model_classes", "attention_classes", "layer_class", "own_arguments"}
DIFFUSERS = {"softmax_class", "converted_class", "processors", "conditions", "check_blocks", "example_conditions"}
EXTRA = {
    "TimmVit": TIMM,
    "TimmEva": TIMM,
    "TimmEncoders": TIMM | {"trunk"},
    "TimmNaflex": TIMM,
    "TimmRelative": TIMM | {"call_of", "after_heads"},
    "SD3": DIFFUSERS,
    "DiT": DIFFUSERS | {"holds", "restore_class", "tokens_to"},
    "PixArt": DIFFUSERS,
    "QwenImage": DIFFUSERS | {"layer_class", "mlps", "places", "tokens_from"},
    "Flux": DIFFUSERS | {"attention_class", "layer_class", "mlps", "is_joined", "places", "tokens_from"},
    "DenoiserTarget": {"sample_evaluator"},
}


def test_nothing_else_asks_which_kind_of_model_it_is():
    asked = ("isinstance(inputs, dict)", 'hasattr(model, "blocks")', "find_spec(f", "== DenoiserTarget", "PACKAGE ==")
    files = [file for folder in LAYERS.values() for file in files_of(folder)]
    assert [(file, words) for file in files for words in asked if words in (ROOT / file).read_text()] == []


# dvc.yaml.


def test_dvc_and_tasks_have_the_same_stages():
    assert sorted(DVC_STAGES) == sorted(STAGES)


@pytest.mark.parametrize("stage", DVC_STAGES)
def test_a_dvc_stage_runs_its_module_for_every_enabled_target_and_owns_its_outputs(stage):
    entry = DVC_STAGES[stage]
    assert entry["foreach"] == "${enabled}"
    assert entry["do"]["cmd"] == f"python -m tasks.{stage} ${{item}}"
    made = {kind: entry["do"][kind] for kind in ("outs", "metrics", "plots") if kind in entry["do"]}
    folder = "data/out/${item}"  # plain paths: cached, so that `dvc pull` brings them
    expected = {"outs": [f"{folder}/{stage}", f"{folder}/{stage}.json"]}
    if stage == "report":
        expected = {
            "outs": [f"{folder}/report/report.html", f"{folder}/report/summary.md"],
            "metrics": [f"{folder}/report.json"],
            "plots": [{f"{folder}/report/curves": {"x": "step", "y": "loss"}}],
        }
    assert made == expected


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_watches_every_setting_that_a_stage_reads(stage):
    names = sorted(f"targets.${{item}}.{name}" for name in importlib.import_module(f"tasks.{stage}").READS)
    assert sorted(DVC_STAGES[stage]["do"].get("params", [])) == names


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_watches_the_code_that_decides_about_a_stages_result(stage):
    unwatched = (*PLUMBING, *NOT_WATCHED.get(stage, ()), *([OF_CONVERSION] if stage != "convert" else []))
    needed = {
        file
        for file in closure(used_by(stage), frozenset())
        if file.startswith(tuple(LAYERS.values())) and not any(covers(each, file) for each in unwatched)
    }
    deps = [dep for dep in DVC_STAGES[stage]["do"]["deps"] if not dep.startswith("data/")]
    wrong = [f"add {file}" for file in sorted(needed) if not any(covers(dep, file) for dep in deps)]
    wrong += [f"drop {dep}" for dep in deps if dep != "tasks/targets" and not any(covers(dep, f) for f in needed)]
    assert not wrong, f"dvc.yaml, {stage}: {', '.join(wrong)}"
    assert "tasks/targets" in deps


def test_a_page_of_the_report_is_the_business_of_the_report_alone():
    page = "t5lib/report/page.py"
    watching = [stage for stage in STAGES if any(covers(dep, page) for dep in DVC_STAGES[stage]["do"]["deps"])]
    assert watching == ["report"]


@pytest.mark.parametrize("target", PARAMS["targets"])
def test_every_target_has_valid_settings_for_every_stage(target):
    settings = targets.resolve(ROOT, target)
    told = {"inner", "key_norm", "locality"}  # the tags that tell runs apart
    assert told <= set(PARAMS["targets"][target]["convert"])
    assert settings.keys() == params.read_target(ROOT, target).keys()


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
    known = {"target": PARAMS["targets"], "name": ABLATIONS}
    assert parameter[1] in known[parameter[0]]
    assert deployment["entrypoint"] == {"target": "flows/t5.py:t5", "name": "flows/ablate.py:ablate"}[parameter[0]]


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_has_valid_settings_and_shows_every_variant(name):
    plan = definition.resolve(ROOT, name)
    written = yaml.safe_load((ROOT / f"tasks/studies/ablation/{name}.yaml").read_text())
    assert {unit.variant for unit in plan.units} == set(written["variants"])
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
