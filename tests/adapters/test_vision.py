"""Merging inside a vision tower, against a tower computed by hand on merged tokens."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import layer_norm

import vlmaccel
from tests.support.models import build, inputs
from vlmaccel.hooks import Method
from vlmaccel.methods import PyramidDrop, ToMe
from vlmaccel.reduction import Reduction

KINDS = ("llava-clip-llama", "llava-siglip-llama", "llava-next", "llava-onevision")


@dataclass(frozen=True)
class Pairs(Method):
    """In the blocks named, merges each patch into the one before it, two by two."""

    name = "pairs"
    blocks: tuple[int, ...]
    prop_attn: bool = True

    def vision_blocks(self, tower):
        return self.blocks

    def vision_block(self, at):
        return Reduction.merge_into(pairs(at.hidden.shape[:2], at.tower.prefix))


def pairs(shape, prefix):
    index = torch.arange(shape[1])
    partner = torch.where(index < prefix, index, index - (index - prefix) % 2)
    return partner.expand(shape)


def by_hand(model, pixels, blocks, prop_attn):
    """Projected features (pictures, patches, D) float64: every block on what its merges left, patches put back at the end."""
    model = copy.deepcopy(model).double()
    tower, base = model.model.vision_tower, model.model
    hidden = tower.embeddings(pixels.double())
    hidden = tower.pre_layrnorm(hidden) if hasattr(tower, "pre_layrnorm") else hidden
    clip = hasattr(tower, "pre_layrnorm")
    prefix, depth = int(clip), len(tower.encoder.layers)
    used = base.config.vision_feature_layer
    members = [[[i] for i in range(hidden.shape[1])] for _ in range(len(hidden))]
    for i, layer in enumerate(tower.encoder.layers[: depth + used + 1 if used < 0 else used]):
        x = norm(layer.layer_norm1, hidden)
        attention = layer.self_attn
        query, key, value = (
            p(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        logits = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        if prop_attn:
            logits = logits + torch.tensor([[len(m) for m in row] for row in members]).double().log()[:, None, None]
        mixed = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
        hidden = hidden + attention.out_proj(mixed)
        if i in blocks:
            hidden, members = merge(hidden, members, prefix)
        hidden = hidden + layer.mlp(norm(layer.layer_norm2, hidden))
    count = sum(len(m) for m in members[0])
    patches = torch.zeros(len(hidden), count, hidden.shape[-1], dtype=torch.double)
    for b, row in enumerate(members):
        for slot, group in enumerate(row):
            patches[b, group] = hidden[b, slot]
    if base.config.vision_feature_select_strategy == "default":
        patches = patches[:, 1:]
    return base.multi_modal_projector(patches)


def norm(module, x):
    return layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)


def merge(hidden, members, prefix):
    """Merge two by two behind the prefix, each pair's mean weighted by how many patches are in it."""
    out, groups = [], []
    for x, row in zip(hidden, members, strict=True):
        kept, joined = list(x[:prefix]), row[:prefix]
        for j in range(prefix, len(row), 2):
            pair = row[j : j + 2]
            weight = torch.tensor([len(m) for m in pair]).double()
            kept.append((x[j : j + 2] * weight[:, None]).sum(0) / weight.sum())
            joined = [*joined, [i for group in pair for i in group]]
        out.append(torch.stack(kept))
        groups.append(joined)
    return torch.stack(out), groups


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_tower_where_nothing_merges_is_bit_identical(kind):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    before = model(**batch).logits
    for method in (Pairs(()), ToMe(r=0)):
        with vlmaccel.patched(model, method):
            assert torch.equal(model(**batch).logits, before)
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("blocks", [(0,), (0, 1), (1,)])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llava-clip-llama", "llava-siglip-llama"])
@torch.no_grad()
def test_merged_blocks_are_the_blocks_on_merged_tokens(kind, attn, blocks, prop_attn):
    model, batch = build(kind, attn), inputs(kind, 3, pad=True)
    plain = torch.stack(list(model.get_image_features(batch["pixel_values"]).pooler_output))
    want = by_hand(model, batch["pixel_values"], blocks, prop_attn)
    for _ in range(2):  # the second time transformers' own hooks are there already
        with vlmaccel.patched(model, Pairs(blocks, prop_attn)):
            got = torch.stack(list(model.get_image_features(batch["pixel_values"]).pooler_output))
            assert torch.allclose(got.double(), want, atol=1e-5)
            model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert (got - plain).abs().max() > 1e-2


@torch.no_grad()
def test_with_a_method_in_the_decoder():
    model, batch = build("llava-clip-llama"), inputs("llava-clip-llama", 3, pad=True)
    with vlmaccel.patched(model, Pairs((0,))):
        merged = model(**batch).logits
        with vlmaccel.patched(model, PyramidDrop()):
            assert len(vlmaccel.stats(copied(model, batch)).stages) == 3
        assert torch.equal(model(**batch).logits, merged)


def copied(model, batch):
    twin = copy.deepcopy(model)
    twin(**batch)
    return twin


def test_gradients_flow_through_the_merge():
    model, batch = build("llava-clip-llama"), inputs("llava-clip-llama", 3, pad=True)
    with vlmaccel.patched(model, Pairs((0, 1))):
        model(**batch).logits[:, -1].sum().backward()
    gradient = model.model.vision_tower.embeddings.patch_embedding.weight.grad
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
