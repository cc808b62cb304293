"""The Triton form of `score_rows` against whole probabilities in float64."""

import numpy as np
import pytest
import torch

from tests.kernels.test_score_rows import SCALE, draw, normaliser
from tests.support.close import assert_close
from vlmaccel.kernels.gpu import score_rows as module
from vlmaccel.kernels.gpu.score_rows import fits, launch
from vlmaccel.kernels.score_rows import REDUCTIONS, reference

ROWS, KEYS = module.CONFIGS["interpreter"][4, 128][:2]


def check(*args):
    assert fits(*args)
    got, want = launch(*args), reference(*args)
    assert got.dtype == torch.float32
    assert_close(got, want)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_agrees_with_the_formula(dtype, window, reduce):
    check(*draw((4, 2), 37, 70, 24, batch=1, groups=2, dtype=dtype), SCALE, window, reduce)


@pytest.mark.parametrize("rows", [5, 2 * ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_known_normaliser_changes_nothing(dtype, reduce, rows):
    args = (*draw((4, 2), rows, 70, 24, groups=2, dtype=dtype), SCALE, 20, reduce)
    lse = normaliser(*args[:-1]).float().mT.contiguous().mT  # in another layout, as torch's
    lse = lse.masked_fill(args[2][:, None] < 0, torch.nan)
    assert_close(launch(*args, lse), reference(*args))


@pytest.mark.parametrize("dim", [16, 64, 72, 80, 96, 128])
def test_widths_of_heads(dim):
    check(*draw((2, 1), 17, 33, dim, batch=1, dtype=torch.bfloat16), dim**-0.5, 0, "sum")


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 2), (6, 2), (5, 1)])
@pytest.mark.parametrize("each", [True, False])
def test_shared_keys(heads, each):
    check(*draw(heads, 18, 40, 16, batch=1, groups=heads[1] if each else 1), SCALE, 9, "mean")


@pytest.mark.parametrize(
    ("rows", "keys"),
    [
        (1, 1),
        (1, 4 * KEYS + 1),
        (ROWS - 1, KEYS - 1),
        (ROWS, KEYS),
        (ROWS, KEYS + 1),
        (ROWS + 1, KEYS - 1),
        (ROWS + 1, KEYS + 1),
        (2 * ROWS, 1),
        (2 * ROWS, 4 * KEYS + 1),
    ],
)
def test_lengths(rows, keys):
    check(*draw((2, 2), rows, keys, 16, batch=1, biased=rows % 2 == 0), SCALE, 0, "sum")


@pytest.mark.parametrize("groups", [(1, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("rows", [9, 40])
def test_index_and_bias_of_all_heads_or_of_each(groups, rows):
    query, key, row, index, _ = draw((2, 2), rows, 40, 16, groups=groups[0])
    bias = draw((2, 2), rows, 40, groups=groups[1], seed=5)[4]
    check(query, key, row, index.long(), bias, SCALE, 12, "max")


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_all_rows_of_a_sequence(window, reduce):
    n = 4 * KEYS + 2
    query, key, _, _, bias = draw((1, 1), n, n, 16)
    place = torch.arange(n).expand(2, -1)
    check(query, key, place, place[:, None], bias, SCALE, window, reduce)


@pytest.mark.parametrize("window", [0, 25])
def test_blocks_that_do_not_matter_are_not_read(window):
    """Keys after the last row of a block, before its window, or hidden: they may even be behind the end of memory."""
    n = 4 * KEYS
    plan = module.Plan(
        "interpreter", torch.float32, (1, 1, n, 16), (1, 1, n, 16), (0,) * 3, (0,) * 3, (0, 0), (0, 0), 0
    )
    assert plan.skips
    place = torch.arange(n)[None]
    first, last = (torch.empty(1, 1, plan.key_blocks, dtype=torch.int32) for _ in range(2))
    bias = torch.zeros(1, 1, n)
    bias[..., :KEYS] = bias[..., 2 * KEYS + 3] = -torch.inf
    rest = (n, 0, n, 0, n, 1, plan.key_blocks)
    module._start(
        module._extents, (plan.key_blocks, 1), (place[None], bias, first, last), (rest, *plan.key_extents()[1:])
    )
    assert first.flatten().tolist() == [2**31 - 1, KEYS, 2 * KEYS, 3 * KEYS]
    assert last.flatten().tolist() == [-1, 2 * KEYS - 1, 3 * KEYS - 1, n - 1]
    query, key, *_ = draw((1, 1), n, n, 16, batch=1)
    # NaN in a block that is not read by a row, and would be the row's if it were added in any way
    key[:, :, :KEYS] = torch.nan
    args = (query, key, place, place[None], bias, SCALE, window, "sum")
    assert torch.isfinite(launch(*args)).all()
    check(*args)


def test_several_programs_share_the_keys_of_few_rows():
    query, key, row, index, bias = draw((2, 1), 5, 9 * KEYS, 16, batch=1)
    plan = module.Plan("interpreter", query.dtype, query.shape, key.shape, (0,) * 3, (0,) * 3, (0, 0), (0, 0), 0)
    assert plan.splits == 4
    for reduce in REDUCTIONS:
        check(query, key, row, index, bias, SCALE, 0, reduce)
    check(query, key, row.clamp(max=KEYS), index, bias, SCALE, 30, "sum")  # some programs see nothing


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("rows", [9, 40])
def test_what_is_hidden_may_be_nan(reduce, rows):
    query, key, row, index, bias = draw((2, 1), rows, 40, 16)
    row[1], index[0, 0, 3] = -1, 999
    unseen = (bias[:, 0] == -torch.inf) | (index[:, 0] > row.amax(1, keepdim=True))
    key = torch.where(unseen[:, None, :, None], torch.nan, key)
    query = torch.where((row < 0)[:, None, :, None], torch.nan, query)
    got = launch(query, key, row, index, bias, SCALE, 0, reduce)
    want = launch(query.nan_to_num(), key.nan_to_num(), row, index, bias, SCALE, 0, reduce)
    assert torch.equal(got, want)
    assert got[0].any() and not got[1].any()


def test_layouts():
    query, key, row, index, bias = draw(rows=20, keys=40, dim=16)
    want = launch(query, key, row, index, bias, SCALE, 0, "sum")
    wide = torch.empty(2, 2, 50, 17)[:, :, 3:43, :16]  # rows of odd length, as of a cache with room
    apart = torch.empty(2, 40, 16, 2).permute(0, 3, 1, 2)  # channels far apart
    for other in (wide.copy_(key), apart.copy_(key), key.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(launch(query, other, row, index, bias, SCALE, 0, "sum"), want)
    for x in (row.int(), row.expand(3, -1, -1).transpose(0, 2).contiguous().transpose(0, 2)[0]):
        assert torch.equal(launch(query, key, x, index.long(), bias.double(), SCALE, 0, "sum"), want)


def test_offsets_beyond_32_bits():
    stride = 2**31 // 3 + 8
    query, key, row, index, _ = draw((1, 1), 4, 4, 16, batch=1, biased=False, dtype=torch.bfloat16)
    want = launch(query, key, row, index, None, SCALE, 0, "sum")
    # takes room only where it is written to
    memory = torch.from_numpy(np.empty(3 * stride + 16, np.int16)).view(torch.bfloat16)
    far = memory.as_strided((1, 1, 4, 16), (0, 0, stride, 1))
    assert torch.equal(launch(far.copy_(query), key, row, index, None, SCALE, 0, "sum"), want)
    assert torch.equal(launch(query, far.copy_(key), row, index, None, SCALE, 0, "sum"), want)


def test_what_it_does_not_take():
    args = (*draw(dim=8), SCALE, 0, "sum")
    assert fits(*args)
    assert not fits(*(x.double() if x.dtype == torch.float else x for x in args[:4]), *args[4:])
    assert not fits(*draw(rows=0), SCALE, 0, "sum")
    assert not fits(*draw(keys=0), SCALE, 0, "sum")
    assert not fits(*draw(dim=129), SCALE, 0, "sum")
    with pytest.raises(ValueError, match="reduce is one of"):
        launch(*args[:-1], "median")
