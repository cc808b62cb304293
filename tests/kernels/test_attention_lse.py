"""Torch's attention with its log-sum-exp: the same attention, to the bit."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vlmaccel.kernels.attention_lse import attention_lse


def draw(heads=(4, 2), rows=40, keys=40, dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, rows, heads[0], dim, generator=generator).to(dtype).transpose(1, 2)
    key, value = (torch.randn(2, heads[1], keys, dim, generator=generator).to(dtype) for _ in range(2))
    return query, key, value


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_is_the_attention_to_the_bit_and_its_normaliser(dtype, heads, causal, rows):
    query, key, value = draw(heads, rows, rows, dtype=dtype)
    scale = 0.3 if causal else None
    options = {"is_causal": causal, "scale": scale, "enable_gqa": heads[0] > heads[1]}
    out, lse = attention_lse(query, key, value, **options)
    assert torch.equal(out, scaled_dot_product_attention(query, key, value, **options))
    logits = query.double() @ key.double().repeat_interleave(heads[0] // heads[1], 1).mT * (scale or 16**-0.5)
    if causal:
        logits = logits.masked_fill(torch.ones(rows, rows, dtype=torch.bool).triu(1), -torch.inf)
    assert lse is not None
    # of 16 bits, it is of the probabilities as they are rounded
    assert torch.allclose(lse.double(), logits.logsumexp(-1), atol=1e-5 if dtype.itemsize > 2 else 1e-3)


@pytest.mark.parametrize("why", ["mask", "gradient", "autocast", "dropout", "another kernel"])
def test_is_sdpa_where_flash_attention_would_not_be_taken_as_it_is(why):
    query, key, value = draw((2, 2))
    options = {"attn_mask": torch.ones(40, 40, dtype=torch.bool).tril()} if why == "mask" else {"is_causal": True}
    if why == "dropout":
        options["dropout_p"] = 0.5
    query.requires_grad_(why == "gradient")
    backends = SDPBackend.MATH if why == "another kernel" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with torch.autocast("cpu", enabled=why == "autocast"), sdpa_kernel(backends):
        torch.manual_seed(0)
        want = scaled_dot_product_attention(query, key, value, **options)
        torch.manual_seed(0)
        out, lse = attention_lse(query, key, value, **options)
    assert lse is None
    assert torch.equal(out, want) and out.requires_grad == want.requires_grad
