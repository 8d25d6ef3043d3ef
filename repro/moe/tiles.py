"""Tile sizes of the Triton backend: a frozen table by widths and dtype, one tile for each of the seven launches.

- `Tile`       rows, columns and depth of a tile, and what works on it
- `Tiles`      a tile for each launch of `repro.moe.triton`
- `Table`      the defaults of a dtype, and what was measured for given widths; `read_table` and `text` are its file's two sides
- `tiles_for`  the tiles for given widths, from the table that comes with the package (triton_tiles.json)

The tiles follow from (d_model, d_expert, dtype) alone: not from the number of tokens, nor of experts, nor from anything measured
while a program runs. So a row of the result never depends on the rest of the batch. Widths that the table does not hold get the
default of their dtype: `float32`; `half` for bfloat16 and float16; `half_narrow` for those where a width is under 128.
`repro bench tune` measures a new table.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from records.errors import MalformedError

SCHEMA = "repro.moe.tiles/v1"
_FILE = Path(__file__).with_name("triton_tiles.json")
_NARROW = 128
_LEAST = 16  # rows, columns and depth that a matrix instruction takes
_HALVES = ("bfloat16", "float16")
_DTYPES = ("float32", *_HALVES)
_DEFAULTS = ("float32", "half", "half_narrow")


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows, columns and depth of a tile, the warps and pipeline stages that work on it, and the programs a multiprocessor.

    `combine`, which multiplies nothing, uses `cols` and `warps` alone.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    programs: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """A tile for each launch; the first three are the forward's, and `combine` is the backward's too."""

    up: Tile
    down: Tile
    combine: Tile
    d_hidden: Tile
    dx: Tile
    dw_up: Tile
    dw_down: Tile


LAUNCHES = tuple(field.name for field in dataclasses.fields(Tiles))
Widths = tuple[int, int, str]
"""d_model, d_expert, and the dtype's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The defaults by kind of dtype, and the tiles measured for given widths with where they were."""

    defaults: Mapping[str, Tiles]
    measured: Mapping[Widths, Tiles]
    places: Mapping[Widths, str]

    def find(self, d_model: int, d_expert: int, dtype: str) -> Tiles:
        """The tiles measured for these widths, or the default of their dtype."""
        found = self.measured.get((d_model, d_expert, dtype))
        if found is not None:
            return found
        if dtype not in _HALVES:
            return self.defaults["float32"]
        return self.defaults["half_narrow" if min(d_model, d_expert) < _NARROW else "half"]

    def text(self) -> str:
        """The table as its file: JSON, one entry a line."""
        defaults = [f"{json.dumps(name)}: {json.dumps(_numbers(tiles))}" for name, tiles in self.defaults.items()]
        measured = [
            json.dumps(
                {
                    "d_model": D,
                    "d_expert": F,
                    "dtype": dtype,
                    "place": self.places[D, F, dtype],
                    "tiles": _numbers(tiles),
                }
            )
            for (D, F, dtype), tiles in sorted(self.measured.items())
        ]
        blocks = [
            f'"schema": {json.dumps(SCHEMA)}',
            _block('"defaults": {', defaults, "}"),
            _block('"measured": [', measured, "]"),
        ]
        return _block("{", blocks, "}") + "\n"


def tiles_for(d_model: int, d_expert: int, dtype: torch.dtype) -> Tiles:
    """The tiles for these widths. Raises `MalformedError` where the table cannot be read."""
    return table().find(d_model, d_expert, str(dtype).removeprefix("torch."))


def table() -> Table:
    """The table in use: the package's own, unless `use` named another."""
    return _in_use[-1] if _in_use else packaged()


@contextlib.contextmanager
def use(other: Table) -> Iterator[None]:
    """Take another table within this block: for benchmarks of one that was just measured, never for a run that is kept."""
    _in_use.append(other)
    try:
        yield
    finally:
        _in_use.pop()


_in_use: list[Table] = []


@functools.cache
def packaged() -> Table:
    """The table that comes with the package."""
    return read_table(_FILE.read_text(encoding="utf-8"), _FILE.name)


def read_table(text: str, name: str) -> Table:
    """The table of a file's `text`; `name` is for messages.

    Raises `MalformedError` for anything but whole tables: a missing default or launch, a tile that no kernel takes, widths
    given twice.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{name}: expected a table of tile sizes in JSON, found {error}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise MalformedError(f"{name}: expected schema {SCHEMA}, found {schema!r}; make a table with repro bench tune")
    defaults, entries = data.get("defaults"), data.get("measured")
    if not isinstance(defaults, dict) or set(defaults) != set(_DEFAULTS) or not isinstance(entries, list):
        raise MalformedError(
            f"{name}: expected defaults for {', '.join(_DEFAULTS)} and a list measured, found other keys"
        )
    measured: dict[Widths, Tiles] = {}
    places: dict[Widths, str] = {}
    for number, entry in enumerate(entries):
        where = f"{name}: measured[{number}]"
        widths, tiles, place = _entry(entry, where)
        if widths in measured:
            raise MalformedError(
                f"{where}: expected each widths and dtype once, found {widths} again; delete one of the two"
            )
        measured[widths], places[widths] = tiles, place
    by_kind = {kind: _tiles(defaults[kind], f"{name}: defaults.{kind}") for kind in _DEFAULTS}
    return Table(defaults=by_kind, measured=measured, places=places)


def _entry(entry: Any, where: str) -> tuple[Widths, Tiles, str]:
    keys = {"d_model", "d_expert", "dtype", "place", "tiles"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise MalformedError(f"{where}: expected an object of {', '.join(sorted(keys))}, found {_short(entry)}")
    D, F, dtype, place = (entry[key] for key in ("d_model", "d_expert", "dtype", "place"))
    if not (_is_count(D) and _is_count(F) and dtype in _DTYPES and isinstance(place, str)):
        raise MalformedError(
            f"{where}: expected widths of at least 1, a dtype of {', '.join(_DTYPES)} and a place, found "
            f"{_short([D, F, dtype, place])}"
        )
    return (D, F, dtype), _tiles(entry["tiles"], where), place


def _tiles(value: Any, where: str) -> Tiles:
    if not isinstance(value, dict) or set(value) != set(LAUNCHES):
        raise MalformedError(f"{where}: expected a tile for each of {', '.join(LAUNCHES)}, found {_short(value)}")
    return Tiles(
        **{launch: _tile(value[launch], f"{where}.{launch}", multiplies=launch != "combine") for launch in LAUNCHES}
    )


def _tile(value: Any, where: str, multiplies: bool) -> Tile:
    if not isinstance(value, list) or len(value) != len(dataclasses.fields(Tile)) or not all(map(_is_count, value)):
        raise MalformedError(
            f"{where}: expected [rows, cols, depth, warps, stages, programs], each at least 1, found {_short(value)}"
        )
    tile = Tile(*value)
    powers = (tile.rows, tile.cols, tile.depth, tile.warps)
    if any(number & (number - 1) for number in powers) or (multiplies and min(powers[:3]) < _LEAST) or tile.warps > 32:
        raise MalformedError(
            f"{where}: expected rows, cols and depth that are powers of two from {_LEAST} on, and 1 to 32 warps, found {value}"
        )
    return tile


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _short(value: Any) -> str:
    return repr(value)[:80]


def _numbers(tiles: Tiles) -> dict[str, list[int]]:
    return {launch: list(dataclasses.astuple(getattr(tiles, launch))) for launch in LAUNCHES}


def _block(opening: str, items: Sequence[str], closing: str) -> str:
    return "\n".join([opening, ",\n".join(items), closing]) if items else opening + closing
