"""The Triton kernels compile for an H200 without one: tensor-core instructions, no atomics, registers that suffice."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

COMPILE = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from repro.moe import triton_kernels
from repro.moe.triton import tiles_for

D, F = int(sys.argv[1]), int(sys.argv[2])
tiles = tiles_for(D, F, torch.bfloat16)
widths = {"D": D, "F": F}
tile = {"BM": tiles.rows, "BN": tiles.cols, "BK": tiles.depth}
weight_tile = {"BI": tiles.rows, "BJ": tiles.cols, "BR": tiles.depth}
kernels = {
    "up": ("_up", widths | tile),
    "down": ("_rows", {"IN": F, "OUT": D, "STRIDE_IN": D, "STRIDE_OUT": 1} | tile),
    "dx": ("_rows", {"IN": 2 * F, "OUT": D, "STRIDE_IN": 1, "STRIDE_OUT": 2 * F} | tile),
    "d_hidden": ("_d_hidden", widths | tile | {"BN": tiles.cols // 2}),
    "dw_up": ("_weights", {"ROWS": D, "COLS": 2 * F, "LEFT_BY_TOKEN": True} | weight_tile),
    "dw_down": ("_weights", {"ROWS": F, "COLS": D, "LEFT_BY_TOKEN": False} | weight_tile),
    "combine": ("_combine", {"D": D, "WIDTH": 128}),
}
types = {"total": "i32", "s": "*fp32", "ds": "*fp32"}
blocks = {"BN": 128}
kernels |= {
    "count": ("_count", blocks | {"BE": 32}),
    "scan_blocks": ("_scan_blocks", {"BB": 64, "BE": 32}),
    "scan_experts": ("_scan_experts", {"BE": 1024}),
    "scatter": ("_scatter", blocks),
}
types |= dict.fromkeys(("count", "blocks", "num_experts"), "i32") | {"counts": "*i32", "loads": "*i32", "expert": "*i64"}
types |= dict.fromkeys(("token", "order", "tile_expert", "tile_first", "by_expert", "by_token"), "*i64")
found = {}
for name, (kernel, constants) in kernels.items():
    function = getattr(triton_kernels, kernel)
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*bf16") for n in names}
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")},
    )
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    found[name] = {"ptx": compiled.asm["ptx"], "shared": compiled.metadata.shared}
print(json.dumps(found))
"""


@pytest.mark.parametrize("widths", [(4096, 1024), (136, 72)])
def test_kernels_compile_for_hopper(widths: tuple[int, int], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    command = [sys.executable, "-c", COMPILE, *map(str, widths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ptxas = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/ptxas"  # type: ignore[union-attr, arg-type]
    for name, kernel in json.loads(done.stdout).items():
        assert kernel["shared"] <= 227 * 1024, name  # what a program on an H200 may hold
        assert not re.search(r"\b(atom|red)\.", kernel["ptx"]), name
        products = {"up", "down", "dx", "d_hidden", "dw_up", "dw_down"}
        assert ("wgmma" in kernel["ptx"]) == (name in products), name
        source = tmp_path / f"{name}.ptx"
        source.write_text(kernel["ptx"])
        usage = subprocess.run(
            [ptxas, "-arch=sm_90a", "-v", source, "-o", os.devnull], capture_output=True, text=True, check=True
        )
        assert " 0 bytes spill stores" in usage.stderr, (name, usage.stderr)
