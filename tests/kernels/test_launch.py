"""Programs share the tokens so that a card is busy, and none is left out."""

import pytest
from t5kernels import launch


@pytest.mark.parametrize("blocks", [1, 4, 64, 300])
@pytest.mark.parametrize(("heads", "images"), [(1, 1), (48, 1), (24, 2), (6, 128), (72, 32)])
def test_programs_share_all_tokens_and_keep_a_large_card_busy(blocks, heads, images):
    programs = 132
    blocks_each, images_each = launch._shares(blocks, heads, images, programs)
    chunks, groups = -(-blocks // blocks_each), -(-images // images_each)
    assert chunks <= launch.MOST_CHUNKS
    assert (chunks - 1) * blocks_each < blocks <= chunks * blocks_each
    assert (groups - 1) * images_each < images <= groups * images_each
    # The work of the busiest place, against everything shared out evenly and what a program costs by itself.
    busiest = -(-heads * chunks * groups // programs) * (blocks_each * images_each + launch.OVERHEAD)
    assert busiest <= 1.5 * (blocks * heads * images / programs) + 3 * launch.OVERHEAD + blocks / launch.MOST_CHUNKS
