"""MLflow's registry: a target's finished model, which mlflow.pyfunc.load_model loads anywhere as models:/TARGET@best.

The alias `best` stands at the version with the best score among those that were scored as the newest one was. A model
that does not pass the gate before fine-tuning gets no score, and so no version.
"""

import json
from typing import TYPE_CHECKING, Any

from t5lib.utils.files import sha256
from tasks.runtime.tracking.about import TELLING
from tasks.runtime.tracking.registry.product import WEIGHTS, Product

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

BEST = "best"


def register(client: Any, runs: list[str], target: str, product: Product, tags: dict[str, str]) -> str:
    """Make `product` a version of the registered model `target`, or find the one that it is, and set the alias.

    Args:
        client, runs: an MlflowClient, and the run that scored it, before others that show it.
        tags: of the version, beside those that say its score.

    Returns:
        The version and where `best` stands, in words.
    """
    from tasks.runtime.tracking.registry.upload import upload

    weights = sha256(product.files[WEIGHTS])
    about = _about(product, tags)
    tags = {"target": target, **tags, **product.tags, "weights_sha256": weights}
    known = [each for each in _versions(client, target) if each.tags.get("weights_sha256") == weights]
    if known:
        number = known[0].version
        for key, value in tags.items():
            client.set_model_version_tag(target, number, key, value)
        client.update_model_version(target, number, about)
    else:
        model = upload(client, runs, target, product, tags)
        _ensure(client, target)
        # not models:/ID, which MLflow looks up in the store of the process
        source, own = model.artifact_location, {"tags": tags, "description": about, "model_id": model.model_id}
        number = client.create_model_version(target, source, runs[0], **own).version
        named = json.dumps([{"name": target, "version": str(number)}])
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": named})  # shown on the model's page
    best = _best(_versions(client, target), product)
    client.set_registered_model_alias(target, BEST, best)
    return f"{target} version {number}, {product.measure} {tags['score']}; '{BEST}' is version {best}"


def _versions(client: Any, name: str) -> "list[ModelVersion]":
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
        found, token = found + list(page), page.token
        if not token:
            return found


def _ensure(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    about = (
        f"The target `{name}` of t5: softmax attention replaced by linear-cost attention.\n\n"
        f'    model = mlflow.pyfunc.load_model("models:/{name}@{BEST}")\n\n'
        "docs/teams.md says what it takes and gives."
    )
    try:
        client.create_registered_model(name, description=about)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _about(product: Product, tags: dict[str, str]) -> str:
    scores = ", ".join(f"{name} {value:.4g}" for name, value in product.scores.items())
    method = ", ".join(tags[name] for name in TELLING if name in tags)
    return f"{scores}\n\nSoftmax attention of `{tags.get('source', 'its source')}` replaced: {method}."


def _best(versions: "list[ModelVersion]", product: Product) -> str:
    """The version with the best score, the oldest of several, of those scored as `product` was."""
    alike = [each for each in versions if each.tags.get("scored_by") == product.tags["scored_by"]]
    sign = 1 if product.better == "higher" else -1
    return str(max(alike, key=lambda each: (sign * float(each.tags["score"]), -int(each.version))).version)
