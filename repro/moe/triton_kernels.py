"""The kernels of `repro.moe.triton` and `repro.moe.triton_order`, which say what each one does.

Rows are assignments in expert-major order, `token` and `order` their token and their place in token order. Those of the experts
that multiply are persistent: program p takes the tiles p, p + programs, … . Where a tile starts is a 64-bit offset, for T·D may
exceed 2³¹; within a tile offsets are 32-bit, which halves the registers that they take.
"""

# The decorators have no types, and a kernel's arguments are pointers and constants that only Triton understands.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_experts", "most"])
def _map(by_expert, tile_expert, tile_first, num_experts, most, ROWS: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr):
    # One program an expert, which counts the tiles of those before it, and one for the places that are left over.
    mine = tl.program_id(0)
    before = tl.full((), 0, tl.int64)
    for start in range(0, mine, BE):
        e = start + tl.arange(0, BE)
        inside = e < mine
        load = tl.load(by_expert + e + 1, mask=inside, other=0) - tl.load(by_expert + e, mask=inside, other=0)
        before += tl.sum((load + (ROWS - 1)) // ROWS, axis=0)
    if mine < num_experts:
        first = tl.load(by_expert + mine)
        tiles = (tl.load(by_expert + mine + 1) - first + (ROWS - 1)) // ROWS
        for done in range(0, tiles, BT):
            tile = done + tl.arange(0, BT)
            tl.store(tile_expert + before + tile, mine.to(tl.int64), mask=tile < tiles)
            tl.store(tile_first + before + tile, first + tile * ROWS, mask=tile < tiles)
    else:
        for place in range(before, most, BT):
            left = place + tl.arange(0, BT)
            tl.store(tile_expert + left, -1, mask=left < most)


@triton.jit(do_not_specialize=["total"])
def _up(
    x, w, h, a, s, token, order, tile_expert, tile_first, by_expert, total,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(F, BN)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        e = tl.load(tile_expert + tile // columns)
        if e >= 0:
            first = tl.load(tile_first + tile // columns)
            m = tl.arange(0, BM)
            row_in = m < tl.load(by_expert + e + 1) - first
            t = tl.load(token + first + m, mask=row_in, other=0)
            f = (tile % columns) * BN + tl.arange(0, BN)
            f_in = f < F
            w_e = w + e * D * 2 * F
            gate = tl.zeros((BM, BN), dtype=tl.float32)
            up = tl.zeros((BM, BN), dtype=tl.float32)
            for start in range(0, D, BK):
                d = start + tl.arange(0, BK)
                d_in = d < D
                x_tile = tl.load(x + t[:, None] * D + d[None, :], mask=row_in[:, None] & d_in[None, :], other=0)
                at = w_e + d[:, None] * 2 * F + f[None, :]
                w_in = d_in[:, None] & f_in[None, :]
                gate = tl.dot(x_tile, tl.load(at, mask=w_in, other=0), gate, input_precision="ieee")
                up = tl.dot(x_tile, tl.load(at + F, mask=w_in, other=0), up, input_precision="ieee")
            # Rounded before use, so that the backward, which reads the rounded values, computes the same activation.
            gate = gate.to(h.dtype.element_ty)
            up = up.to(h.dtype.element_ty)
            out_in = row_in[:, None] & f_in[None, :]
            at = h + first * 2 * F + (m[:, None] * 2 * F + f[None, :])
            tl.store(at, gate, mask=out_in)
            tl.store(at + F, up, mask=out_in)
            gate = gate.to(tl.float32)
            scale = tl.load(s + first + m, mask=row_in, other=0)
            act = gate * tl.sigmoid(gate) * up.to(tl.float32) * scale[:, None]
            tl.store(a + first * F + (m[:, None] * F + f[None, :]), act.to(a.dtype.element_ty), mask=out_in)


@triton.jit(do_not_specialize=["total"])
def _rows(
    rows, w, out, token, order, tile_expert, tile_first, by_expert, total,
    IN: tl.constexpr, OUT: tl.constexpr, STRIDE_IN: tl.constexpr, STRIDE_OUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(OUT, BN)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        e = tl.load(tile_expert + tile // columns)
        if e >= 0:
            first = tl.load(tile_first + tile // columns)
            m = tl.arange(0, BM)
            row_in = m < tl.load(by_expert + e + 1) - first
            o = (tile % columns) * BN + tl.arange(0, BN)
            o_in = o < OUT
            w_e = w + e * IN * OUT
            rows_e = rows + first * IN
            acc = tl.zeros((BM, BN), dtype=tl.float32)
            for start in range(0, IN, BK):
                i = start + tl.arange(0, BK)
                i_in = i < IN
                a_tile = tl.load(rows_e + m[:, None] * IN + i[None, :], mask=row_in[:, None] & i_in[None, :], other=0)
                at = w_e + i[:, None] * STRIDE_IN + o[None, :] * STRIDE_OUT
                w_tile = tl.load(at, mask=i_in[:, None] & o_in[None, :], other=0)
                acc = tl.dot(a_tile, w_tile, acc, input_precision="ieee")
            place = tl.load(order + first + m, mask=row_in, other=0)
            at = out + place[:, None] * OUT + o[None, :]
            tl.store(at, acc.to(out.dtype.element_ty), mask=row_in[:, None] & o_in[None, :])


@triton.jit
def _combine(rows, y, by_token, D: tl.constexpr, WIDTH: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    d_in = d < D
    acc = tl.zeros((WIDTH,), dtype=tl.float32)
    for n in range(tl.load(by_token + t), tl.load(by_token + t + 1)):
        acc += tl.load(rows + n * D + d, mask=d_in, other=0).to(tl.float32)
    tl.store(y + t * D + d, acc.to(y.dtype.element_ty), mask=d_in)


@triton.jit(do_not_specialize=["total"])
def _d_hidden(
    dy, w, h, s, dh, a, ds, token, order, tile_expert, tile_first, by_expert, total,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(F, BN)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        e = tl.load(tile_expert + tile // columns)
        if e >= 0:
            first = tl.load(tile_first + tile // columns)
            m = tl.arange(0, BM)
            row_in = m < tl.load(by_expert + e + 1) - first
            t = tl.load(token + first + m, mask=row_in, other=0)
            f = (tile % columns) * BN + tl.arange(0, BN)
            f_in = f < F
            w_e = w + e * F * D
            da = tl.zeros((BM, BN), dtype=tl.float32)
            for start in range(0, D, BK):
                d = start + tl.arange(0, BK)
                d_in = d < D
                dy_tile = tl.load(dy + t[:, None] * D + d[None, :], mask=row_in[:, None] & d_in[None, :], other=0)
                at = w_e + f[None, :] * D + d[:, None]
                w_tile = tl.load(at, mask=d_in[:, None] & f_in[None, :], other=0)
                da = tl.dot(dy_tile, w_tile, da, input_precision="ieee")
            scale = tl.load(s + first + m, mask=row_in, other=0)[:, None]
            h_e = h + first * 2 * F
            dh_e = dh + first * 2 * F
            a_e = a + first * F
            if BN < 128:
                partial = _hidden_columns(da, h_e, dh_e, a_e, m, f, row_in, scale, F)
            else:
                # In two halves: what the whole tile needs beside its sum would not fit the registers.
                left, right = tl.split(tl.permute(tl.reshape(da, (BM, 2, BN // 2)), (0, 2, 1)))
                half = (tile % columns) * BN + tl.arange(0, BN // 2)
                partial = _hidden_columns(left, h_e, dh_e, a_e, m, half, row_in, scale, F)
                partial += _hidden_columns(right, h_e, dh_e, a_e, m, half + BN // 2, row_in, scale, F)
            place = tl.load(order + first + m, mask=row_in, other=0)
            tl.store(ds + place * columns + tile % columns, partial, mask=row_in)


@triton.jit
def _hidden_columns(da, h_e, dh_e, a_e, m, f, row_in, scale, F: tl.constexpr):
    # Writes s·A and dH of these columns from dA' and the pre-activation; returns their part of ds.
    tile_in = row_in[:, None] & (f < F)[None, :]
    wide = m[:, None] * 2 * F + f[None, :]
    gate = tl.load(h_e + wide, mask=tile_in, other=0).to(tl.float32)
    up = tl.load(h_e + F + wide, mask=tile_in, other=0).to(tl.float32)
    sigma = tl.sigmoid(gate)
    silu = gate * sigma
    act = silu * up
    partial = tl.sum(da * act, axis=1)
    tl.store(a_e + (m[:, None] * F + f[None, :]), (act * scale).to(a_e.dtype.element_ty), mask=tile_in)
    da = da * scale
    tl.store(dh_e + F + wide, (da * silu).to(dh_e.dtype.element_ty), mask=tile_in)
    dgate = da * up * (sigma + silu * (1 - sigma))
    tl.store(dh_e + wide, dgate.to(dh_e.dtype.element_ty), mask=tile_in)
    return partial


@triton.jit(do_not_specialize=["total"])
def _weights(
    a, b, out, token, by_expert, total,
    ROWS: tl.constexpr, COLS: tl.constexpr, LEFT_BY_TOKEN: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i_tiles = tl.cdiv(ROWS, BI)
    j_tiles = tl.cdiv(COLS, BJ)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        e = (tile // (i_tiles * j_tiles)).to(tl.int64)
        i = (tile // j_tiles) % i_tiles * BI + tl.arange(0, BI)
        j = tile % j_tiles * BJ + tl.arange(0, BJ)
        i_in = i < ROWS
        j_in = j < COLS
        end = tl.load(by_expert + e + 1)
        acc = tl.zeros((BI, BJ), dtype=tl.float32)
        for start in range(tl.load(by_expert + e), end, BR):
            row = start + tl.arange(0, BR)
            row_in = row < end
            t = tl.load(token + row, mask=row_in, other=0)
            if LEFT_BY_TOKEN:
                left = t
                right = row
            else:
                left = row
                right = t
            a_tile = tl.load(a + left[None, :] * ROWS + i[:, None], mask=row_in[None, :] & i_in[:, None], other=0)
            b_tile = tl.load(b + right[:, None] * COLS + j[None, :], mask=row_in[:, None] & j_in[None, :], other=0)
            acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
        at = out + e * ROWS * COLS + i[:, None] * COLS + j[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=i_in[:, None] & j_in[None, :])


@triton.jit(do_not_specialize=["count", "num_experts"])
def _count(expert, counts, count, num_experts, BN: tl.constexpr, BE: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    n = block * BN + tl.arange(0, BN)
    mine = tl.load(expert + n, mask=n < count, other=-1)
    for first in range(0, num_experts, BE):
        e = first + tl.arange(0, BE)
        hits = tl.sum((mine[:, None] == e[None, :]).to(tl.int32), axis=0)
        tl.store(counts + block * num_experts + e, hits, mask=e < num_experts)


@triton.jit(do_not_specialize=["blocks", "num_experts"])
def _scan_blocks(counts, loads, blocks, num_experts, BB: tl.constexpr, BE: tl.constexpr):
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    e_in = e < num_experts
    before = tl.zeros((BE,), dtype=tl.int32)
    for first in range(0, blocks, BB):
        b = (first + tl.arange(0, BB)).to(tl.int64)
        inside = (b < blocks)[:, None] & e_in[None, :]
        at = counts + b[:, None] * num_experts + e[None, :]
        tile = tl.load(at, mask=inside, other=0)
        tl.store(at, tl.cumsum(tile, axis=0) - tile + before[None, :], mask=inside)
        before += tl.sum(tile, axis=0)
    tl.store(loads + e, before, mask=e_in)


@triton.jit(do_not_specialize=["num_experts"])
def _scan_experts(loads, by_expert, num_experts, BE: tl.constexpr):
    total = tl.zeros((1,), dtype=tl.int64)
    for first in range(0, num_experts, BE):
        e = first + tl.arange(0, BE)
        e_in = e < num_experts
        tile = tl.load(loads + e, mask=e_in, other=0).to(tl.int64)
        tl.store(by_expert + e, tl.cumsum(tile, axis=0) - tile + total, mask=e_in)
        total += tl.sum(tile, axis=0)
    tl.store(by_expert + num_experts + tl.arange(0, 1), total)


@triton.jit(do_not_specialize=["count", "num_experts"])
def _scatter(expert, counts, by_expert, order, count, num_experts, BN: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BN)
    n = block * BN + i
    inside = n < count
    mine = tl.load(expert + n, mask=inside, other=-1)
    same = (mine[:, None] == mine[None, :]) & (i[None, :] < i[:, None])
    rank = tl.sum(same.to(tl.int32), axis=1)
    first = tl.load(by_expert + mine, mask=inside, other=0)
    before = tl.load(counts + block * num_experts + mine, mask=inside, other=0)
    tl.store(order + first + before + rank, n, mask=inside)
