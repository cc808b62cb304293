"""Triton form of `mixed_decode`: every part of the cache is cut into pieces, each attended to by a program of its own, and
one more kernel puts the pieces together (flash decoding, https://pytorch.org/blog/flash-decoding/).

Codes go into the products as they are, in bfloat16, which holds them exactly; what they are multiplied with, the scaled
query or the scaled weights, is split into as many bfloat16 terms as its dtype needs (one for bfloat16, two for float16,
three for float32), so that no precision is lost. Neighbouring channels of a value share a scale: the rows of a product
are pairs of (such channels, query head), and of each row only these channels are kept, which costs nothing as long as
there are fewer pairs than a matrix unit has rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmaccel.kernels.gpu.target import Example, target

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
LOG2E = tl.constexpr(1.4426950408889634)
COMBINED = 16  # pieces that `_combine` reads at a time


class Config(NamedTuple):
    """block: entries at a time, at most, half as many in float32. programs: that fill the GPU. rows: of a product, at most,
    for 128 channels. warps: of a program for entries in few bits and in full precision, of the latter
    twice as many in float32."""

    block: int
    programs: int
    rows: int
    warps: tuple[int, int]
    num_stages: int
    precision: str = "tf32x3"


CONFIGS = {
    "sm_80": Config(64, 432, 64, (8, 4), 2),
    "sm_86": Config(64, 336, 64, (8, 4), 2),
    "sm_90": Config(64, 1056, 64, (2, 4), 3),
    "gfx942": Config(64, 608, 64, (4, 4), 1, "ieee"),
    "interpreter": Config(32, 6, 32, (4, 4), 1),
}


@triton.jit
def _numbers(packed, PART: tl.constexpr, BITS: tl.constexpr):
    """Codes less 2^(BITS - 1), so that their mean is near 0, in bfloat16."""
    if BITS == 8:
        numbers, centre = packed.to(tl.bfloat16), 128.0
    else:
        code = (packed >> (PART * BITS)) & ((1 << BITS) - 1)
        # the last bits of 128 in bfloat16 count ones
        numbers, centre = (code.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True), 128.0 + (1 << (BITS - 1))
    return numbers - tl.full([1, 1], centre, tl.float32).to(tl.bfloat16)


@triton.jit
def _product(a, numbers, acc, TERMS: tl.constexpr):
    """acc + a @ numbers; a: float32, numbers: bfloat16."""
    term = a.to(tl.bfloat16)
    acc = tl.dot(term, numbers, acc)
    if TERMS > 1:
        a -= term.to(tl.float32)
        term = a.to(tl.bfloat16)
        acc = tl.dot(term, numbers, acc)
    if TERMS > 2:
        a -= term.to(tl.float32)
        acc = tl.dot(a.to(tl.bfloat16), numbers, acc)
    return acc


@triton.jit
def _with_bias(logits, bias_ptr, place, inside, head, in_heads, bias_head, BIAS: tl.constexpr):
    """In base 2. BIAS: 0 for none, 1 for one to all heads of the program, 2 for one to every head."""
    if BIAS == 1:
        logits += tl.load(bias_ptr + place, mask=inside, other=float("-inf"))[None, :] * LOG2E
    elif BIAS == 2:
        at = head.to(tl.int64)[:, None] * bias_head + place[None, :]
        bias = tl.load(bias_ptr + at, mask=in_heads[:, None] & inside[None, :], other=float("-inf"))
        logits += bias * LOG2E
    return logits


@triton.jit
def _packed(
    query_ptr,
    key_ptr,
    key_scale_ptr,
    key_zero_ptr,
    value_ptr,
    value_scale_ptr,
    value_zero_ptr,
    bias_ptr,
    out_ptr,
    top_ptr,
    total_ptr,
    scale,
    n,
    chunk,
    first_piece,
    pieces,
    kv_heads,
    bias_batch,
    bias_kv,
    bias_head,
    RATIO: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SHARES: tl.constexpr,
    TERMS: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Program (piece, sample and KV head, HEADS of its RATIO query heads): the `chunk` entries of a piece of a part of n.

    SHARES: scales of a value. BLOCK divides GROUP and chunk. scale: of logits in base 2."""
    PARTS: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = WIDTH // PARTS
    CENTRE: tl.constexpr = 1 << (BITS - 1)
    piece = tl.program_id(0)
    kv = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)
    share = row // HEADS
    head = tl.program_id(2) * HEADS + row % HEADS
    live = (share < SHARES) & (head < RATIO)
    byte = tl.arange(0, BLOCK_BYTES)
    in_width = byte < BYTES
    here = live[:, None] & in_width[None, :]
    first = piece.to(tl.int64) * chunk
    count = tl.minimum(chunk, n - first).to(tl.int32)
    query_ptr += (kv * RATIO + head)[:, None] * WIDTH + byte[None, :]
    key_ptr += (kv * n + first) * BYTES
    value_ptr += (kv * n + first) * BYTES
    key_scale_ptr += (kv * n + first) // GROUP * WIDTH + byte
    key_zero_ptr += (kv * n + first) // GROUP * WIDTH + byte
    value_scale_ptr += (kv * n + first) * SHARES
    value_zero_ptr += (kv * n + first) * SHARES
    in_group = (first % GROUP).to(tl.int32)
    if BIAS:
        bias_ptr += kv // kv_heads * bias_batch + kv % kv_heads * bias_kv + first
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    shift = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, BLOCK_BYTES], tl.float32)
    acc1 = tl.zeros([ROWS, BLOCK_BYTES], tl.float32)
    acc2 = tl.zeros([ROWS, BLOCK_BYTES], tl.float32)
    acc3 = tl.zeros([ROWS, BLOCK_BYTES], tl.float32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        tile = place[:, None] * BYTES + byte[None, :]
        keys = tl.load(key_ptr + tile, mask=in_width[None, :], other=0)
        values = tl.load(value_ptr + tile, mask=in_width[None, :], other=0)
        group = (in_group + start) // GROUP * WIDTH
        logits = tl.zeros([ROWS, BLOCK], tl.float32)
        offset = tl.zeros([ROWS], tl.float32)
        for part in tl.static_range(PARTS):
            query = tl.load(query_ptr + part * BYTES, mask=here, other=0.0).to(tl.float32) * scale
            step = tl.load(key_scale_ptr + group + part * BYTES, mask=in_width, other=0.0).to(tl.float32)
            zero = tl.load(key_zero_ptr + group + part * BYTES, mask=in_width, other=0.0).to(tl.float32)
            offset += tl.sum(query * (zero + step * CENTRE)[None, :], 1)
            logits = _product(query * step[None, :], tl.trans(_numbers(keys, part, BITS)), logits, TERMS)
        logits += offset[:, None]
        logits = _with_bias(logits, bias_ptr, place, place < count, head, live, bias_head, BIAS)
        new_top = tl.maximum(top, tl.max(logits, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # of entries that are all hidden
        weights = tl.exp2(logits - safe[:, None])
        fade = tl.exp2(top - safe)
        top = new_top
        total = total * fade + tl.sum(weights, 1)
        at = place[None, :] * SHARES + share[:, None]
        step = tl.load(value_scale_ptr + at, mask=live[:, None], other=0.0).to(tl.float32)
        zero = tl.load(value_zero_ptr + at, mask=live[:, None], other=0.0).to(tl.float32)
        shift = shift * fade + tl.sum(weights * (zero + step * CENTRE), 1)
        weights *= step
        acc0 = _product(weights, _numbers(values, 0, BITS), acc0 * fade[:, None], TERMS)
        if PARTS > 1:
            acc1 = _product(weights, _numbers(values, 1, BITS), acc1 * fade[:, None], TERMS)
        if PARTS > 2:
            acc2 = _product(weights, _numbers(values, 2, BITS), acc2 * fade[:, None], TERMS)
            acc3 = _product(weights, _numbers(values, 3, BITS), acc3 * fade[:, None], TERMS)
    out = (kv * RATIO + head) * pieces + first_piece + piece
    tl.store(top_ptr + out, top, mask=live & (share == 0))
    tl.store(total_ptr + out, total, mask=live & (share == 0))
    for part in tl.static_range(PARTS):
        channel = part * BYTES + byte
        acc = acc0 if part == 0 else (acc1 if part == 1 else (acc2 if part == 2 else acc3))
        mine = here & ((channel // (WIDTH // SHARES))[None, :] == share[:, None])
        tl.store(out_ptr + out[:, None] * WIDTH + channel[None, :], acc + shift[:, None], mask=mine)


@triton.jit
def _exact(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    out_ptr,
    top_ptr,
    total_ptr,
    scale,
    n,
    chunk,
    first_piece,
    pieces,
    kv_heads,
    key_batch,
    key_head,
    value_batch,
    value_head,
    bias_batch,
    bias_kv,
    bias_head,
    RATIO: tl.constexpr,
    WIDTH: tl.constexpr,
    KEY_STEP: tl.constexpr,
    VALUE_STEP: tl.constexpr,
    UNIT: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The same for the entries in full precision. Strides of samples and heads are in UNIT values, so that the compiler
    sees what they are multiples of; those of tokens are constant."""
    piece = tl.program_id(0)
    kv = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    live = head < RATIO
    channel = tl.arange(0, BLOCK_WIDTH)
    in_width = channel < WIDTH
    first = piece.to(tl.int64) * chunk
    count = tl.minimum(chunk, n - first).to(tl.int32)
    sample, kv_head = kv // kv_heads, kv % kv_heads
    row = (kv * RATIO + head)[:, None] * WIDTH + channel[None, :]
    query = tl.load(query_ptr + row, mask=live[:, None] & in_width[None, :], other=0.0)
    key_ptr += (sample * key_batch + kv_head * key_head) * UNIT + first * KEY_STEP + channel[None, :]
    value_ptr += (sample * value_batch + kv_head * value_head) * UNIT + first * VALUE_STEP + channel[None, :]
    if BIAS:
        bias_ptr += sample * bias_batch + kv_head * bias_kv + first
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_WIDTH], tl.float32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < count
        here = inside[:, None] & in_width[None, :]
        keys = tl.load(key_ptr + place.to(tl.int64)[:, None] * KEY_STEP, mask=here, other=0.0)
        values = tl.load(value_ptr + place.to(tl.int64)[:, None] * VALUE_STEP, mask=here, other=0.0)
        logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
        logits = _with_bias(logits, bias_ptr, place, inside, head, live, bias_head, BIAS)
        logits = tl.where(inside[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # of entries that are all hidden
        weights = tl.exp2(logits - safe[:, None])
        fade = tl.exp2(top - safe)
        top = new_top
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
    out = (kv * RATIO + head) * pieces + first_piece + piece
    tl.store(top_ptr + out, top, mask=live)
    tl.store(total_ptr + out, total, mask=live)
    tl.store(out_ptr + out[:, None] * WIDTH + channel[None, :], acc, mask=live[:, None] & in_width[None, :])


@triton.jit
def _combine(
    part_ptr, top_ptr, total_ptr, out_ptr, pieces, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """Program: a query head of a sample."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_WIDTH)
    in_width = channel < WIDTH
    top_ptr += row * pieces
    total_ptr += row * pieces
    part_ptr += row * pieces * WIDTH
    top = float("-inf")
    for start in range(0, pieces, BLOCK):
        piece = start + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.max(tl.load(top_ptr + piece, mask=piece < pieces, other=float("-inf")), 0))
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    acc = tl.zeros([BLOCK_WIDTH], tl.float32)
    for start in range(0, pieces, BLOCK):
        piece = start + tl.arange(0, BLOCK)
        inside = piece < pieces
        weight = tl.exp2(tl.load(top_ptr + piece, mask=inside, other=float("-inf")) - safe)
        total += tl.sum(weight * tl.load(total_ptr + piece, mask=inside, other=0.0), 0)
        here = inside[:, None] & in_width[None, :]
        part = tl.load(part_ptr + piece[:, None] * WIDTH + channel[None, :], mask=here, other=0.0)
        acc += tl.sum(weight[:, None] * part, 0)
    out = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * WIDTH + channel, out.to(out_ptr.dtype.element_ty), mask=in_width)


def fits(
    query: Tensor, key: Tensor, value: Tensor, packed: list[Tensor], bits: list[int], bias: Tensor | None, scale: float
) -> bool:
    width = query.shape[3]
    if query.dtype not in FLOATS or width > 256 or query.numel() == 0:
        return False
    if any(x.dtype not in (*FLOATS, torch.uint8) for x in packed):
        return False
    parts = [packed[i : i + 6] for i in range(0, len(packed), 6)]
    narrow = all(part[4].shape[3] <= _most_rows(CONFIGS["interpreter"], width) for part in parts)
    return narrow and all(_block(64, _group(part)) >= 16 for part in parts if part[0].shape[2])


def launch(
    query: Tensor, key: Tensor, value: Tensor, packed: list[Tensor], bits: list[int], bias: Tensor | None, scale: float
) -> Tensor:
    batch, heads, _, width = query.shape
    kv_heads, device = key.shape[1], target(query)
    config, ratio = CONFIGS[device], heads // kv_heads
    query = query.contiguous()
    parts = [[x.contiguous() for x in packed[i : i + 6]] for i in range(0, len(packed), 6)]
    key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (key, value))
    if bias is not None and bias.stride(2) != 1:
        bias = bias.contiguous()

    lengths = [part[0].shape[2] for part in parts] + [key.shape[2]]
    pieces = [_pieces(config, n, batch * kv_heads) for n in lengths]
    counts = [count for count, _ in pieces]
    every = sum(counts)
    part_out = query.new_empty(batch * heads, every, width, dtype=torch.float32)
    top, total = (query.new_empty(batch * heads, every, dtype=torch.float32) for _ in range(2))
    scalars = scale * LOG2E.value
    first_piece = start = 0
    for i, (n, (count, chunk)) in enumerate(zip(lengths, pieces, strict=True)):
        here = None if bias is None else bias[:, :, start:]
        strides, kind = _bias_strides(bias, kv_heads, heads)
        numbers = (scalars, n, chunk, first_piece, every, kv_heads)
        if count and i < len(parts):
            meta, options = _packed_arguments(
                config, query.dtype, width, ratio, bits[i], _group(parts[i]), parts[i][4].shape[3], kind
            )
            grid = (count, batch * kv_heads, triton.cdiv(ratio, meta["HEADS"]))
            _packed[grid](query, *parts[i], here, part_out, top, total, *numbers, *strides, **meta, **options)
        elif count:
            steps, meta, options = _exact_arguments(
                config, query.dtype, width, ratio, key.stride(), value.stride(), kind
            )
            grid = (count, batch * kv_heads, triton.cdiv(ratio, meta["ROWS"]))
            outs = part_out, top, total
            _exact[grid](query, key, value, here, *outs, *numbers, *steps, *strides, **meta, **options)
        first_piece, start = first_piece + count, start + n
    out = query.new_empty(query.shape)
    meta, options = _combine_arguments(width)
    _combine[(batch * heads,)](part_out, top, total, out, every, **meta, **options)
    return out


def _group(part: list[Tensor]) -> int:
    """Keys that share a scale."""
    return part[0].shape[2] // max(part[1].shape[2], 1)


def _block(most: int, group: int) -> int:
    """The largest power of two up to `most` that divides `group`."""
    return min(most, group & -group)


def _most_rows(config: Config, width: int) -> int:
    return config.rows if width <= 128 else config.rows // 2


def _pieces(config: Config, n: int, rows: int) -> tuple[int, int]:
    """Into how many pieces of how many entries n of them are cut, for `rows` samples and KV heads."""
    wanted = max(1, config.programs // rows)
    chunk = max(2 * config.block, triton.cdiv(triton.cdiv(n, wanted), config.block) * config.block)
    return triton.cdiv(n, chunk), chunk


def _bias_strides(bias: Tensor | None, kv_heads: int, heads: int) -> tuple[tuple[int, int, int], int]:
    """Strides of samples, KV heads and query heads of one KV head; and the kind of bias that `_with_bias` knows."""
    if bias is None:
        return (0, 0, 0), 0
    if bias.shape[1] == 1:
        return (bias.stride(0), 0, 0), 1
    if bias.shape[1] == kv_heads:
        return (bias.stride(0), bias.stride(1), 0), 1
    return (bias.stride(0), bias.stride(1) * (heads // kv_heads), bias.stride(1)), 2


def _packed_arguments(
    config: Config, dtype: torch.dtype, width: int, ratio: int, bits: int, group: int, shares: int, kind: int
) -> tuple[dict, dict]:
    """Constants and options of `_packed`."""
    # three terms or four parts at a time need registers
    rows = _most_rows(config, width) // (4 if dtype == torch.float32 or bits == 2 else 1)
    heads = max(1, min(ratio, rows // shares))
    block = config.block // (2 if dtype == torch.float32 else 1)
    meta = {"RATIO": ratio, "HEADS": heads, "WIDTH": width, "BITS": bits, "GROUP": group, "SHARES": shares}
    blocks = {
        "ROWS": max(16, triton.next_power_of_2(heads * shares)),
        "BLOCK": _block(block, group),
        "BLOCK_BYTES": max(16, triton.next_power_of_2(width * bits // 8)),
    }
    # more registers than two warps have, where bytes or terms are wide
    wide = dtype != torch.bfloat16 or (bits > 2 and heads > 1)
    warps = max(config.warps[0], 8 if dtype != torch.bfloat16 else 4) if wide else config.warps[0]
    options = {"num_warps": warps, "num_stages": config.num_stages}
    return {**meta, **blocks, "TERMS": TERMS[dtype], "BIAS": kind}, options


def _exact_arguments(
    config: Config, dtype: torch.dtype, width: int, ratio: int, key: tuple[int, ...], value: tuple[int, ...], kind: int
) -> tuple[tuple[int, ...], dict, dict]:
    """Strides, constants and options of `_exact`. key, value: strides of these."""
    outer = (*key[:2], *value[:2])
    wide = 2 if dtype == torch.float32 else 1
    unit = 8 if all(stride % 8 == 0 for stride in outer) else 1
    meta = {"RATIO": ratio, "WIDTH": width, "KEY_STEP": key[2], "VALUE_STEP": value[2], "UNIT": unit}
    blocks = {
        "ROWS": max(16, min(_most_rows(config, width), triton.next_power_of_2(ratio))),
        "BLOCK": config.block // wide,
        "BLOCK_WIDTH": max(16, triton.next_power_of_2(width)),
    }
    options = {"num_warps": config.warps[1] * wide, "num_stages": config.num_stages}
    steps = tuple(stride // unit for stride in outer)
    return steps, {**meta, **blocks, "BIAS": kind, "PRECISION": config.precision}, options


def _combine_arguments(width: int) -> tuple[dict, dict]:
    meta = {"WIDTH": width, "BLOCK": COMBINED, "BLOCK_WIDTH": triton.next_power_of_2(width)}
    return meta, {"num_warps": 4, "num_stages": 1}


def examples(target: str) -> list[Example]:
    """Decode steps at 32k entries of LLaVA-1.5 7B, Qwen2-VL 2B and 7B, and of head dimensions of 64 and 80."""
    config, found, n = CONFIGS[target], [], 32768
    outs = (torch.float32,) * 3
    for width, heads, kv_heads, dtype, kind, choice in (
        (128, 12, 2, torch.bfloat16, 2, (2, 4, 8)),
        (128, 28, 4, torch.float32, 1, (2, 4, 8)),
        (128, 32, 32, torch.float16, 0, (4,)),
        (64, 14, 2, torch.bfloat16, 1, (2,)),
        (80, 32, 32, torch.bfloat16, 0, (8,)),
    ):
        ratio = heads // kv_heads
        name = f"{heads}/{kv_heads} x {width} {str(dtype).removeprefix('torch.')}"
        count, chunk = _pieces(config, n, kv_heads)
        numbers = (0.1275, n, chunk, 0, count, kv_heads)
        bias, strides = (torch.float32 if kind else None), (heads * n, ratio * n, n if kind == 2 else 0)
        channels = max(i for i in range(1, 33) if width % i == 0)
        for bits in choice:
            meta, options = _packed_arguments(config, dtype, width, ratio, bits, 32, width // channels, kind)
            codes = (torch.uint8, torch.float16, torch.float16) * 2
            args = (dtype, *codes, bias, *outs, *numbers, *strides)
            threads = options["num_warps"] * (64 if target.startswith("gfx") else 32)
            wide = meta["BLOCK"] * width * bits // 8 >= 16 * threads  # else a thread has less than 128 bits of a block
            found.append(Example(f"{name} {bits} bits", _packed, args, meta, options, True, wide))
        layout = (kv_heads * n * width, n * width, width, 1)
        steps, meta, options = _exact_arguments(config, dtype, width, ratio, layout, layout, kind)
        args = (dtype, dtype, dtype, bias, *outs, *numbers, *steps, *strides)
        found.append(Example(f"{name} exact", _exact, args, meta, options, True))
    meta, options = _combine_arguments(128)
    return [*found, Example("combine", _combine, (*outs, dtype, count), meta, options, False)]
