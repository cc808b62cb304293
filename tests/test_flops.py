import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils import flop_counter
from transformers import LlamaConfig, LlamaForCausalLM

import vlmaccel
from tests.support.vits import DEPTH, outputs, pictures
from tests.support.vits import build as build_vit
from vlmaccel.adapters.base import find_adapter
from vlmaccel.flops import BlockCost, count_flops, decoder_flops, layer_flops
from vlmaccel.methods import ToMe

D, M, LAYERS = 4096, 11008, 32  # Vicuna-7B


def pyramid(n):
    return [n // 2 ** (layer // 8) for layer in range(LAYERS)]


def fastv(n):
    return [n if layer < 2 else n / 2 for layer in range(LAYERS)]


@pytest.mark.parametrize(
    ("tokens", "gated", "plain"),
    [
        ([576] * LAYERS, 3.817, 2.986),
        (pyramid(576), 1.777, 1.388),
        (fastv(576), 2.007, 1.566),
        ([2880] * LAYERS, 20.825, 16.670),
        (pyramid(2880), 9.465, 7.517),
    ],
)
def test_published_teraflops(tokens, gated, plain):
    assert round(decoder_flops(tokens, D, M) / 1e12, 3) == gated
    assert round(decoder_flops(tokens, D, M, gated=False) / 1e12, 3) == plain


@pytest.mark.parametrize(
    ("k", "kept", "text", "ratio"),
    [
        (2, 0.5, 0, 0.524),
        (2, 0.25, 0, 0.292),
        (2, 0.1, 0, 0.154),
        (3, 0.5, 0, 0.540),
        (2, 0.5, 64, 0.571),
        (2, 0.25, 64, 0.361),
        (2, 0.1, 64, 0.236),
        (3, 0.5, 64, 0.585),
    ],
)
def test_fastv_ratio(k, kept, text, ratio):
    n = 576 + text
    after = text + kept * 576
    part = decoder_flops([n] * k + [after] * (LAYERS - k), D, M, gated=False)
    assert part / decoder_flops([n] * LAYERS, D, M, gated=False) == pytest.approx(ratio, abs=6e-4)


def test_layer_is_the_sum_of_its_parts():
    assert layer_flops(3, 5, 7) == 4 * 3 * 25 + 2 * 9 * 5 + 3 * 3 * 5 * 7
    assert layer_flops(3, 5, 7, gated=False) == 4 * 3 * 25 + 2 * 9 * 5 + 2 * 3 * 5 * 7
    assert layer_flops(3, 5, 7, attended=0.25) == 4 * 3 * 25 + 2 * 9 * 5 / 4 + 3 * 3 * 5 * 7
    assert decoder_flops([3, 2], 5, 7, True, [0.5, 1]) == layer_flops(3, 5, 7, True, 0.5) + layer_flops(2, 5, 7)
    assert decoder_flops([], 5, 7) == 0


def llama(kv_heads=4, attention="sdpa"):
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_count_is_twice_the_closed_form_and_the_head(attention, grad):
    model, batch, n = llama(attention=attention), 2, 11
    ids = torch.randint(50, (batch, n))
    with grad():
        count = count_flops(lambda: model(ids, logits_to_keep=1))
    head = batch * 64 * 50
    assert count == 2 * (batch * decoder_flops([n] * 3, 64, 96) + head)


def test_count_with_grouped_keys():
    model, n = llama(kv_heads=2), 11
    ids = torch.randint(50, (1, n))
    with torch.no_grad():
        count = count_flops(lambda: model(ids, logits_to_keep=1))
    narrower = 3 * 2 * n * 64 * 32  # keys and values of half the width, three layers
    assert count == 2 * (decoder_flops([n] * 3, 64, 96) - narrower + 64 * 50)


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_cpu_attention_forward_and_backward(monkeypatch, kv_heads):
    # as in torch <= 2.14, which has no formula of its own for this kernel
    known = {k: v for k, v in flop_counter.flop_registry.items() if "flash_attention_for_cpu" not in str(k)}
    monkeypatch.setattr(flop_counter, "flop_registry", known)
    q = torch.randn(2, 4, 5, 8, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, 7, 8, requires_grad=True) for _ in range(2))
    out = []
    forward = count_flops(lambda: out.append(F.scaled_dot_product_attention(q, k, v, enable_gqa=kv_heads != 4)))
    assert forward == 2 * 2 * (2 * 4 * 5 * 7 * 8)
    assert count_flops(lambda: out[0].sum().backward()) == 5 * 2 * (2 * 4 * 5 * 7 * 8)


def test_causal_attention_counts_the_whole_square():
    q = torch.randn(1, 2, 6, 4)
    with torch.no_grad():
        counts = [
            count_flops(lambda c=causal: F.scaled_dot_product_attention(q, q, q, is_causal=c))
            for causal in (False, True)
        ]
    assert counts[0] == counts[1] == 2 * 2 * (2 * 6 * 6 * 4)


@pytest.mark.parametrize("kind", ["timm-class", "timm-eva02", "hf-clip", "open-clip-custom"])
@torch.no_grad()
def test_blocks_of_a_vision_transformer_are_counted_in_full(kind):
    """Attention on CPUs too, as it is and over merged tokens; what is left is the patch embedding and the head."""
    model, pixels = build_vit(kind), pictures(2)
    cost = BlockCost.of(*((b := find_adapter(model).vision(model).blocks[0]).attention, b.mlp))
    whole = count_flops(lambda: outputs(model, pixels))
    outside = whole - 2 * 2 * DEPTH * cost.flops(65, 65)
    assert 0 < outside < 0.1 * whole
    with vlmaccel.patched(model, ToMe(r=8, match="random")):
        merged = count_flops(lambda: outputs(model, pixels))
        stats = vlmaccel.stats(model)
    matching = 2 * 2 * sum((n - 1) // 2 * (n // 2) * 16 for n in stats.tokens[:-1])
    assert merged - matching == outside + 2 * stats.flops
    assert stats.flops == 2 * sum(cost.flops(a, b) for a, b in zip(stats.tokens, stats.tokens[1:], strict=False))


@torch.no_grad()
def test_vit_large_at_384_is_381_gflops():
    """Without a formula for the CPU's attention torch says 349."""
    model = timm.create_model("vit_large_patch16_384", depth=3).eval()
    three = count_flops(lambda: model(torch.randn(1, 3, 384, 384)))
    block = 2 * BlockCost(1024, 4 * 1024**2, 8 * 1024**2).flops(577, 577)
    outside = 2 * 576 * 768 * 1024 + 2 * 1024 * 1000
    assert three == 3 * block + outside
    attention = 24 * 2 * 2 * 577**2 * 1024
    assert round(24 * block / 1e9) == 381
    assert round((24 * block + outside - attention) / 1e9) == 349
