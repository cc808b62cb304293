"""The Triton form of `block_prefill` against the formula."""

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from tests.kernels.test_block_prefill import DTYPES, SCALE, all_blocks, draw, golden
from tests.support.close import assert_close
from vlmaccel.kernels.gpu import block_prefill as module
from vlmaccel.kernels.gpu.block_prefill import fits, launch


def check(*args, scale=SCALE):
    args = (*args, scale)
    assert fits(*args)
    got = launch(*args)
    assert got.dtype == args[0].dtype and got.transpose(1, 2).is_contiguous()
    assert_close(got, golden(*args), steps=None if got.dtype == torch.float32 else 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("earlier", [0, 16, 21])
def test_agrees_with_the_formula(dtype, earlier):
    check(*draw(rows=60, earlier=earlier, dtype=dtype, padded=earlier > 0))


@pytest.mark.parametrize("dim", [8, 64, 72, 80, 96, 128])
def test_widths_of_heads(dim):
    check(*draw((2, 1), 40, dim=dim, batch=1, dtype=torch.bfloat16), scale=dim**-0.5)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 2), (6, 2), (5, 1)])
def test_shared_keys(heads):
    check(*draw(heads, 40, earlier=5, batch=1))


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_lengths(rows, block):
    check(*draw((2, 2), rows, earlier=rows % 4, block=block, seed=rows))


@pytest.mark.parametrize("lines", [(0, 0), (40, 0), (0, 9), (40, 3), (1, 1)])
@pytest.mark.parametrize("holes", [False, True])
def test_kinds_of_lists(lines, holes):
    check(*draw((2, 1), 50, lines=lines, holes=holes))


@pytest.mark.parametrize("start", [(0, 0), (1, 40), (16, 17), (69, 5)])
def test_padding(start):
    *case, _, block = draw((2, 1), 60, earlier=10, lines=(9, 1))
    check(*case, torch.tensor(start), block)


def test_everything_and_nothing():
    query, key, value, blocks, columns, start, block = draw(rows=40, earlier=7)
    lists = all_blocks(query, key, block)
    check(query, key, value, *lists, start, block)
    check(query, key, value, lists[1], torch.arange(47).int().expand(*lists[0].shape[:3], -1), start, block)
    check(query, key, value, blocks[..., :0], columns[..., :0], start, block)
    check(query, key, value, torch.full_like(blocks, -1), torch.full_like(columns, -1), start, block)
    longer = (pad(blocks, (0, 140), value=-1), pad(columns, (0, 140), value=-1))
    check(query, key, value, *longer, start, block)


def test_layouts():
    *case, start, block = draw(rows=40, dim=8)
    for change in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: pad(x, (1, 2))[..., 1:-2],
        lambda x: x.repeat(2, 1, 1, 1)[::2],
    ):
        check(*map(change, case), start, block)
        check(*case[:2], change(case[2]), *case[3:], start, block)  # unlike the keys
    check(*case[:3], *(x.long() for x in case[3:]), start, block)


def test_keys_far_apart():
    stride = 2**27 + 8  # elements between two keys, so that the last ones are beyond what 32 bits count
    memory = torch.from_numpy(np.zeros(17 * stride, dtype=np.float16))  # takes no room where nothing is written
    key = memory.as_strided((1, 1, 17, 8), (8, 8, stride, 1))
    key.copy_(torch.randn(1, 1, 17, 8))
    query, _, value, *rest = draw((1, 1), 17, dim=8, batch=1, dtype=torch.float16)
    check(query, key, value, *rest)
    check(key, query, key, *rest)


def test_what_it_leaves_to_torch():
    query, key, value, *rest = draw()
    assert not fits(query.double(), key.double(), value.double(), *rest, SCALE)
    assert not fits(query.mT.contiguous().mT, key, value, *rest, SCALE)
    assert not fits(query[:0], key[:0], value[:0], *rest, SCALE)
    assert not fits(query, key, value, *rest[:-1], 48, SCALE)
    assert module.BLOCKS == (16, 32, 64, 128)
