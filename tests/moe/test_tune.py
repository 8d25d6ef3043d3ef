"""The search for tiles, by Triton's interpreter: what it refuses, what it keeps, and that its table can be gone on with."""

import importlib.metadata
import importlib.util
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from repro.bench import tune
from repro.bench.moe import Shape
from repro.moe import triton
from repro.moe.tiles import LAUNCHES, Table, Tile, packaged, read_table

INTERPRETS = importlib.util.find_spec("triton") is not None and (
    np.lib.NumpyVersion(np.__version__) < "2.4.0" or importlib.metadata.version("triton") >= "3.8"
)
if INTERPRETS:
    os.environ["TRITON_INTERPRET"] = "1"
interpreted = [
    pytest.mark.skipif(not INTERPRETS, reason="triton is not there, or cannot be interpreted"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

SHAPE = Shape(tokens=12, d_model=24, d_expert=16, num_experts=3, top_k=2)
SMALL, OTHER = Tile(16, 16, 16, 4, 1), Tile(16, 32, 16, 4, 1)
CANDIDATES = {launch: [OTHER] for launch in LAUNCHES} | {"combine": [Tile(1, 64, 1, 1, 1)]}


def start() -> Table:
    defaults = dict.fromkeys(
        packaged().defaults, replace(packaged().defaults["float32"], **dict.fromkeys(LAUNCHES, SMALL))
    )
    return Table(defaults=defaults, measured={}, places={})


def test_the_widest_even_shape_stands_for_its_widths() -> None:
    narrow = replace(SHAPE, d_model=8)
    shapes = [
        SHAPE,
        narrow,
        replace(SHAPE, tokens=13, load="zipf"),
        replace(SHAPE, tokens=14),
        replace(SHAPE, tokens=2),
    ]
    assert tune._widest(shapes) == [replace(SHAPE, tokens=14), narrow]


class TestSearch:
    pytestmark = interpreted

    def test_faster_tiles_enter_the_table_and_widths_that_it_holds_are_left_alone(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seconds = {SMALL: 1.0, OTHER: 0.5}
        monkeypatch.setattr(tune, "_time", lambda run, tile, device: seconds.get(tile, 0.99))
        seen: list[Table] = []
        shapes = [SHAPE, replace(SHAPE, d_model=16)]
        result, table = tune.measure(
            device="cpu", start=start(), shapes=shapes, candidates=CANDIDATES, budget=None, done=seen.append
        )
        assert [widths["kept"] for widths in result["widths"]] == [True, True]
        assert set(table.measured) == {(24, 16, "float32"), (16, 16, "float32")}
        chosen = table.measured[24, 16, "float32"]
        assert chosen.up == chosen.dw_down == OTHER
        assert chosen.combine == SMALL, "a gain within the noise is none"
        assert result["widths"][0]["launches"]["up"]["before"] == 1
        assert result["widths"][0]["launches"]["up"]["after"] == 0.5
        assert set(result["widths"][0]["difference"]) == {"y", "dx", "dweight", "dup", "ddown"}
        assert [len(grown.measured) for grown in seen] == [1, 2]
        assert read_table(table.text(), "table") == table
        again, same = tune.measure(device="cpu", start=table, shapes=shapes, candidates=CANDIDATES)
        assert again["widths"] == []
        assert same == table

    def test_tiles_that_fail_or_differ_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        up = triton.up

        def faulty(plan: triton.Plan, tile: Tile, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            h_NF, a_NF = up(plan, tile, *tensors)
            return (h_NF, a_NF * 1.01) if tile == OTHER else (h_NF, a_NF)

        monkeypatch.setattr(triton, "up", faulty)
        candidates = CANDIDATES | {"dx": [Tile(24, 16, 16, 4, 1)]}
        result, table = tune.measure(device="cpu", start=start(), shapes=[SHAPE], candidates=candidates)
        launches = result["widths"][0]["launches"]
        assert launches["up"]["refused"]["16 32 16 4 1 1"].startswith("differs from 16 16 16 4 1 1 by 0.0")
        assert "power" in launches["dx"]["refused"]["24 16 16 4 1 1"]
        chosen = table.measured[24, 16, "float32"]
        assert chosen.up == chosen.dx == SMALL

    def test_what_differs_from_the_loop_is_not_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        combine = triton.combine
        monkeypatch.setattr(triton, "combine", lambda *inputs: combine(*inputs) * 1.01)
        seen: list[Table] = []
        result, table = tune.measure(
            device="cpu", start=start(), shapes=[SHAPE], candidates=CANDIDATES, done=seen.append
        )
        assert [widths["kept"] for widths in result["widths"]] == [False]
        assert result["widths"][0]["difference"]["y"] == pytest.approx(0.01, rel=0.1)
        assert table == start()
        assert seen == []

    def test_widths_whose_tiles_in_use_fail_are_named_and_the_others_measured(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dx = triton.dx

        def faulty(plan: triton.Plan, tile: Tile, dh_NF: Tensor, w_up_EDF: Tensor) -> Tensor:
            if w_up_EDF.shape[1] == 24:
                raise RuntimeError("out of resource: shared memory\nand more")
            return dx(plan, tile, dh_NF, w_up_EDF)

        monkeypatch.setattr(triton, "dx", faulty)
        shapes = [SHAPE, replace(SHAPE, d_model=16)]
        result, table = tune.measure(device="cpu", start=start(), shapes=shapes, candidates=CANDIDATES)
        first, second = result["widths"]
        assert first["failed"] == "RuntimeError: out of resource: shared memory"
        assert [first["kept"], second["kept"]] == [False, True]
        assert set(table.measured) == {(16, 16, "float32")}

    def test_no_widths_begin_once_the_budget_is_spent(self) -> None:
        result, table = tune.measure(device="cpu", start=start(), shapes=[SHAPE], candidates=CANDIDATES, budget=-1)
        assert result["widths"] == []
        assert result["widths_left"] == 1
        assert table == start()


def test_every_launch_has_candidates_that_a_table_can_hold() -> None:
    assert set(tune.CANDIDATES) == set(LAUNCHES)
    for launch, found in tune.CANDIDATES.items():
        assert len(set(found)) == len(found)
        for tile in found:
            key = (8, 8, "bfloat16")
            tiles = replace(packaged().defaults["half"], **{launch: tile})
            table = replace(packaged(), measured={key: tiles}, places={key: ""})
            assert read_table(table.text(), "table").find(8, 8, "bfloat16") == tiles
    assert torch.bfloat16 in tune.CLOSE
