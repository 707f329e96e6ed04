"""The parts of `python -m tasks.studies.ablation`: many variants of one model, tried alike and put into tables."""

from pathlib import Path

FOLDER = Path(__file__).parent  # of the project's own ablations


def names() -> list[str]:
    """Names of the ablations in this folder."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))
