"""Multi-aspect buckets: each image is resized and cropped to the size, of a fixed list, that is nearest in aspect.

Sizes are (height, width) in pixels.
"""

import math
from collections.abc import Sequence
from typing import Annotated

from PIL import Image, ImageOps
from pydantic import Field

from t5lib.utils.config import Pair, Pixels, Several, settings, shown
from t5lib.utils.errors import T5Error

Size = tuple[int, int]  # (height, width)


@settings
class BucketConfig:
    """The sizes images are brought to: `sizes` itself, or all that follow from `resolution`.

    With `resolution` R (pixels a side of the square one): sides are multiples of `step`, the area is as near to R² as
    that allows, and the longer side is at most `max_aspect` times the shorter one. R = 1024 gives (1024, 1024),
    (896, 1152), (832, 1216), … and the same turned. `step` must be a multiple of what latent and patch take
    together: 16 for SD3 and DiT.
    """

    sizes: Several[Pair[Pixels]] = ()
    resolution: Pixels | None = None
    max_aspect: Annotated[float, Field(ge=1, le=100)] = 2.0
    step: Pixels = 64

    def __post_init__(self) -> None:
        if bool(self.sizes) == (self.resolution is not None):
            raise T5Error(
                f"buckets: sizes is {shown(list(self.sizes))} and resolution {self.resolution}; give one of them"
            )
        if len(set(self.sizes)) < len(self.sizes):
            raise T5Error(f"buckets: sizes is {shown(self.sizes)}; expected each once")
        if self.resolution is not None and self.resolution % self.step:
            raise T5Error(f"buckets: resolution is {self.resolution}; expected a multiple of step ({self.step})")


def bucket_sizes(config: BucketConfig) -> tuple[Size, ...]:
    """All sizes, sorted: height, then width."""
    if config.resolution is None:
        return tuple(sorted(set(config.sizes)))
    found, area, step = set(), config.resolution**2, config.step
    for long in range(config.resolution, math.ceil(config.resolution * math.sqrt(config.max_aspect)) + step, step):
        short = round(area / long / step) * step
        if short and long <= config.max_aspect * short:
            found |= {(short, long), (long, short)}
    return tuple(sorted(found))


def nearest(sizes: Sequence[Size], height: int, width: int) -> Size:
    """The size nearest in aspect (in the logarithm of it) to an image of height × width pixels.

    Of several sizes of one aspect it is the largest that the image need not be enlarged for, or else the smallest.
    """

    def rank(size: Size) -> tuple[float, bool, int]:
        distance = abs(math.log(size[0] / size[1] * width / height))
        enlarged = size[0] > height or size[1] > width
        area = size[0] * size[1]
        return round(distance, 9), enlarged, area if enlarged else -area

    return min(sizes, key=rank)


def fit(image: Image.Image, size: Size) -> Image.Image:
    """`image` resized (bicubic) so that it covers `size`, and its centre of that size."""
    return ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
