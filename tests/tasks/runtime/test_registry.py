"""The registry on sqlite: which version is the best one, and that weights are stored once."""

import shutil
from types import SimpleNamespace

import pytest

from tasks.runtime.tracking import FOLDER, registry, store
from tasks.runtime.tracking.registry.product import WEIGHTS, Product


def product(score: float, better: str = "higher", images: str = "a", weights=None) -> Product:
    return Product(
        kind="classifier",
        files={WEIGHTS: weights},
        settings={"classes": ["a", "b"]},
        scores={"top1": score},
        measure="top1",
        better=better,
        scored_by=[images],
    )


def best(*products: Product) -> int:
    """Of versions 1, 2, … with these scores, after the last was registered."""
    versions = [SimpleNamespace(version=n, tags=each.tags) for n, each in enumerate(products, 1)]
    return int(registry._best(versions, products[-1]))


def test_best_is_the_best_score_of_those_that_were_scored_alike():
    first, worse, better = product(70.0), product(60.0), product(80.0)
    assert [best(first), best(first, worse), best(first, worse, better)] == [1, 1, 3]
    assert best(first, product(70.0)) == 1  # the older of two that are level
    elsewhere = product(50.0, images="b")
    assert best(first, better, elsewhere) == 3
    assert best(first, better, elsewhere, worse) == 2
    assert best(*(product(score, "lower") for score in (8.0, 9.0, 7.0, 7.5))) == 3


@pytest.mark.pipeline
def test_weights_are_stored_once_as_a_second_name_of_their_file_and_stay_one_version(tmp_path, empty_mlflow):
    shutil.copytree(empty_mlflow, tmp_path / FOLDER)
    client = store.client(tmp_path)
    run = client.create_run(store.experiment(client, tmp_path)).info.run_id
    (tmp_path / "one").write_text("one")
    for score in (70.0, 75.0):  # MLflow wants no point in the name of a logged model
        registry.register(client, [run], "v1.5", product(score, weights=tmp_path / "one"), {})
    [version] = client.search_model_versions("name = 'v1.5'")
    assert version.tags["score"] == "75" and "top1 75" in version.description
    [stored] = (tmp_path / FOLDER).rglob("model.safetensors")
    assert stored.samefile(tmp_path / "one")
    (tmp_path / "one").unlink()
    assert stored.read_text() == "one"
    assert not list((tmp_path / FOLDER).rglob("*.pkl"))
