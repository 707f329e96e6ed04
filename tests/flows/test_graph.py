"""The order of the stages is DVC's own."""

import pytest

from flows import graph
from t5lib.utils.errors import T5Error

DOT = """strict digraph {
"report@a";
"fetch@a";
"fetch@b";
"convert@a";
"control@a";
"fetch@a" -> "convert@a";
"fetch@a" -> "control@a";
"convert@a" -> "report@a";
"control@a" -> "report@a";
}
"""


def test_stages_come_after_what_they_need_otherwise_in_dvcs_order():
    assert graph.order(DOT, "a") == ["fetch", "convert", "control", "report"]
    assert graph.order(DOT, "b") == ["fetch"]
    assert graph.order(DOT, "ab") == []


@pytest.mark.pipeline
def test_order_is_read_from_dvc(small_repo):
    assert graph.stages(small_repo.root, "small") == ["fetch", "convert", "evaluate"]
    with pytest.raises(T5Error, match="no stages for 'other'; is it listed under `enabled`"):
        graph.stages(small_repo.root, "other")


@pytest.mark.pipeline
def test_what_dvc_objects_to_is_passed_on(small_repo):
    small_repo.set("${enabled}", "${enabeld}", file="dvc.yaml")
    with pytest.raises(T5Error, match=r"`dvc dag` failed: .*enabeld"):
        graph.stages(small_repo.root, "small")
