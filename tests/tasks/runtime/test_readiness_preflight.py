"""What a target needs stands beside what there is: disk, memory, hours; what certainly does not fit is refused."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from t5lib.download.hub import Listed
from t5lib.utils.errors import SourceError, T5Error
from tasks.runtime import cards, preflight
from tasks.runtime.needs import Check, Memory, Needs, Remote, Room, Work

ROOT = Path(__file__).resolve().parents[3]
GIB = cards.GIB
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def disk(monkeypatch, tmp_path):
    """100 GB free, and a DVC cache that shares blocks with what is cached."""
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: Usage(0, 0, 100 * 10**9))
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[cache]\n    type = hardlink\n")
    return tmp_path


def verdicts(root, needs, card=None, **options):
    return {item.what: item for item in preflight.items(root, "mine", needs, card, **options)}


def test_disk_is_summed_over_stages_and_what_makes_it_smaller_is_named(disk):
    rooms = (Room("models", 60 * 10**9, out=True), Room("checkpoints", 30 * 10**9, change="checkpoints_kept: 1"))
    assert verdicts(disk, Needs(rooms=rooms))["disk: in total"].verdict == "ok"
    (disk / ".dvc/config").write_text("[core]\n    analytics = false\n[cache]\n    type = copy\n")
    item = verdicts(disk, Needs(rooms=rooms))["disk: in total"]  # DVC copies the models
    assert (item.needs, item.verdict, item.essential) == ("150 GB", "too little", True)
    assert item.change.startswith("free 50.0 GB; or checkpoints_kept: 1; or dvc config --local cache.type")
    with pytest.raises(
        T5Error, match=r"(?s)'mine' cannot be built on this machine.*100 GB free.*tasks\.readiness mine"
    ):
        preflight.refuse("mine", [item])


def test_an_estimate_that_does_not_fit_is_told_and_not_refused(disk):
    rooms = (Room("models", 60 * 10**9), Room("encoded images", 90 * 10**9, certain=False))
    item = verdicts(disk, Needs(rooms=rooms))["disk: in total"]
    assert (item.verdict, item.essential) == ("too little", False)
    unknown = Needs(rooms=(Room("encoded images", None, why="3 MB each"),))
    assert verdicts(disk, unknown)["disk: in total"].verdict == "unknown"
    preflight.refuse("mine", [item])


def test_what_an_interrupted_run_left_need_not_be_free_again(disk):
    needs = Needs(remotes=(Remote("the pipeline", "hf:owner/repo@main#*.json", 100 * 10**9 + 20),))
    assert verdicts(disk, needs, online=False)["disk: in total"].essential
    for place in ("scratch/mine/fetch", "models/.hf-owner-repo-0123-json.incoming", "models/hf-owner-other-0123"):
        (disk / "data" / place).mkdir(parents=True)
        (disk / "data" / place / "part").write_bytes(bytes(10))
    assert verdicts(disk, needs, online=False)["disk: in total"].verdict == "ok"


def test_a_second_copy_depends_on_the_kind_of_the_cache_and_on_the_file_system(tmp_path, monkeypatch):
    (tmp_path / ".dvc").mkdir()
    for text, reflinks, copied in (
        ("", False, True),
        ("", True, False),
        ("[cache]\ntype = hardlink\n", False, False),
        ("[cache]\ntype = reflink,hardlink,copy\n", False, True),
        ("[cache]\ntype = reflink,copy\n", True, False),
        ("[cache]\ntype = copy\n", True, True),
        ("[cache]\ndir = /elsewhere\n", False, False),
    ):
        (tmp_path / ".dvc/config.local").write_text(text)
        monkeypatch.setattr(preflight, "_reflinks", lambda _, told=reflinks: told)
        assert preflight.copies(tmp_path) is copied, text


def test_memory_stands_beside_the_cards_and_the_mildest_setting_that_fits_is_named(tmp_path):
    smaller = (("batch_size: 2", 90 * GIB), ("batch_size: 1", 70 * GIB), ("trainable: lora", 20 * GIB))
    needs = Needs(memories=(Memory("finetune", 60 * GIB, 100 * GIB, smaller), Memory("freeze", 9 * GIB, 10 * GIB)))
    found = verdicts(tmp_path, needs, cards.named("NVIDIA H100 80GB HBM3"))
    item = found["memory: finetune"]
    assert (item.verdict, item.essential, item.change) == ("too little", False, "set batch_size: 1: about 70 GiB")
    assert found["memory: freeze"].verdict == "ok"
    small = verdicts(tmp_path, needs, cards.named("A6000"))["memory: finetune"]
    assert small.essential and small.change == "set trainable: lora: about 20 GiB"
    tiny = verdicts(tmp_path, needs, cards.named("Quadro", 8))
    assert tiny["memory: finetune"].change == "no setting makes it fit; take a larger card"
    assert {item.verdict for item in verdicts(tmp_path, needs).values()} == {"unknown"}


def test_hours_are_those_we_measured_on_that_card_and_scaled_to_others(tmp_path):
    rate = cards.RATES["train"]
    needs = Needs(works=(Work("finetune", "train", 3000 * rate.amount, "steps: 1500"), Work("shards", "encode", None)))
    hours = {name: verdicts(tmp_path, needs, cards.named(name)) for name in ("H100", "A100")}
    ours = hours["H100"]["hours: finetune"]
    assert ours.needs == "3.3 h" and ours.there.startswith("measured on an H100: docs/results/sd35-step-cost")
    assert hours["A100"]["hours: finetune"].needs == "10.5 h"  # 989 / 312 times as long
    assert hours["A100"]["hours: finetune"].change == "steps: 1500" and not ours.change
    assert hours["A100"]["hours: shards"].verdict == hours["A100"]["hours: in total"].verdict == "unknown"
    unknown = verdicts(tmp_path, needs, cards.named("Quadro", 48))["hours: finetune"]
    assert (unknown.verdict, unknown.there) == ("unknown", "speed of Quadro not known")
    assert "--card" in verdicts(tmp_path, needs)["hours"].change


def test_cards_are_known_by_the_names_that_torch_gives_them():
    for name, known in (
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H20", "H20"),
        ("h100", "H100"),
    ):
        assert cards.named(name).flops == cards.CARDS[known].flops
    assert cards.named("NVIDIA A100-PCIE-40GB", 39.5).memory == round(39.5 * GIB)
    with pytest.raises(T5Error, match=r"no figures for a card 'Quadro'; known: .*H200.*--memory"):
        cards.named("Quadro")


def test_rates_are_what_their_sources_say():
    def result(name):
        return json.loads((ROOT / f"docs/results/{name}.json").read_text())

    softmax = next(case for case in result("sd35-step-cost-h100")["cases"] if case["layers"] == "softmax")
    assert cards.RATES["train"].seconds == pytest.approx(softmax["seconds"], rel=0.01)
    chain = result("sd35-random-chain")["stages"]
    assert cards.RATES["fit"].seconds == pytest.approx(chain["calibrate"]["metrics"]["seconds"], rel=0.01)
    assert cards.RATES["encode"].seconds == chain["shards"]["seconds"]
    seeds = result("dinov2-fashion-24k")["seeds"]
    assert cards.RATES["fit compiled"].seconds == pytest.approx(seeds["1"]["seconds"]["calibrate"], rel=0.01)
    assert cards.RATES["train images"].seconds == pytest.approx(seeds["0"]["seconds"]["finetune"], rel=0.01)


@pytest.mark.parametrize(
    ("gated", "token", "verdict", "there"),
    [
        (False, None, "ok", "open to all, 9 files available"),
        (True, None, "missing", "gated, no token"),
        (True, "t", "ok", "gated, 9"),
    ],
)
def test_what_the_hub_has_is_told_with_size_gate_and_token(disk, monkeypatch, gated, token, verdict, there):
    monkeypatch.setattr(preflight.hub, "look", lambda _: Listed(9, 16 * 10**9, gated))
    monkeypatch.setattr(preflight.hub, "check_access", lambda _: None)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    found = verdicts(disk, Needs(remotes=(Remote("the pipeline", "hf:owner/repo@main#*.json"),)))
    item = found["source: the pipeline"]
    assert (item.needs, item.verdict, item.essential) == ("16.0 GB", verdict, verdict == "missing")
    assert item.there.startswith(there)
    assert found["disk: the pipeline"].needs == "16.0 GB"
    if verdict == "missing":
        assert "accept the conditions on https://huggingface.co/owner/repo and set HF_TOKEN" in item.change


def test_a_hub_that_cannot_be_reached_leaves_the_size_that_we_expect(disk, monkeypatch):
    def away(rest):
        raise SourceError(f"hf:{rest}: the hub cannot be reached")

    monkeypatch.setattr(preflight.hub, "look", away)
    needs = Needs(remotes=(Remote("the pipeline", "hf:owner/repo@main#*.json", 16 * 10**9),))
    item = verdicts(disk, needs)["source: the pipeline"]
    assert item.essential and item.change == "hf:owner/repo@main: the hub cannot be reached"
    assert verdicts(disk, needs)["disk: in total"].needs == "16.0 GB"
    assert "source: the pipeline" not in verdicts(disk, needs, online=False)


def test_the_table_has_a_line_an_item_and_under_it_what_to_change(disk):
    needs = Needs(checks=(Check("configs", "other", "patch_size is 4", essential=False), Check("labels", "there")))
    lines = preflight.table(preflight.items(disk, "mine", needs, cards.named("H200"))).splitlines()
    assert [line.split() for line in lines] == [
        ["needs", "there", "is", "verdict"],
        ["configs", "as", "expected", "other", "wrong"],
        ["→", "patch_size", "is", "4"],
        ["labels", "as", "expected", "there", "ok"],
    ]
    assert len({line.index(word) for line, word in ((lines[0], "verdict"), (lines[1], "wrong"), (lines[3], "ok"))}) == 1


def test_free_room_is_that_of_the_disk_of_data(tmp_path):
    assert preflight.free_bytes(tmp_path) == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
