"""The Triton form of `token_prefill` against the formula."""

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from tests.kernels.test_token_prefill import DTYPES, SCALE, draw, golden
from tests.support.close import assert_close
from vlmaccel.kernels.gpu import token_prefill as module
from vlmaccel.kernels.gpu.token_prefill import fits, launch

ROWS, KEYS = module.CONFIGS["interpreter"][4, 128][:2]


def check(query, key, value, tokens, scale=SCALE):
    args = (query, key, value, tokens, scale)
    assert fits(*args)
    got = launch(*args)
    assert got.dtype == query.dtype and got.transpose(1, 2).is_contiguous()
    assert_close(got, golden(*args), steps=None if got.dtype == torch.float32 else 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("earlier", [0, 21])
def test_agrees_with_the_formula(dtype, earlier):
    check(*draw(rows=70, earlier=earlier, dtype=dtype))


@pytest.mark.parametrize("dim", [8, 64, 72, 80, 96, 128])
def test_widths_of_heads(dim):
    check(*draw((2, 1), 40, dim=dim, batch=1, dtype=torch.bfloat16), dim**-0.5)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 2), (6, 2), (5, 1)])
def test_shared_keys(heads):
    check(*draw(heads, 30, earlier=5, batch=1))


@pytest.mark.parametrize("count", [1, KEYS, KEYS + 1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 1])
@pytest.mark.parametrize("share", [0.3, 1])
def test_lengths(count, share):
    check(*draw((2, 2), count, earlier=count % 3, share=share, seed=3))


def test_batches_of_unlike_samples():
    query, key, value, _ = draw(rows=70, earlier=40, batch=4)
    every = torch.arange(110)
    lists = [every[::2], every[:40], every[45:46], every[:0]]  # some of all, earlier ones only, one, none
    check(query, key, value, torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=-1))


def test_layouts():
    case = draw(rows=40, dim=8)
    for change in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: pad(x, (1, 2))[..., 1:-2],
        lambda x: x.repeat(2, 1, 1, 1)[::2],
    ):
        check(*map(change, case[:3]), case[3])
        check(*case[:2], change(case[2]), case[3])  # unlike the keys
    check(*case[:3], case[3].repeat(1, 2)[:, : case[3].shape[1]])


def test_keys_far_apart():
    stride = 2**29 + 8  # elements between two keys, so that the fifth one is beyond what 32 bits count
    memory = torch.from_numpy(np.zeros(4 * stride + 8, dtype=np.float16))  # takes no room where nothing is written
    key = memory.as_strided((1, 1, 5, 8), (8, 8, stride, 1))
    key.copy_(torch.randn(1, 1, 5, 8))
    query, _, value, _ = draw((1, 1), 5, dim=8, batch=1, dtype=torch.float16)
    check(query, key, value, torch.tensor([[0, 2, 3, 4]]))
    check(key, query, key, torch.tensor([[0, 2, 3, 4]]))


def test_what_it_leaves_to_torch():
    query, key, value, tokens = draw()
    assert not fits(query.double(), key.double(), value.double(), tokens, SCALE)
    assert not fits(query.mT.contiguous().mT, key, value, tokens, SCALE)
    assert not fits(query, key, value, tokens[:, :0], SCALE)
    assert not fits(query[:0], key[:0], value[:0], tokens[:0], SCALE)
    wide = [pad(x, (0, 120)) for x in (query, key, value)]
    assert fits(*(x.half() for x in wide), tokens, SCALE)
    assert not fits(*wide, tokens, SCALE)
