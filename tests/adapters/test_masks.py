"""Masks of one layer over its own slots, each kind against the obvious loop; and flash attention's, in a whole model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

import vlmaccel
from tests.support.drops import FixedDrop, decode, make_plan, policy
from tests.support.models import build, inputs
from vlmaccel.adapters.masks import physical_mask
from vlmaccel.adapters.view import renumbered
from vlmaccel.cache import Slots
from vlmaccel.methods import AttentionSum, FastV, PyramidDrop
from vlmaccel.run import Run, TokenMap


@given(
    st.integers(1, 3), st.integers(2, 6), st.integers(0, 4), st.sampled_from(["bool", "float", "none"]), st.booleans()
)
def test_entries_are_those_of_the_whole_mask(batch, length, past, kind, ragged):
    generator = torch.Generator().manual_seed(length * 7 + past)
    n = max(1, length - 1)
    rows = torch.rand(batch, length, generator=generator).argsort(1)[:, :n].sort(1).values
    held = torch.arange(past).expand(batch, past)
    index = torch.cat([held, rows + past], 1)
    size = None
    if ragged:
        size = torch.ones_like(index)
        size[-1, -1] = 0
    causal = torch.arange(past + length)[None] <= torch.arange(length)[:, None] + past
    whole = (torch.rand(batch, 1, length, past + length, generator=generator) > 0.2) & causal
    if kind == "none":
        whole = causal.expand(batch, 1, -1, -1)
    given_mask = {"bool": whole, "float": torch.where(whole, 0.0, torch.finfo(torch.float32).min), "none": None}[kind]
    slots = Slots(index[:, None], None if size is None else size[:, None])
    got = physical_mask(given_mask, rows, slots, past, length, 4, None, torch.float32)
    if got is None:
        assert kind == "none"
        assert not ragged
        return
    for b in range(batch):
        for r, row in enumerate(rows[b].tolist()):
            for c, column in enumerate(index[b].tolist()):
                want = bool(whole[b, 0, row, column]) and (size is None or bool(size[b, c]))
                entry = got[b, 0, r, c]
                assert (bool(entry) if got.dtype == torch.bool else entry.item() == 0) == want


def test_sizes_weigh_as_so_many_copies():
    slots = Slots(torch.arange(3)[None, None], torch.tensor([[[1, 3, 0]]]), prop_attn=True)
    mask = physical_mask(None, torch.tensor([[2]]), slots, 0, 3, 2, None, torch.float32)
    weights = mask.flatten().softmax(0)
    assert torch.allclose(weights, torch.tensor([0.25, 0.75, 0.0]))


def test_a_window_is_in_logical_tokens():
    slots = Slots(torch.tensor([[[0, 4, 7, 8]]]))
    mask = physical_mask(None, torch.tensor([[0]]), slots, 8, 1, 2, 4, torch.float32)
    assert mask.flatten().tolist() == [False, False, True, True]
    assert physical_mask(None, torch.tensor([[0]]), slots, 8, 1, 2, 9, torch.float32) is None


def test_another_kind_of_mask_is_refused():
    slots = Slots(torch.arange(2)[None, None])
    with pytest.raises(NotImplementedError, match="cannot use the object mask.*sdpa"):
        physical_mask(object(), torch.tensor([[0, 1]]), slots, 0, 2, 2, None, torch.float32)


def test_positions_that_are_not_told_cannot_be_renumbered():
    with pytest.raises(NotImplementedError, match='use positions="keep"'):
        renumbered(Run(TokenMap.text(1, 4), 0), None, {}, None, torch.zeros(1, 4, 2))


def flash_like(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """What flash attention computes: causal from the last row backwards, padding from a (B, keys) mask, no other."""
    n, m = query.shape[2], key.shape[2]
    allowed = torch.arange(m)[None] <= torch.arange(n)[:, None] + m - n
    allowed = allowed.expand(query.shape[0], 1, n, m)
    if attention_mask is not None:
        assert attention_mask.shape == (query.shape[0], m)
        allowed = allowed & attention_mask.bool()[:, None, None]
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, allowed, scale=scaling)
    return out.nan_to_num(0).transpose(1, 2).contiguous(), None


@pytest.fixture
def flash():
    """An attention implementation with flash attention's masks, on any machine."""
    AttentionInterface.register("flash_like", flash_like)
    AttentionMaskInterface.register("flash_like", flash_attention_mask)
    yield "flash_like"
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("flash_like")


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", ["llama", "llava-clip-llama", pytest.param("qwen3-vl", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_model_with_flash_attentions_masks(flash, kind, ragged, pad):
    batch = inputs(kind, 3, pad=pad)
    later = torch.randint(2, 100, (3, 4), generator=torch.Generator().manual_seed(2))
    real = batch["attention_mask"].bool()
    methods = [FixedDrop(make_plan(batch["attention_mask"], (1, 3), ragged=ragged), policy(kind, "renumber"))]
    methods += [PyramidDrop(), FastV(layer=2, ratio=0.4), AttentionSum(layer=2, ratio=0.4)]
    for method in methods:
        with vlmaccel.patched(build(kind), method) as model:
            want = decode(model, batch, later)
        model = build(kind)
        model.config.get_text_config()._attn_implementation = flash  # set_attn_implementation wants the real kernels
        with vlmaccel.patched(model, method):
            got = decode(model, batch, later)
        assert torch.allclose(got[0][real], want[0][real], atol=2e-5)
        assert torch.allclose(got[1], want[1], atol=2e-5)
