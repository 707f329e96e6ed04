"""The flow of an ablation: prepare, a task a variant, tables; resumable, and a broken variant stops no other."""

import json
import logging
from pathlib import Path

import ablation
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from flows import ablate as module
from flows.ablate import ablate
from t5lib.utils.errors import T5Error

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.xdist_group("prefect"),
    pytest.mark.usefixtures("prefect", "libraries_loaded"),
]

# What the flow starts: `python -m tasks.studies.ablation`, here one that notes how it was called.
STAND_IN = """
import json, sys, time
from pathlib import Path

command, *rest = sys.argv[1:]
with open("calls", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if command == "show":
    if rest[0] != "small":
        sys.exit(f"ablation: there is no ablation '{rest[0]}'")
    units = [{"variant": name} for name in ("softmax", "swiglu", "linear")]
    print(json.dumps({"name": "small", "seeds": [0, 1], "units": units}))
elif command == "prepare":
    print("prepared")
elif command == "run":
    if rest[-1] == Path("breaks").read_text():
        print("at work")
        sys.exit("ablation: it overflows")
    print(f"[5 s] {rest[-1]}: done")
else:
    print("small.md")
    print("small-inner.png")
"""


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    package = tmp_path / "tasks/studies/ablation"
    package.mkdir(parents=True)
    for folder in (package, *package.parents[:2]):
        (folder / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    (tmp_path / "breaks").write_text("nothing")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "LIBRARIES", ())
    return tmp_path


def states(state):
    """(name, type, message) of a flow run's tasks as the server knows them."""
    flow_run = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        tasks = client.read_task_runs(flow_run_filter=flow_run)
    return {(task.name, task.state.type.value, task.state.message) for task in tasks}


def test_a_task_a_step_in_order_each_with_its_last_word(root, caplog):
    caplog.set_level(logging.INFO)
    state = ablate("small", out="small", return_state=True)
    plan = "small: prepare → 3 variants with seeds 0, 1 (softmax, swiglu, linear) → tables; what finished"
    assert plan in caplog.text
    assert state.result() == ["small.md", "small-inner.png"]
    assert states(state) == {
        ("prepare", "COMPLETED", "prepared"),
        *((variant, "COMPLETED", f"[5 s] {variant}: done") for variant in ("softmax", "swiglu", "linear")),
        ("tables", "COMPLETED", "small-inner.png"),
    }
    assert (root / "calls").read_text().splitlines() == [
        "show small",
        "prepare small --seeds 0 1",
        *(f"run small --seeds 0 1 --out small.json --only {variant}" for variant in ("softmax", "swiglu", "linear")),
        "tables small.json --out small",
    ]


def test_a_broken_variant_shows_its_own_words_after_the_others_had_their_turn(root):
    (root / "breaks").write_text("swiglu")
    state = ablate("small", [3], "x", return_state=True)
    assert (state.type.value, state.message) == ("FAILED", "swiglu: it overflows")
    assert ("swiglu", "FAILED", "it overflows") in states(state)
    assert [call.split()[0] for call in (root / "calls").read_text().splitlines()[-2:]] == ["run", "tables"]
    assert "--seeds 3" in (root / "calls").read_text()


def test_a_slip_is_told_before_any_work(root):
    with pytest.raises(T5Error, match=r"^there is no ablation 'smal'$"):
        ablate("smal")
    assert (root / "calls").read_text().splitlines() == ["show smal"]


def test_an_interrupt_stops_the_command(root, monkeypatch):
    def interrupted(command, on_line, **options):
        if "swiglu" in command:
            raise KeyboardInterrupt
        return stream(command, on_line, **options)

    stream = module.stream
    monkeypatch.setattr(module, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ablate("small", out="small")
    assert "linear" not in (root / "calls").read_text()


@pytest.mark.slow
def test_a_real_ablation_from_weights_to_tables(tmp_path, monkeypatch):
    ablation.write_weights(tmp_path)
    ablation.write_images(tmp_path)
    few = {name: ablation.ABLATION["variants"][name] for name in ("softmax", "swiglu")}
    ablation.write_params(
        tmp_path, seeds=[0], variants=few, tables={"inner": {"title": "Inner", "rows": {"swiglu": "swiglu"}}}
    )
    monkeypatch.chdir(tmp_path)
    assert ablate("small.yaml", out="out/small") == ["out/small.md", "out/small-inner.png"]
    result = json.loads((tmp_path / "out/small.json").read_text())
    assert set(result["records"]["swiglu"]["0"]["models"]) == {"source", "calibrated", "frozen", "finetuned"}
    assert "| swiglu |" in (tmp_path / "out/small.md").read_text()
