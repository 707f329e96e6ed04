"""The driver starts kernels as Triton does: on their grids and streams, with their memory and all values in place."""

import ctypes
import struct
from types import SimpleNamespace

import pytest
import torch
from t5kernels import driver, launch


class StandInDriver:
    """Notes what kernels are started with, as a card would read it."""

    def __init__(self, widths, error=0):
        self.widths, self.error, self.seen = widths, error, []

    def cuLaunchKernelEx(self, config, function, places, extra):
        config = driver._Config.from_address(config)
        assert extra is None
        places = (ctypes.c_void_p * len(self.widths)).from_address(places)
        values = [ctypes.string_at(place, width) for place, width in zip(places, self.widths, strict=True)]
        early = None
        if config.attribute_count:
            attribute = driver._Attribute.from_address(config.attributes)
            early = (attribute.id, attribute.value[0])
        shape = tuple(config.grid), tuple(config.block), config.shared_bytes
        self.seen.append((*shape, config.stream, early, function, values))
        return self.error


class Compiled(SimpleNamespace):
    def __getitem__(self, cells):
        return pytest.fail  # Triton's own launcher


def compiled(signature, function=99, **changed):
    metadata = {"num_warps": 4, "shared": 1000, "num_ctas": 1, "launch_pdl": False, "launch_cooperative_grid": False}
    metadata |= {"global_scratch_size": 0, "profile_scratch_size": 0}
    signature = {f"argument_{i}": kind for i, kind in enumerate(signature)}
    return Compiled(
        metadata=SimpleNamespace(**metadata | changed), src=SimpleNamespace(signature=signature), function=function
    )


KINDS, WIDTHS = ("*bf16", "i32", "constexpr", "*fp32", "i64", "fp32"), [8, 4, 8, 8, 4, 8, 8]
START = driver.Start(compiled(KINDS, launch_pdl=True), (2, 3, 1), [None, -5, 64, None, 1 << 40, 0.5])


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    stand_in = StandInDriver(WIDTHS)
    monkeypatch.setattr(driver, "_library", lambda: stand_in)
    return stand_in


def test_every_argument_lies_where_the_kernel_reads_it(card):
    assert driver.can_start(START)
    driver.Queue([START])([0xABC0, 0xDEF0], stream=11)
    [(grid, block, shared, stream, early, function, values)] = card.seen
    assert (grid, block, shared, stream, function) == ((2, 3, 1), (128, 1, 1), 1000, 11, 99)
    assert early == (6, 1)
    assert values == [
        struct.pack(f"<{code}", value)
        for code, value in zip("QiQqfQQ", (0xABC0, -5, 0xDEF0, 1 << 40, 0.5, 0, 0), strict=True)
    ]


def test_a_queue_starts_its_kernels_in_order_each_time_with_the_pointers_and_the_stream_that_are_told(card):
    other = driver.Start(compiled(KINDS, function=100), (7, 1, 1), [None, 1, 64, None, 2, 0.25])
    queue = driver.Queue([START, other])
    for stream, pointers in ((5, [1, 2, 3, 4]), (5, [5, 6, 7, 8]), (6, [9, 10, 11, 12])):
        queue(pointers, stream)
        seen = [(told[3], told[5], *(int.from_bytes(told[6][at], "little") for at in (0, 2))) for told in card.seen]
        assert seen == [(stream, 99, *pointers[:2]), (stream, 100, *pointers[2:])]
        assert [told[4] for told in card.seen] == [(6, 1), None]
        card.seen.clear()


def test_an_error_of_the_driver_is_told(card):
    card.error = 700
    with pytest.raises(RuntimeError, match="could not start a kernel: error 700"):
        driver.Queue([START])([0, 0], stream=0)


@pytest.mark.parametrize(
    "strange",
    [
        compiled(("*bf16", "nvTmaDesc", "constexpr", "*fp32", "i64", "fp32")),
        compiled(KINDS[:-1]),
        compiled(KINDS, num_ctas=2),
        compiled(KINDS, global_scratch_size=8),
        compiled(KINDS, profile_scratch_size=8),
        compiled(KINDS, launch_cooperative_grid=True),
        compiled(KINDS, function=None),
        SimpleNamespace(),
    ],
)
def test_what_only_triton_can_start_is_left_to_it(card, strange):
    assert not driver.can_start(START._replace(compiled=strange))


def test_without_cuda_everything_is_left_to_triton(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not driver.can_start(START)


def test_a_kernel_that_is_launched_again_is_started_by_the_driver(card, monkeypatch):
    class StandInKernel:
        def __getitem__(self, cells):
            return lambda *arguments, **options: compiled(("*fp32", "i32", "constexpr"))

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_known", {})
    monkeypatch.setattr(launch, "stream_of", lambda x: 3)
    card.widths = [8, 4, 8, 8]
    kernel, tile = StandInKernel(), launch.Tile(block=16, warps=4)
    for x in (torch.zeros(64), torch.ones(64)):
        launch.launch(kernel, (4, 2), x, tile, x, 7)
    [(grid, *_, stream, _, _, values)] = card.seen
    assert (grid, stream) == ((4, 2, 1), 3) and values[:2] == [struct.pack("<Q", x.data_ptr()), struct.pack("<i", 7)]
