"""How encoded images lie on disk: what t5lib.data.encoding writes and t5lib.data.latents reads."""

from dataclasses import dataclass
from pathlib import Path

from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json

Size = tuple[int, int]  # (height, width)
MANIFEST, NULL, INDEX = "manifest.json", "null.safetensors", ".index.json"


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What `ID.index.json` says. `samples`: [key, first byte, bytes, latent height, latent width] of each .safetensors
    in the tar; `skipped`: messages on the input samples left out; `size`: bytes of the tar."""

    sha256: str
    size: int
    samples: list[list]
    skipped: list[str]

    @classmethod
    def read(cls, tar: Path | str) -> "ShardIndex":
        """Raises T5Error when the index is missing, or the tar has another size than when it was made."""
        tar = Path(tar)
        index = cls(**read_json(tar.with_suffix(INDEX)))
        found = tar.stat().st_size if tar.exists() else 0
        if found != index.size:
            raise T5Error(f"{tar} has {found} bytes, its index says {index.size}: it was cut short; encode it again")
        return index
