"""Every hook point does what it says, with methods that only the tests have."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch

import vlmaccel
from tests.support.models import DEPTH, build, inputs
from tests.support.reference import Reference
from vlmaccel.hooks import HOOK_POINTS, Method
from vlmaccel.methods import BlockSparse, PyramidDrop, Uniform, ZipVL
from vlmaccel.reduction import Reduction
from vlmaccel.run import Modality

VLM = "llava-clip-llama"


@dataclass(frozen=True)
class EveryOther(Method):
    """Drops every other visual token where it is told to."""

    name = "every-other"
    where: str = "visual_tokens"

    def _reduce(self, at):
        visual = at.tokens.modality == Modality.IMAGE
        return Reduction.select(~(visual & (visual.cumsum(1) % 2 == 0)))


class BeforeDecoder(EveryOther):
    def visual_tokens(self, at):
        return self._reduce(at)


class BeforeLayerZero(EveryOther):
    def decoder_layers(self, depth):
        return (0,)

    def decoder_layer(self, at):
        return self._reduce(at)


@torch.no_grad()
def test_visual_tokens_is_the_input_of_layer_zero():
    model, batch = build(VLM), inputs(VLM, 3, pad=True)
    with vlmaccel.patched(model, BeforeDecoder()):
        first = model(**batch).logits
    with vlmaccel.patched(model, BeforeLayerZero()):
        assert torch.equal(model(**batch).logits, first)
    assert not torch.equal(model(**batch).logits, first)


@dataclass(frozen=True)
class Watch(Method):
    """Keeps the attention rows of one layer, before or after it."""

    layer: int
    rows: tuple[int, ...]
    before: bool

    def decoder_layers(self, depth):
        return (self.layer,) if self.before else ()

    def attention_layers(self, depth):
        return () if self.before else (self.layer,)

    def _look(self, at):
        seen.append(at.scores.rows(torch.tensor([self.rows] * at.hidden.shape[0])).mean(1))

    def decoder_layer(self, at):
        self._look(at)

    def attention(self, at):
        self._look(at)


seen: list[torch.Tensor] = []


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen2-hybrid", "mistral-sliding", VLM])
@torch.no_grad()
def test_score_rows_are_the_models_attention(kind, attn, before, use_cache):
    model, batch = build(kind, attn), inputs(kind, 1)
    n = batch["input_ids"].shape[1]
    reference = Reference(model)
    embeds = reference.embed(batch)[0]
    methods = [Uniform(layer=1, ratio=0.5), Watch(3, (0, 5, 8), before)]  # rows of what is left
    seen.clear()
    with vlmaccel.patched(model, methods):
        model(**batch, use_cache=use_cache)
        kept = vlmaccel.stats(model).stages[0].keep[0]
    trace = reference.run(embeds, {1: kept.tolist()})
    want = reference.attention(trace, 3)[[0, 5, 8]]
    assert torch.allclose(seen[0][0].double(), want, atol=1e-5)
    assert len(kept) < n


@torch.no_grad()
def test_score_rows_over_a_cache_see_the_earlier_turn():
    """In a second turn the rows are normalised over everything, and given for the new tokens."""
    model = build("qwen3")
    ids = torch.randint(2, 100, (1, 20), generator=torch.Generator().manual_seed(1))
    reference = Reference(model)
    want = reference.attention(reference.run(reference.words(ids[0])), 3)[19, 12:]
    for before in (True, False):
        seen.clear()
        with vlmaccel.patched(model, Watch(3, (7,), before)):
            cache = model(input_ids=ids[:, :12], use_cache=True).past_key_values
            seen.clear()
            model(input_ids=ids[:, 12:], past_key_values=cache)
        assert torch.allclose(seen[0][0, 0].double(), want, atol=1e-5)


@dataclass(frozen=True)
class Evict(Method):
    """After the prefill, every layer forgets some entries: the same for all heads, or others for each KV head."""

    per_head: bool

    def cache_layers(self, depth):
        return range(depth)

    def cache(self, at):
        if at.decoding:
            return None
        batch, heads, m, _ = at.entries.keys.shape
        return Reduction.select(gone(at.layer, batch, heads if self.per_head else 1, m).logical_not().flatten(0, 1))


def gone(layer, batch, heads, m):
    """(batch, heads, m) entries that `Evict` forgets; as many for each head, other ones for each."""
    generator = torch.Generator().manual_seed(layer)
    return torch.rand(batch, heads, m, generator=generator).argsort(-1).argsort(-1) < m // 2


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("pad", [False, True])
@torch.no_grad()
def test_evicted_entries_are_as_masked(per_head, attn, pad):
    """Decoding over an evicted cache is decoding over the whole one with these keys masked, layer by layer and head by
    head, which unpatched attention modules are told here through their masks."""
    model, batch = build("llama", attn), inputs("llama", 2, pad=pad)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    n = ids.shape[1]
    token = torch.tensor([[5], [9]])
    later = torch.cat([mask, mask.new_ones(2, 1)], 1)
    with vlmaccel.patched(model, Evict(per_head)):
        cache = model(**batch, use_cache=True).past_key_values
        held = [layer.keys.shape[2] for layer in cache.layers]
        assert cache.get_seq_length() == n
        got = model(token, attention_mask=later, past_key_values=cache).logits
    assert held == [n - n // 2] * DEPTH
    cache = model(**batch, use_cache=True).past_key_values

    def hide(i, module, args, kwargs):
        forgotten = gone(i, 2, 2 if per_head else 1, n).repeat_interleave(2 if per_head else 4, 1)
        allowed = later.bool()[:, None, None].expand(2, 4, 1, n + 1).clone()
        allowed[..., :n] &= ~forgotten[:, :, None]
        return args, {**kwargs, "attention_mask": torch.where(allowed, 0.0, torch.finfo(torch.float32).min)}

    handles = [
        layer.self_attn.register_forward_pre_hook(partial(hide, i), with_kwargs=True)
        for i, layer in enumerate(model.model.layers)
    ]
    want = model(token, attention_mask=later, past_key_values=cache).logits
    for handle in handles:
        handle.remove()
    assert torch.allclose(got, want, atol=2e-5)


def test_hook_points_are_what_a_method_overrides():
    assert HOOK_POINTS == ("vision_block", "visual_tokens", "decoder_layer", "attention", "cache")
    assert PyramidDrop().hook_points() == ("decoder_layer",)
    assert Evict(True).hook_points() == ("cache",)
    assert BlockSparse().hook_points() == ("attention",)
    assert ZipVL().hook_points() == ("attention", "cache")
    assert Method().hook_points() == ()
