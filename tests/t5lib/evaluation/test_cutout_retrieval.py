"""Cut-out things: found whatever their number, place and background."""

import pytest
import torch

from t5lib.evaluation.cutout_retrieval import cutouts_of, retrieval
from t5lib.utils.errors import T5Error

GROUNDS = ((250, 250, 250), (55, 100, 215), (15, 15, 15))


def cutout(kind: int, side: int = 24) -> torch.Tensor:
    """A disc, a ring, or a half disc, each in two colours: RGBA (4, side, side) uint8 with an empty border."""
    rows, columns = torch.meshgrid(*[torch.linspace(-1.3, 1.3, side)] * 2, indexing="ij")
    radius = (rows**2 + columns**2).sqrt()
    shape = (radius < 1, (radius < 1) & (radius > 0.5), (radius < 1) & (rows > 0))[kind // 2]
    colour = torch.tensor(((200, 40, 40), (40, 160, 90))[kind % 2], dtype=torch.uint8)
    return torch.cat([colour[:, None, None].expand(-1, side, side), shape[None].byte() * 255])


def picture(kind: int, places: list[tuple[int, int]], ground: tuple[int, int, int], side: int = 64) -> torch.Tensor:
    image = torch.tensor(ground, dtype=torch.uint8)[:, None, None].repeat(1, side, side)
    thing = cutout(kind)
    for y, x in places:
        part = image[:, y : y + 24, x : x + 24]
        part[:] = torch.where(thing[3:] > 0, thing[:3], part)
    return image


KNOWN = {f"thing {kind}": cutout(kind) for kind in range(6)}


@pytest.mark.parametrize("ground", GROUNDS, ids=["white", "blue", "black"])
def test_things_are_known_wherever_they_are(ground):
    places = [[(20, 20)], [(4, 4), (36, 30)], [(0, 0), (0, 40), (38, 2)]]
    images = torch.stack([picture(kind, places[kind % 3], ground) for kind in range(6)])
    found = retrieval(images, list(KNOWN), cutouts_of(KNOWN))
    assert found == {"retrieval_r1": 1.0, "retrieval_r5": 1.0, "retrieval_names": 6}


def test_wrong_things_and_empty_pictures_are_not_right():
    images = torch.stack([picture(1, [(20, 20)], GROUNDS[0]), picture(0, [], GROUNDS[0])])
    found = retrieval(images, ["thing 4", "thing 2"], cutouts_of(KNOWN))
    assert found["retrieval_r1"] == 0


def test_what_does_not_fit_is_named():
    known = cutouts_of(KNOWN)
    with pytest.raises(T5Error, match="'cow' has no cut-out; expected one of 6 names"):
        retrieval(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["cow"], known)
    with pytest.raises(T5Error, match="2 images and 1 names"):
        retrieval(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["thing 1"], known)
    for empty in (torch.zeros(4, 8, 8, dtype=torch.uint8), torch.full((3, 8, 8), 9, dtype=torch.uint8)):
        with pytest.raises(T5Error, match="cut-out of 'sun' is"):
            cutouts_of({"sun": empty})
