"""Attention of one new token over entries part in few bits: the formula, biases, hidden entries, what is made on the way."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.close import assert_close
from tests.support.memory import Largest
from vlmaccel.kernels import mixed_decode as module
from vlmaccel.kernels.decode_attention import decode_attention
from vlmaccel.kernels.mixed_decode import CHUNK, mixed_decode, reference
from vlmaccel.kernels.quantize_pack import dequantize, quantize_pack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cache(
    batch=1,
    heads=4,
    kv_heads=2,
    width=64,
    *,
    bits=(2, 4),
    lengths=(32, 16),
    group=16,
    channels=None,
    exact=7,
    bias="none",
    dtype=torch.float32,
    scales=torch.float16,
    device="cpu",
):
    """Arguments of `mixed_decode`; biases are logs of sizes, some entries hidden, the last one never."""
    generator = torch.Generator(device).manual_seed(heads + width + sum(lengths) + exact)
    channels = channels or max(i for i in range(1, min(width, group) + 1) if width % i == 0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    packed = []
    for b, n in zip(bits, lengths, strict=True):
        key, value = draw(2, batch, kv_heads, n, width) + draw(width) * 2
        packed += [*quantize_pack(key, b, group, -2, scales), *quantize_pack(value, b, channels, -1, scales)]
    query, key, value = (
        draw(batch, h, n, width).to(dtype) for h, n in ((heads, 1), (kv_heads, exact), (kv_heads, exact))
    )
    groups = {"none": 0, "shared": 1, "kv heads": kv_heads, "heads": heads}[bias]
    known = None
    if groups:
        size = torch.randint(1, 9, (batch, groups, sum(lengths) + exact), generator=generator, device=device)
        hidden = torch.rand(size.shape, generator=generator, device=device) < 0.2
        hidden[..., -1] = False
        known = size.float().log().masked_fill(hidden, -math.inf)
    return query, key, value, packed, list(bits), known, width**-0.5


def golden(query, key, value, packed, bits, bias, scale):
    return reference(query.double(), key.double(), value.double(), packed, bits, bias, scale)


def by_copies(query, key, value, packed, bits, bias, scale):
    """All entries made into the dtype of the query first."""
    keys, values = [], []
    for i, b in enumerate(bits):
        keys.append(dequantize(*packed[6 * i : 6 * i + 3], b, -2, query.dtype))
        values.append(dequantize(*packed[6 * i + 3 : 6 * i + 6], b, -1, query.dtype))
    key, value = torch.cat([*keys, key], 2), torch.cat([*values, value], 2)
    if bias is not None and bias.shape[1] == query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return decode_attention(query, key, value, bias, scale)


@given(
    st.integers(1, 3),
    st.sampled_from([(4, 4), (4, 2), (6, 1), (3, 3)]),
    st.sampled_from([8, 16, 72]),
    st.lists(st.sampled_from([2, 4, 8]), max_size=3, unique=True),
    st.sampled_from([1, 4, 12]),
    st.integers(1, 5),
    st.integers(0, 9),
    st.sampled_from(DTYPES),
    st.sampled_from(["none", "shared", "kv heads", "heads"]),
    st.sampled_from([64, 1000, CHUNK]),
)
def test_agrees_with_the_formula(batch, heads, width, bits, group, groups, exact, dtype, bias, chunk):
    if not bits and not exact:
        return
    lengths = [group * (groups + i) for i in range(len(bits))]
    args = cache(batch, *heads, width, bits=bits, lengths=lengths, group=group, exact=exact, bias=bias, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        got = mixed_decode(*args)
    assert got.dtype == dtype
    assert_close(got, golden(*args), by_copies(*args))


def test_the_formula_by_hand():
    """Codes 0 and 3, scale 1 and 2: keys 0 and 3 with a zero of 0, values 1 and 7 with zeros of 1."""
    one, none = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)
    codes = torch.tensor([0b00000000, 0b11111111], dtype=torch.uint8).view(1, 1, 2, 1)
    step, zero = torch.tensor([2.0, 2.0]).view(1, 1, 2, 1), torch.tensor([1.0, 1.0]).view(1, 1, 2, 1)
    query = torch.tensor([math.log(2) / 3, 0, 0, 0]).view(1, 1, 1, 4)
    empty = torch.empty(1, 1, 0, 4)
    out = mixed_decode(query, empty, empty, [codes, one, none, codes, step, zero], [2], None, 1.0)
    # logits 0 and log 2: weights 1 / 3 and 2 / 3
    assert out.flatten().tolist() == pytest.approx([5.0] * 4)


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_scales(scales):
    args = cache(scales=scales)
    assert_close(mixed_decode(*args), golden(*args))


def test_float64_stays_float64():
    args = cache(dtype=torch.float64)
    assert torch.allclose(mixed_decode(*args), golden(*args), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_may_see_nothing_gives_0(dtype):
    args = list(cache(2, bias="heads", dtype=dtype))
    args[5][1, 2] = -math.inf
    got = mixed_decode(*args)
    assert (got[1, 2] == 0).all() and (golden(*args)[1, 2] == 0).all()
    assert got.isfinite().all() and (got[1, 1] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_entries_have_no_influence(dtype):
    query, key, value, packed, bits, bias, scale = cache(bias="kv heads", dtype=dtype)
    before = mixed_decode(query, key, value, packed, bits, bias, scale)
    hidden = bias == -math.inf
    assert hidden[:, :, :32].any() and hidden[:, :, 32:48].any() and hidden[:, :, 48:].any()
    packed = [x.clone() for x in packed]
    packed[0][hidden[..., :32]] ^= 0xFF
    packed[6][hidden[..., 32:48]] ^= 0xFF
    packed[9][hidden[..., 32:48]] ^= 0xFF
    packed[10][hidden[..., 32:48]] *= 100
    key, value = (x.masked_fill(hidden[..., 48:, None], 77.0) for x in (key, value))
    assert torch.equal(mixed_decode(query, key, value, packed, bits, bias, scale), before)
    assert not torch.equal(mixed_decode(query, key, value, packed, bits, None, scale), before)


def test_layout_in_memory_does_not_matter():
    query, key, value, packed, bits, bias, scale = cache(2, bias="heads")
    want = mixed_decode(query, key, value, packed, bits, bias, scale)
    turn = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value, *packed)]
    assert torch.allclose(mixed_decode(query, *turn[:2], turn[2:], bits, bias, scale), want, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 8])
def test_no_copy_of_the_cache_is_made(bits, dtype):
    args = cache(1, 12, 2, 128, bits=[bits], lengths=[16384], group=32, exact=40, bias="kv heads", dtype=dtype)
    with Largest() as largest:
        module._torch_form(*args)
    assert largest.bytes <= 4 * CHUNK
    with Largest() as copied:
        by_copies(*args)
    assert copied.bytes > 8 * 2**20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", ["none", "kv heads", "heads"])
def test_is_an_operator(dtype, bias):
    torch.library.opcheck(mixed_decode, cache(2, bias=bias, dtype=dtype))


def test_compiles_without_a_break():
    args = cache(bias="heads")
    torch._dynamo.reset()
    compiled = torch.compile(mixed_decode, fullgraph=True)
    assert torch.allclose(compiled(*args), mixed_decode(*args), atol=1e-6)
