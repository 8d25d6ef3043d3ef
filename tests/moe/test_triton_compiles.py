"""The Triton kernels compile for an H200 without one: tensor-core instructions, no atomics, registers that suffice."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from repro.bench.tune import CANDIDATES
from repro.moe.tiles import LAUNCHES, Tile, tiles_for

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

COMPILE = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from repro.moe import triton_kernels
from repro.moe.tiles import Tile

D, F = int(sys.argv[1]), int(sys.argv[2])
types = {"total": "i32", "s": "*fp32", "ds": "*fp32", "counts": "*i32", "loads": "*i32", "expert": "*i64"}
types |= dict.fromkeys(("count", "blocks", "num_experts", "most"), "i32")
types |= dict.fromkeys(("token", "order", "tile_expert", "tile_first", "by_expert", "by_token"), "*i64")
found = []
for launch, *numbers in json.loads(sys.argv[3]):
    tile = Tile(*numbers)
    by_row = {"BM": tile.rows, "BN": tile.cols, "BK": tile.depth}
    by_weight = {"BI": tile.rows, "BJ": tile.cols, "BR": tile.depth}
    kernel, constants = {
        "up": ("_up", {"D": D, "F": F} | by_row),
        "down": ("_rows", {"IN": F, "OUT": D, "STRIDE_IN": D, "STRIDE_OUT": 1} | by_row),
        "dx": ("_rows", {"IN": 2 * F, "OUT": D, "STRIDE_IN": 1, "STRIDE_OUT": 2 * F} | by_row),
        "d_hidden": ("_d_hidden", {"D": D, "F": F} | by_row),
        "dw_up": ("_weights", {"ROWS": D, "COLS": 2 * F, "LEFT_BY_TOKEN": True} | by_weight),
        "dw_down": ("_weights", {"ROWS": F, "COLS": D, "LEFT_BY_TOKEN": False} | by_weight),
        "combine": ("_combine", {"D": D, "WIDTH": tile.cols}),
        "map": ("_map", {"ROWS": tile.rows, "BE": 1024, "BT": 128}),
        "count": ("_count", {"BN": 128, "BE": 32}),
        "scan_blocks": ("_scan_blocks", {"BB": 64, "BE": 32}),
        "scan_experts": ("_scan_experts", {"BE": 1024}),
        "scatter": ("_scatter", {"BN": 128}),
    }[launch]
    function = getattr(triton_kernels, kernel)
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, sys.argv[4]) for n in names}
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    found.append({"launch": launch, "ptx": compiled.asm["ptx"], "shared": compiled.metadata.shared})
print(json.dumps(found))
"""
PRODUCTS = {"up", "down", "dx", "d_hidden", "dw_up", "dw_down"}
OTHERS = [(name, 128, 128, 64, 4, 1) for name in ("map", "count", "scan_blocks", "scan_experts", "scatter")]


def check(
    widths: tuple[int, int], launches: list[tuple[str | int, ...]], folder: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Compile these launches and their tiles as for an H200, and look at what came out; float32 has no tensor core."""
    products = PRODUCTS if dtype == torch.bfloat16 else set()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    command = [sys.executable, "-c", COMPILE, *map(str, widths), json.dumps(launches)]
    command.append("*bf16" if dtype == torch.bfloat16 else "*fp32")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ptxas = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/ptxas"  # type: ignore[union-attr, arg-type]
    kernels = json.loads(done.stdout)
    assert len(kernels) == len(launches)
    for kernel, launch in zip(kernels, launches, strict=True):
        assert kernel["shared"] <= 227 * 1024, launch  # what a program on an H200 may hold
        assert not re.search(r"\b(atom|red)\.", kernel["ptx"]), launch
        assert ("wgmma" in kernel["ptx"]) == (kernel["launch"] in products), launch
        source = folder / "kernel.ptx"
        source.write_text(kernel["ptx"])
        usage = subprocess.run(
            [ptxas, "-arch=sm_90a", "-v", source, "-o", os.devnull], capture_output=True, text=True, check=True
        )
        assert " 0 bytes spill stores" in usage.stderr, (launch, usage.stderr)


@pytest.mark.parametrize(
    ("widths", "dtype"), [((4096, 1024), torch.bfloat16), ((136, 72), torch.bfloat16), ((136, 72), torch.float32)]
)
def test_kernels_compile_for_hopper(widths: tuple[int, int], dtype: torch.dtype, tmp_path: Path) -> None:
    tiles = tiles_for(*widths, dtype)
    check(widths, [(name, *astuple(getattr(tiles, name))) for name in LAUNCHES] + OTHERS, tmp_path, dtype)


def demand(tile: Tile) -> tuple[int, int]:
    """Sums a warp holds, and what the stages hold in shared memory."""
    return tile.rows * tile.cols // tile.warps, (tile.rows + tile.cols) * tile.depth * tile.stages


@pytest.mark.timeout(1200)
def test_tiles_that_are_tried_compile_too(tmp_path: Path) -> None:
    # The most demanding of each launch; all of them, in minutes, where somebody asks.
    tried = [(launch, tile) for launch in LAUNCHES for tile in CANDIDATES[launch]]
    if os.environ.get("REPRO_ALL_TILES") != "1":
        tried = [(launch, max(CANDIDATES[launch], key=demand)) for launch in LAUNCHES]
    check((4096, 1024), [(launch, *astuple(tile)) for launch, tile in tried], tmp_path)
