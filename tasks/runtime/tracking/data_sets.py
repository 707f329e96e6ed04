"""The images of a target as MLflow's data sets: manifests, identified by their checksums."""

import json
from pathlib import Path
from typing import Any

from t5lib.utils.errors import without_secrets
from t5lib.utils.files import read_json, sha256

CONTEXTS = {"train": "training", "val": "validation"}  # MLflow's words
DIGEST = 36  # characters that MLflow keeps of a digest


def data_sets(shards: Path, sources: dict[str, Any]) -> dict[str, dict[str, str]]:
    """What mlflow.entities.Dataset takes, by context, for every manifest in the output of the stage `shards`.

    Args:
        sources: of each split, "train" and "val": where its images came from; of "samples": by what settings those
            were drawn that a split without images consists of.
    """
    found = {}
    for split, context in CONTEXTS.items():
        for manifest in (shards / f"{split}.json", shards / f"images-{split}.json"):
            if manifest.is_file():
                source = sources.get(split) or sources.get("samples")
                found[context] = _entry(manifest, without_secrets(str(source)))
    return found


def _entry(manifest: Path, source: str) -> dict[str, str]:
    content, checksum = read_json(manifest), sha256(manifest)
    profile = {"images": content["count"], "classes": len(content["classes"]), "shards": len(content["shards"])}
    return {
        "name": content["name"],
        "digest": checksum[:DIGEST],
        "source_type": "local",
        "source": json.dumps({"uri": source, "manifest_sha256": checksum}),
        "profile": json.dumps(profile),
    }
