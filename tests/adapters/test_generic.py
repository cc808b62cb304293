"""Decoders that no test model names: the text adapter takes every one of the same shape."""

import pytest
import torch
import transformers as hf

import vlmaccel
from tests.support.drops import FixedDrop, decode, make_plan
from vlmaccel.methods import FastV

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OTHERS = {
    "Gemma": {"head_dim": 8},
    "Granite": {},
    "Cohere": {},
    "Starcoder2": {},
    "Mixtral": {},
    "Olmo": {},
    "SmolLM3": {"no_rope_layers": [1, 0, 1, 0]},
    "Glm": {"head_dim": 8},
}
families = pytest.mark.parametrize("family", OTHERS)


def build(family, attn="sdpa"):
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**SIZES, **OTHERS[family])
    model = getattr(hf, f"{family}ForCausalLM")(config).eval()
    for name, p in model.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.5 if "embed" in name else 1.5 * p.shape[1] ** -0.5)
    model.set_attn_implementation(attn)
    return model


def batch():
    ids = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@families
@torch.no_grad()
def test_keeping_everything_and_decoding_what_is_left(family):
    model, inputs = build(family), batch()
    later = torch.randint(3, 60, (2, 4), generator=torch.Generator().manual_seed(2))
    plain = model(**inputs).logits
    with vlmaccel.patched(model, "fastv", ratio=1.0):
        assert torch.equal(model(**inputs).logits, plain)
    plan = make_plan(inputs["attention_mask"], (1, 3))
    for positions in ("keep", "renumber"):
        with vlmaccel.patched(model, FixedDrop(plan, positions)):
            steps = decode(model, inputs, later)[1]
            whole = {
                "input_ids": torch.cat([inputs["input_ids"], later], 1),
                "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(later)], 1),
            }
            again = model(**whole, use_cache=False).logits[:, -4:]
        assert torch.allclose(steps, again, atol=5e-5)
        assert (steps[:, -1] - model(**whole).logits[:, -1]).abs().max() > 1e-3


@families
@torch.no_grad()
def test_scores_are_the_models_own_attention(family):
    model, inputs = build(family, "eager"), batch()
    rows = model(**inputs, output_attentions=True).attentions[1][:, :, -1].mean(1)
    with vlmaccel.patched(model, FastV(layer=2, ratio=0.5)):
        model(**inputs)
        stage = vlmaccel.stats(model).stages[0]
    for b, start in enumerate((0, 5)):
        count = round((16 - start - 2) * 0.5)
        best = rows[b, start + 1 : 15].argsort(descending=True)[:count] + start + 1
        want = sorted([start, *best.tolist(), 15])
        assert stage.keep[b][stage.size[b] > 0].tolist() == want


@pytest.mark.parametrize(("family", "matrices"), [("Starcoder2", 2), ("Gemma", 3)])
@torch.no_grad()
def test_flops_know_a_plain_mlp(family, matrices):
    with vlmaccel.patched(build(family), "random", ratio=1.0) as model:
        model(input_ids=torch.arange(3, 13)[None])
        stats = vlmaccel.stats(model)
    assert stats.flops_full == 4 * (4 * 10 * 32**2 + 2 * 10**2 * 32 + matrices * 10 * 32 * 32)
