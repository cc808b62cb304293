"""What keys get of the attention of some rows, against whole probabilities in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.close import assert_close
from vlmaccel.kernels import score_rows as module
from vlmaccel.kernels.attention_rows import attention_rows
from vlmaccel.kernels.score_rows import CHUNK, REDUCTIONS, ROWS, reference, score_rows

SCALE = 0.4
# largest error allowed, in units of the largest result; bfloat16 rounds the logits themselves
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-6, torch.float16: 3e-6, torch.bfloat16: 3e-2}


def draw(heads=(4, 2), rows=6, keys=9, dim=8, batch=2, groups=1, biased=True, dtype=torch.float32, seed=0, most=None):
    """Arguments up to the bias: rows and keys in any order, some rows that do not count, some hidden keys."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, rows, heads[0], dim, generator=generator).to(dtype).transpose(1, 2)
    key = torch.randn(batch, heads[1], keys, dim, generator=generator).to(dtype)
    most = keys + 2 if most is None else most
    row = torch.randint(-1, most, (batch, rows), generator=generator)
    index = torch.randint(0, most, (batch, groups, keys), generator=generator).int()
    bias = torch.randn(batch, groups, keys, generator=generator)
    return query, key, row, index, bias.masked_fill(bias < -1, -torch.inf) if biased else None


def whole(query, key, row, index, bias, scale, window):
    """(B, H, Q, K) probabilities by the operator for whole rows."""
    seen = index[:, :, None] <= row[:, None, :, None]
    if window > 0:
        seen = seen & (index[:, :, None] > row[:, None, :, None] - window)
    mask = seen.float().log() if bias is None else torch.where(seen, bias[:, :, None].float(), -torch.inf)
    heads = query.shape[1]
    mask = mask.repeat_interleave(heads // mask.shape[1], 1) if mask.shape[1] > 1 else mask
    return attention_rows(query, key, mask, scale)


@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (4, 2), (3, 1), (4, 4)]),
    st.integers(0, 12),
    st.integers(0, 14),
    st.sampled_from([4, 16]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 3]),
    st.sampled_from(list(TOLERANCE)),
    st.sampled_from(REDUCTIONS),
    st.integers(0, 999),
)
def test_agrees_with_the_formula(batch, heads, rows, keys, dim, each, biased, window, dtype, reduce, seed):
    args = draw(heads, rows, keys, dim, batch, heads[1] if each else 1, biased, dtype, seed)
    got, want = (f(*args, SCALE, window, reduce) for f in (score_rows, reference))
    assert got.dtype == torch.float32
    assert got.shape == want.shape == (batch, heads[0], keys)
    assert torch.isfinite(got).all()
    if got.numel():
        assert (got - want).abs().max() <= TOLERANCE[dtype] * max(1, want.abs().max())


def normaliser(query, key, row, index, bias, scale, window):
    """(B, H, Q) log-sum-exp of the logits that each row sees, in float64; -inf where it sees nothing."""
    kv_heads = key.shape[1]

    def each(x):
        return x.expand(-1, kv_heads, -1).repeat_interleave(query.shape[1] // kv_heads, 1)[:, :, None]

    place = row[:, None, :, None]
    seen = (each(index) <= place) & ((each(index) > place - window) | (window <= 0))
    logits = query.double() @ key.double().repeat_interleave(query.shape[1] // kv_heads, 1).mT * scale
    if bias is not None:
        seen, logits = seen & (each(bias) > -torch.inf), logits + each(bias).double()
    return logits.masked_fill(~seen, -torch.inf).logsumexp(-1)


@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    st.integers(0, 12),
    st.integers(1, 14),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 1, 3]),
    st.sampled_from(list(TOLERANCE)),
    st.sampled_from(REDUCTIONS),
    st.integers(0, 999),
)
def test_a_known_normaliser_changes_nothing(batch, heads, rows, keys, each, biased, window, dtype, reduce, seed):
    args = draw(heads, rows, keys, 16, batch, heads[1] if each else 1, biased, dtype, seed)
    lse = normaliser(*args, SCALE, window).float()
    got, want = score_rows(*args, SCALE, window, reduce, lse), reference(*args, SCALE, window, reduce)
    assert torch.isfinite(got).all()
    if got.numel():
        assert (got - want).abs().max() <= TOLERANCE[dtype] * max(1, want.abs().max())


def test_logits_in_bfloat16_are_rounded_less_when_the_normaliser_is_known():
    n = 400
    query, key, _, _, _ = draw((4, 4), rows=n, keys=n, dim=64, dtype=torch.bfloat16)
    place = torch.arange(n).expand(2, -1)
    args = (query * 4, key, place, place[:, None], None, 0.125, 0)
    want = reference(*args, "sum")
    error = [(score_rows(*args, "sum", lse) - want).abs().max() for lse in (None, normaliser(*args).float())]
    assert error[1] < 0.5 * error[0]


@pytest.mark.parametrize("tile", [1, 300, 5000, 2**19])
def test_tiles_of_rows_whose_normaliser_is_known(tile, monkeypatch):
    monkeypatch.setattr(module, "TILE", tile)
    monkeypatch.setattr(module, "ROWS", 7)
    args = (*draw((3, 3), 40, 60, batch=2, groups=3), SCALE, 9)
    for reduce in REDUCTIONS:
        got = score_rows(*args, reduce, normaliser(*args).float())
        assert torch.allclose(got.double(), reference(*args, reduce), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("window", [0, 50])
def test_many_rows_go_in_blocks(dtype, reduce, window):
    n = 2 * ROWS + 37
    query, key, _, _, bias = draw(rows=n, keys=n, dim=32, dtype=dtype)
    row, index = torch.arange(n).expand(2, -1), torch.arange(n).expand(2, 1, -1)
    args = (query, key, row, index, bias, 32**-0.5, window)
    if reduce == "max":
        path = whole(*args).amax(2)
    else:
        path = whole(*args).sum(2) / (module.seen_by(row, index, window).clamp(min=1) if reduce == "mean" else 1)
    got = score_rows(*args, reduce)
    # in bfloat16 the logits are rounded, so that is how near the result can be
    assert_close(got.to(dtype), reference(*args, reduce), path)


def test_samples_and_heads_go_in_parts(monkeypatch):
    args = draw((6, 3), 10, 40, batch=5, groups=3)
    want = score_rows(*args, SCALE, 7, "mean")
    for chunk in (1, 3 * 10 * 40, 10 * 10 * 40, 14 * 10 * 40):
        monkeypatch.setattr(module, "CHUNK", chunk)
        assert torch.allclose(score_rows(*args, SCALE, 7, "mean"), want, atol=1e-7)


@given(st.integers(0, 99), st.sampled_from([0, 4]))
def test_a_sum_is_the_number_of_rows_that_see_something(seed, window):
    query, key, row, index, bias = draw(rows=20, keys=30, seed=seed)
    total = score_rows(query, key, row, index, bias, SCALE, window, "sum").sum(2)
    seen = (index <= row[..., None]) & ((index > row[..., None] - window) | (window <= 0)) & (bias > -torch.inf)
    assert torch.allclose(total, seen.any(2).sum(1, keepdim=True).float().expand_as(total), atol=1e-4)


@given(st.integers(0, 99), st.sampled_from(REDUCTIONS))
def test_the_order_of_rows_and_of_keys_does_not_matter(seed, reduce):
    query, key, row, index, bias = draw(rows=20, keys=30, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rows, keys = (torch.randperm(n, generator=generator) for n in (20, 30))
    want = score_rows(query, key, row, index, bias, SCALE, 0, reduce)
    shuffled = query[:, :, rows], key[:, :, keys], row[:, rows], index[..., keys], bias[..., keys]
    assert torch.allclose(score_rows(*shuffled, SCALE, 0, reduce), want[..., keys], atol=1e-5)


def test_a_key_of_size_s_is_s_keys():
    query, key, row, index, _ = draw(rows=5, keys=6, seed=3)
    size = torch.tensor([1, 2, 4, 1, 1, 8])
    copies = torch.arange(6).repeat_interleave(size)
    bias = size.float().log().expand(2, 1, -1)
    got = score_rows(query, key, row, index, bias, SCALE, 0, "sum")
    each = score_rows(query, key[:, :, copies], row, index[..., copies], None, SCALE, 0, "sum")
    assert torch.allclose(got, torch.zeros_like(got).index_add(2, copies, each), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("heads", [(4, 2), (4, 4)])  # the CPU form uses a known normaliser where heads share no keys
def test_what_is_hidden_may_be_nan(dtype, reduce, heads):
    query, key, row, index, bias = draw(heads, rows=9, keys=12, dtype=dtype, seed=1)
    index[0, 0, 3] = 99  # after all rows
    row[1] = -1
    unseen = (bias[:, 0] == -torch.inf) | (index[:, 0] > row.amax(1, keepdim=True))
    want = score_rows(query, key, row, index, bias, SCALE, 0, reduce)
    key = torch.where(unseen[:, None, :, None], torch.nan, key)
    query = torch.where((row < 0)[:, None, :, None], torch.nan, query)
    got = score_rows(query, key, row, index, bias, SCALE, 0, reduce)
    assert torch.equal(got, want)
    assert got[0].any() and not got[1].any()
    lse = normaliser(query.nan_to_num(), key.nan_to_num(), row, index, bias, SCALE, 0).float()
    got = score_rows(query, key, row, index, bias, SCALE, 0, reduce, lse.masked_fill(row[:, None] < 0, torch.nan))
    assert (got - want).abs().max() <= TOLERANCE[dtype] * max(1, want.abs().max())


class Largest(TorchDispatchMode):
    """The largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_rows_are_never_held_whole():
    n = 8192
    query = key = torch.randn(1, 2, n, 4)
    place = torch.arange(n)[None]
    with Largest() as largest:
        module._torch_form(query, key, place, place[None], None, SCALE, 0, "sum")
    assert largest.numel <= max(CHUNK, ROWS * n) < n * n / 32


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("biased", [True, False])
def test_is_an_operator(reduce, biased):
    args = (*draw(biased=biased), SCALE, 3, reduce)
    torch.library.opcheck(score_rows, args)
    torch.library.opcheck(score_rows, (*args, normaliser(*args[:-1]).float()))
    compiled = torch.compile(lambda *args: score_rows(*args, SCALE, 3, reduce), fullgraph=True, backend="eager")
    assert torch.equal(compiled(*args[:5]), score_rows(*args))


def test_there_are_three_reductions():
    with pytest.raises(ValueError, match="reduce is one of sum, mean, max, not 'median'"):
        score_rows(*draw(), SCALE, 0, "median")
