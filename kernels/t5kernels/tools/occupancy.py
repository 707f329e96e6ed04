"""Show what the compiler makes of the kernels, without a card: registers, spilled bytes and shared memory by tile.

    python -m t5kernels.tools.occupancy [--width D ...] [--kernel NAME ...] [--rms] [--text]

It compiles for the H100 (sm_90) in bfloat16 with the Triton that is installed. Spilled bytes go through memory in every
turn of a loop; registers and shared memory say how many programs a multiprocessor holds.
"""

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from t5kernels.launch import Tile, padded_to, padded_width
from t5kernels.neighborhood import triton as neighborhood
from t5kernels.neighborhood import triton_kernels as neighborhood_kernels
from t5kernels.ttt import triton as ttt
from t5kernels.ttt import triton_tiles
from t5kernels.ttt_layer import triton as ttt_layer
from t5kernels.ttt_layer import triton_finish, triton_launch, triton_norms, triton_prepare

EVERY_TILE = (
    ttt_layer.EVERY_TILE | neighborhood.TILES | {"parameters": dict.fromkeys((32, 64, 128), triton_finish.TILE)}
)
TARGET = GPUTarget("cuda", 90, 32)
# Arguments that are pointers to float32, and to tokens or weights in bfloat16. The others are strides and counts.
FLOAT = {"step", "d_step", "sums", "parts", "totals", "factors", "lse", "delta"}
FLOAT |= {"of_queries", "weight_sums", "q_sums", "k_sums", "gain_sums"}
TOKENS = {"q", "k", "v", "out", "do", "dq", "dk", "dv", "first", "x", "y", "dx", "dy", "dn"}
HALF = TOKENS | {"w1", "w2", "w3", "weight", "bias", "gain", "first_gain", "d_parameters"}


@dataclass(frozen=True)
class Occupancy:
    """What one kernel takes.

    Attributes:
        registers: registers a thread.
        spilled_bytes: bytes that a thread spills.
        shared_bytes: bytes of shared memory a program.
        loop_values: values that a loop hands from turn to turn, in the loop with most of them.
    """

    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    loop_values: int

    def __str__(self) -> str:
        return (
            f"{self.kernel:<20} registers {self.registers:>3}  spilled {self.spilled_bytes:>4}  "
            f"shared {self.shared_bytes:>6}  carried {self.loop_values:>2}"
        )


def occupancy(kernel: str, tile: Tile, head_dim: int, rms: bool = False, text: bool = False) -> Occupancy:
    """Compile `kernel`, a key of EVERY_TILE, with a tile. rms: with RMS norms of q and k; text: with text tokens."""
    modules = (triton_norms, triton_prepare, triton_finish, neighborhood_kernels)
    every = ttt.KERNELS | {name: value for module in modules for name, value in vars(module).items()}
    function = every[f"{kernel}_kernel"]
    constants = {"D": head_dim, "WIDTH": padded_width(head_dim), "BLOCK": tile.block}
    if kernel in triton_tiles.TILES:
        constants["WIDTH"], constants["REST"] = triton_tiles.groups_of(padded_to(EVERY_TILE[kernel], head_dim))
    constants |= {
        "STAGES": tile.stages,
        "NORM": True,
        "CONV": True,
        "RMS": rms,
        "LAST": False,
        "TEXT": text,
        "EARLY": True,
    }
    constants |= {
        "BLOCK_OUTSIDE": triton_launch.OUTSIDE[padded_width(head_dim)],
        "WEIGHTS": 3,
        "QUERIED": 3,
        "FIRST": 0,
        "WEIGHED": 3,
        "AT_ONCE": triton_finish.ROWS // padded_width(head_dim),
        "WINDOW": 5,
        "TILE": neighborhood.SQUARES[0],
        "SIDE": neighborhood.LARGEST_SIDE,
    }
    if tile.hidden:
        constants |= {"HIDDEN": tile.hidden, "SLICES": triton.cdiv(head_dim, tile.hidden)}
    # The channels of a token lie side by side; Triton makes a constant of such a stride.
    constants |= {name: 1 for name in function.arg_names if name.endswith("_d")}
    signature, constant, aligned = {}, {}, {}
    for place, name in enumerate(function.arg_names):
        signature[name] = _type(name, constants)
        if name in constants:
            constant[(place,)] = constants[name]
        elif name.removeprefix("text_") in FLOAT | HALF or (
            name[:-1].endswith("_") and name[-1] in "bhn"
        ):  # pointers and strides
            aligned[(place,)] = [["tt.divisibility", 16]]
    binary = triton.compile(ASTSource(function, signature, constant, aligned), target=TARGET, options=tile.options)
    registers, spilled_bytes = _resources(binary.asm["cubin"])
    return Occupancy(kernel, registers, spilled_bytes, binary.metadata.shared, _loop_values(binary.asm["ttir"]))


def _type(name: str, constants: dict) -> str:
    """The type of a kernel's argument, as a signature for Triton's compiler names it."""
    if name in constants:
        return "constexpr"
    if name in ("scale", "eps"):
        return "fp32"
    name = name.removeprefix("text_")
    return "*fp32" if name in FLOAT else "*bf16" if name in HALF else "i32"


def _loop_values(code: str) -> int:
    loops = re.findall(r"scf\.for .* iter_args\((.*?)\) ->", code)
    return max((loop.count("=") for loop in loops), default=0)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes, as the tool that comes with Triton prints them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if usage is None:
        raise RuntimeError(f"{tool.name} printed no register usage; it printed {report!r}")
    return int(usage[1]), int(usage[2])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--width", nargs="*", type=int, default=[32, 64, 72, 128], help="head widths")
    parser.add_argument("--kernel", nargs="*", choices=list(EVERY_TILE), default=list(EVERY_TILE), help="these only")
    parser.add_argument("--rms", action="store_true", help="with RMS norms of q and k")
    parser.add_argument("--text", action="store_true", help="with text tokens, in the kernels that take them")
    options = parser.parse_args(arguments)
    for head_dim in options.width:
        for kernel in options.kernel:
            tile = EVERY_TILE[kernel][padded_to(EVERY_TILE[kernel], head_dim)]
            print(f"{head_dim:>3}  {occupancy(kernel, tile, head_dim, options.rms, options.text)}  {tile}", flush=True)


if __name__ == "__main__":
    main()
