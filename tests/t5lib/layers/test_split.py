"""How processes share the rows of an image, and what runs on a card between their exchanges."""

import pytest
import torch
from fake_card import fake_card
from torch import distributed, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from t5lib.layers.config import TTTConfig
from t5lib.layers.factory import make_mixer
from t5lib.layers.grid import TokenGrid
from t5lib.layers.split import Split
from t5lib.utils.errors import T5Error


@pytest.fixture
def split():
    """Of the second of three processes, of which there are no others."""
    distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    yield Split.of(distributed.group.WORLD)
    distributed.destroy_process_group()


@pytest.mark.parametrize("total", [3, 4, 5, 64])
def test_every_row_is_one_processs_and_none_has_two_more_than_another(total, split):
    shares = [split.share_of(rank, total) for rank in range(3)]
    assert [row for share in shares for row in range(*share)] == list(range(total))
    counts = [end - first for first, end in shares]
    assert max(counts) - min(counts) <= 1
    part = split.part(TokenGrid(total, 4))
    assert (part.first, part.rows, part.whole) == (shares[1][0], counts[1], TokenGrid(total, 4))


def test_fewer_rows_than_processes_are_refused(split):
    with pytest.raises(T5Error, match="2×9 tokens cannot be shared by 3 processes"):
        split.part(TokenGrid(2, 9))


def test_on_a_card_kernels_run_between_the_exchanges(split):
    mixer = make_mixer(2, 64, TTTConfig())
    with fake_card() as ops, torch.no_grad():
        for name, parameter in list(mixer.named_parameters()):
            part, _, own = name.rpartition(".")
            on_card = torch.empty(parameter.shape, device="cuda", dtype=torch.bfloat16)
            setattr(mixer.get_submodule(part), own, nn.Parameter(on_card))
        grid = split.part(TokenGrid(10, 8))
        image, text = (torch.empty(2, 2, n, 64, device="cuda", dtype=torch.bfloat16) for n in (grid.rows * 8, 5))
        o, text_o = mixer.joint((image,) * 3, (text,) * 3, grid)
    assert (o.shape, o.dtype, text_o.shape) == (image.shape, torch.bfloat16, text.shape)
    halves = ["ttt_accumulate", "ttt_prepare", "ttt_accumulate", "ttt_apply", "ttt_apply"]
    assert ops == ["ttt_prepare", "ttt_prepare", *halves]
