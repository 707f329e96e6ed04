"""Downloads too large to be a stage's output: kept beside the outputs, where later stages find them."""

import os
import re
from pathlib import Path

from t5lib.download import fetch, resolve


def kept(source: str, folder: Path) -> Path:
    """Where the files of `source` (t5lib.download) lie; fetched into a folder of their own in `folder`, once.

    The folder takes its name when it is complete. What a file: source names stays where it is.
    """
    if source.startswith("file:"):
        return fetch(source, folder)
    source = resolve(source)
    place = folder / re.sub(r"[^\w.]+", "-", source)
    if not place.exists():
        incoming = place.with_name(f".{place.name}.incoming")
        fetch(source, incoming)
        os.replace(incoming, place)
    return place
