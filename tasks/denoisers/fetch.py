"""Stage `fetch` of denoisers: the diffusers diffusers_folder, and the networks that generated images are compared with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tasks.fetch
from t5lib.utils.errors import T5Error
from t5lib.utils.files import write_json
from tasks.downloads import kept
from tasks.fetch import fetched_model
from tasks.runtime.stage import Stage
from tasks.targets import diffusers_folder


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Where the pipeline comes from, and what its images are scored with.

    Attributes:
        source: a folder as diffusers saves it, file:FOLDER or hf:OWNER/REPO@COMMIT (t5lib.download).
        features: a DINOv2 of timm's, as classifiers are fetched: for FD-DINOv2, retrieval, and distances to the source.
        inception: torch-fidelity's weights, as a source of t5lib.download: then FID, KID and IS are the standard ones.
        clip: transformers' CLIP, as a source of t5lib.download, for the CLIP score.
    """

    format: Literal["pipeline"]
    source: str
    features: tasks.fetch.FetchConfig
    inception: str | None = None
    clip: str | None = None


SECTIONS = {"fetch": FetchConfig}


def run(stage: Stage) -> dict[str, Any]:
    """Fetch and check all of it. Large files stay where they were downloaded to (data/models) or lie already."""
    import t5lib

    config, models = stage.params(FetchConfig), stage.root / "data/models"
    found = diffusers_folder.note(kept(_pipeline_source(config.source), models), config.source, stage.out, stage.root)
    features, origin = fetched_model(config.features, stage.resume_dir() / "features")
    t5lib.save(features, stage.out / "features")
    scorers = {"inception": config.inception, "clip": config.clip}
    write_json(
        stage.out / diffusers_folder.SCORERS,
        {name: source and _kept_file(source, models) for name, source in scorers.items()},
    )
    size = sum(file["bytes"] for file in found["files"].values())
    return {"source": config.source, "files": len(found["files"]), "bytes": size, "features": origin}


def _pipeline_source(source: str) -> str:
    """A hub repo without #FILES means the pipeline's files alone."""
    if source.startswith("hf:datasets/"):
        raise T5Error(
            f"fetch.source is '{source}', a data set; expected a pipeline: file:FOLDER or hf:OWNER/REPO@COMMIT"
        )
    return f"{source}#{diffusers_folder.HUB_FILES}" if source.startswith("hf:") and "#" not in source else source


def _kept_file(source: str, models: Path) -> str:
    """The file, or the folder of several."""
    place = kept(source, models)
    files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
    return str((files[0] if len(files) == 1 else place).resolve())
