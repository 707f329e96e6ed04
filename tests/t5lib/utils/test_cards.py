"""A card can be taken for a smaller one."""

import types

import pytest
import torch

from t5lib.utils.cards import GIB, limit_memory
from t5lib.utils.errors import T5Error


@pytest.fixture
def two_cards(monkeypatch):
    """Cards of 80 GiB; returns the shares of them that may be used."""
    shares = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=80 * GIB)
    )
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.update({device: share})
    )
    return shares


def test_every_card_is_limited_by_its_share(two_cards):
    limit_memory(24)
    assert two_cards == {0: 0.3, 1: 0.3}


@pytest.mark.parametrize("gib", [0, -1, 81])
def test_more_than_there_is_and_nothing_are_refused(two_cards, gib):
    with pytest.raises(T5Error, match=r"expected more than 0, at most the card's 80\.0"):
        limit_memory(gib)
    assert not two_cards


def test_without_a_card_there_is_nothing_to_limit(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(T5Error, match="no CUDA device"):
        limit_memory(24)
