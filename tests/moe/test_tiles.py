"""The table of tile sizes: lookup, defaults, its file, and what is no table."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from records.errors import MalformedError
from repro.moe import tiles
from repro.moe.tiles import LAUNCHES, Tile, read_table, table, tiles_for


def test_measured_widths_come_first_and_others_fall_to_their_dtypes_default() -> None:
    packaged = table()
    measured = replace(packaged.defaults["half"], up=Tile(64, 256, 32, 4, 4, 2))
    key = (768, 256, "bfloat16")
    with tiles.use(replace(packaged, measured={key: measured}, places={key: "here"})):
        assert tiles_for(768, 256, torch.bfloat16) == measured
        assert tiles_for(256, 768, torch.bfloat16) == packaged.defaults["half"]
        assert tiles_for(768, 256, torch.float16) == packaged.defaults["half"]
        assert tiles_for(768, 127, torch.float16) == packaged.defaults["half_narrow"]
        assert tiles_for(768, 256, torch.float32) == packaged.defaults["float32"]
    assert table() is packaged


def test_the_file_is_the_table_written() -> None:
    path = Path(tiles.__file__).with_name("triton_tiles.json")
    assert table().text() == path.read_text()
    key = (768, 256, "bfloat16")
    larger = replace(table(), measured={key: table().defaults["half"]}, places={key: "an H200, torch 2.11"})
    assert read_table(larger.text(), "table") == larger


def _entry(**changes: Any) -> dict[str, Any]:
    half = json.loads(table().text())["defaults"]["half"]
    return {"d_model": 8, "d_expert": 8, "dtype": "bfloat16", "place": "here", "tiles": half} | changes


def _with_up(value: object) -> Callable[[Any], object]:
    return lambda data: data["defaults"]["half"].update(up=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema="repro.moe.tiles/v2"), "expected schema repro.moe.tiles/v1, found"),
        (lambda data: data["defaults"].pop("half"), "expected defaults for float32, half, half_narrow"),
        (lambda data: data["defaults"]["half"].pop("dx"), r"defaults.half: expected a tile for each of up, down"),
        (_with_up([128, 128, 64, 8, 3]), r"defaults.half.up: expected \[rows, cols"),
        (_with_up([128, 128, True, 8, 3, 1]), r"defaults.half.up: expected \[rows, cols"),
        (_with_up([96, 128, 64, 8, 3, 1]), r"defaults.half.up: expected rows, cols and depth that are powers of two"),
        (_with_up([8, 128, 64, 8, 3, 1]), r"powers of two from 16 on"),
        (_with_up([128, 128, 64, 64, 3, 1]), r"1 to 32 warps"),
        (lambda data: data["measured"].append([]), r"measured\[0\]: expected an object of d_expert"),
        (lambda data: data["measured"].append(_entry(d_model=0)), r"measured\[0\]: expected widths of at least 1"),
        (
            lambda data: data["measured"].append(_entry(dtype="int8")),
            r"expected widths of at least 1, a dtype of float32",
        ),
        (
            lambda data: data["measured"].extend([_entry(), _entry()]),
            r"measured\[1\]: .* found \(8, 8, 'bfloat16'\) again",
        ),
    ],
)
def test_what_is_no_table_is_named(change: Callable[[Any], object], message: str) -> None:
    data = json.loads(table().text())
    change(data)
    with pytest.raises(MalformedError, match=rf"^table: .*{message}|^table: {message}"):
        read_table(json.dumps(data), "table")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "null"])
def test_what_is_no_json_object_is_named(text: str) -> None:
    with pytest.raises(MalformedError, match=r"^table: expected"):
        read_table(text, "table")


def test_a_tile_for_every_launch() -> None:
    assert {"up", "down", "combine", "d_hidden", "dx", "dw_up", "dw_down"} == set(LAUNCHES)
