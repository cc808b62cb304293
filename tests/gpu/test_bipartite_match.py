"""The matching on a GPU: indices where they are certain, cosines where roundings decide."""

from __future__ import annotations

import pytest
import torch

from tests.support.matching import assert_matches
from vlmaccel.kernels.bipartite_match import _torch_form, bipartite_match

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "n", "width", "r", "prefix"),
    [(4, 577, 64, 23, 1), (2, 729, 72, 300, 0), (1, 1024, 80, 512, 0), (1, 577, 1024, 288, 1), (1, 5001, 128, 1000, 7)],
)
def test_agrees_with_float64(batch, n, width, r, prefix, dtype):
    metric = randn(batch, n, width, dtype=dtype)
    assert_matches(metric, r, prefix, *bipartite_match(metric, r, prefix), near=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 64, 65])
def test_few_tokens(n, dtype):
    for width in (1, 33, 64):
        metric = randn(2, n, width, dtype=dtype)
        assert_matches(metric, n // 2, 0, *bipartite_match(metric, n // 2, 0), near=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_index(dtype):
    number = torch.randint(0, 40, (2, 900), generator=torch.Generator().manual_seed(0)).cuda()
    for metric in (torch.eye(64, device="cuda")[number], torch.ones(1, 900, 64, device="cuda")):
        for got, want in zip(bipartite_match(metric.to(dtype), 300, 1), _torch_form(metric, 300, 1), strict=True):
            assert torch.equal(got, want)
    # tokens that are equal to the bit: the partner is the first of them
    keep, group = bipartite_match(randn(40, 64, dtype=dtype)[number], 200, 1)
    stands = keep.gather(1, group)
    for tokens, stand in zip(number.tolist(), stands.tolist(), strict=True):
        first = {}
        for place in range(1, 900, 2):
            first.setdefault(tokens[place], place)
        joined = [i for i in range(2, 900, 2) if stand[i] != i]
        assert len(joined) == 200
        assert all(stand[i] == first[tokens[i]] for i in joined)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    x = randn(2, 4, 577, 96, dtype=dtype)
    for metric in (x[:, 1, :, :64], x[:, 2, :, 3:75], x.transpose(1, 2)[:, :, 1], x[:, 0].mT, x[0].transpose(0, 1)):
        assert_matches(metric, 20, 1, *bipartite_match(metric, 20, 1), near=2e-6)


def test_is_an_operator_and_always_the_same():
    metric = randn(2, 577, 64)
    torch.library.opcheck(bipartite_match, (metric, 16, 1))
    keep, group = bipartite_match(metric, 200, 1)
    for _ in range(5):
        again = bipartite_match(metric, 200, 1)
        assert torch.equal(again[0], keep) and torch.equal(again[1], group)
