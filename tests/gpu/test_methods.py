"""Every method on a GPU does what it does on a CPU."""

import pytest
import torch

import vlmaccel
from tests.support import models
from vlmaccel.methods import registry

DEVICE = "cuda"
SMALL = {
    "tome": {"r": 1},
    "tome-decoder": {"ratio": 0.5},
    "zipvl": {"recent": 4, "random": 4, "tau": 0.9},
    "vertical-slash": {"vertical": 4, "slash": 2},
    "block-sparse": {"blocks": 1},
    "mixed-precision-kv": {"group": 4, "residual": 4},
    "quest": {"page": 4},
    "snapkv": {"window": 4},
    "visionzip": {"ratio": 0.6, "contextual": 0.4},
    "vispruner": {"ratio": 0.6},
    "sparsevlm": {"ratios": (0.6, 0.4, 0.2)},
    "registers": {"registers": 2},
    "victor": {"registers": torch.randn(2, 32, generator=torch.Generator().manual_seed(0))},
}
KINDS = ("llava-clip-llama", "llava-siglip-qwen2", "qwen3", "mistral-sliding")


def steps(model, inputs, count=4):
    """(B, count, vocab) logits of greedy decoding, the tokens fed by hand."""
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    mask, all_logits = inputs["attention_mask"], [out.logits]
    for _ in range(count - 1):
        token = all_logits[-1].argmax(-1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out = model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
        all_logits.append(out.logits)
    return torch.cat(all_logits, 1)


@pytest.mark.parametrize("name", sorted(registry()))
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_gpu_gives_what_a_cpu_gives(kind, name):
    if name in ("tome", "visionzip", "vispruner") and not kind.startswith("llava"):
        pytest.skip("a text model has no vision tower")
    inputs = models.inputs(kind, 3, pad=True)
    model = models.build(kind)
    with vlmaccel.patched(model, name, **SMALL.get(name, {})):
        expected, stats = steps(model, inputs), vlmaccel.stats(model)
    model = models.build(kind).to(DEVICE)
    with vlmaccel.patched(model, name, **SMALL.get(name, {})):
        found = steps(model, {k: v.to(DEVICE) for k, v in inputs.items()})
        assert vlmaccel.stats(model).kv_bytes == stats.kv_bytes
        assert vlmaccel.stats(model).attended == pytest.approx(stats.attended)
    torch.testing.assert_close(found.cpu(), expected, atol=2e-3, rtol=2e-3)
