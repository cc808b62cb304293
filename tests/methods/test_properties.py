"""What holds for every method: identity, exact counts, batches, caches, memory, odd inputs."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import vlmaccel
from tests.support.drops import decode, with_answer
from tests.support.models import DEPTH, IMAGE, PAD, QWEN, VLMS, build, inputs
from tests.support.qwen_vl import alone as alone_with_pictures
from vlmaccel.hooks import Method, Positions
from vlmaccel.methods import (
    AttentionSum,
    CDPruner,
    DivPrune,
    FastV,
    Magnitude,
    NeighbourCosine,
    Pool,
    PyramidDrop,
    Random,
    ToMeDecoder,
    Uniform,
)
from vlmaccel.methods.greedy import Greedy
from vlmaccel.methods.merging import Merging
from vlmaccel.reduction import Reduction
from vlmaccel.run import Modality, Stage

METHODS = {
    "pyramiddrop": PyramidDrop(),
    "pyramiddrop-keep": PyramidDrop(ratio=0.6, layers=(0, 2, 5), positions="keep"),
    "fastv": FastV(layer=2, ratio=0.4),
    "attention-sum": AttentionSum(layer=2, ratio=0.4),
    "magnitude": Magnitude(layer=1, ratio=0.4),
    "neighbour-cosine": NeighbourCosine(layer=1, ratio=0.4),
    "divprune": DivPrune(ratio=0.4),
    "cdpruner": CDPruner(ratio=0.4),
    "cdpruner-unlike": CDPruner(layer=2, ratio=0.4, relevance="unlike", positions="keep"),
    "random": Random(layer=0, ratio=0.4),
    "random-calibrated": Random(layer=1, ratio=0.4, positions="calibrated"),
    "uniform": Uniform(layer=0, ratio=0.4, positions="renumber"),
    "pool": Pool(layer=0, ratio=0.4),
    "pool-prop-attn": Pool(layer=3, ratio=0.4, prop_attn=True),
    "pool-calibrated": Pool(layer=1, ratio=0.4, positions="calibrated"),
    "tome-decoder": ToMeDecoder(layer=2, ratio=0.4),
    "tome-decoder-renumber": ToMeDecoder(layer=0, ratio=0.2, prop_attn=False, position="first", positions="renumber"),
    "tome-decoder-calibrated": ToMeDecoder(layer=1, ratio=0.6, positions="calibrated"),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
VLM = "llava-clip-llama"
TEXT = ("qwen3", "mistral-sliding")  # q and k norms; sliding windows; both grouped-query
kinds = pytest.mark.parametrize("kind", [VLM, "llava-next", "qwen3-vl", *TEXT])


def all_kept(method):
    if isinstance(method, PyramidDrop):
        return replace(method, ratio=1.0, layers=None)
    return replace(method, ratio=1.0)


def fitting(kind, method):
    """The method, with positions that the kind can have."""
    return replace(method, positions="keep") if kind in QWEN else method


@torch.no_grad()
def run(model, batch, method):
    """Logits of a patched forward, and its statistics."""
    with vlmaccel.patched(model, method):
        logits = model(**batch).logits
        return logits, vlmaccel.stats(model)


def alone(batch, b, tokens_per_picture):
    """Sample b of a batch without its padding."""
    if "mm_token_type_ids" in batch:
        return alone_with_pictures(batch, b)
    real = batch["attention_mask"][b].bool()
    one = {k: batch[k][b : b + 1, real] for k in ("input_ids", "attention_mask")}
    if "pixel_values" in batch:
        counts = (batch["input_ids"] == IMAGE).sum(1).div(tokens_per_picture, rounding_mode="floor")
        start, n = int(counts[:b].sum()), int(counts[b])
        if n:
            one["pixel_values"] = batch["pixel_values"][start : start + n]
    return one


@every_method
@kinds
@torch.no_grad()
def test_ratio_one_is_bit_identical(method, kind):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    logits, _ = run(model, batch, all_kept(fitting(kind, method)))
    assert torch.equal(logits, model(**batch).logits)


@every_method
@kinds
def test_kept_indices_and_counts(method, kind):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    _, stats = run(model, batch, fitting(kind, method))
    tokens = stats.token_map
    real = tokens.modality != Modality.PAD
    assert len(stats.stages) == len(method.stages(DEPTH))
    for stage in stats.stages:
        ratio = method.stages(DEPTH)[stage.layer]
        kept = torch.zeros_like(real).scatter(1, stage.keep, stage.size > 0)
        assert (stage.keep.diff() > 0).all()
        assert not (kept & ~real).any()
        if not isinstance(method, Merging):
            assert (stage.size <= 1).all()
        # every token either joined a slot or was dropped; a slot's size counts its members
        joined = stage.group >= 0
        assert torch.equal(stage.size.sum(1), joined.sum(1))
        for b in range(len(real)):
            pictures = int(tokens.image[b].max()) + 1
            for i in range(pictures):
                here = tokens.image[b] == i
                want = max(1, int(method.count(here.sum(), ratio)))
                assert kept[b, here].sum() == want or (isinstance(method, Pool) and kept[b, here].sum() <= want)
            if kind in VLMS:
                assert kept[b, real[b] & (tokens.image[b] < 0)].all()  # text stays
            else:
                first, last = real[b].nonzero().flatten()[[0, -1]]
                prompt = int(real[b].sum()) - 2
                assert kept[b, first]
                assert kept[b, last]
                want = int(method.count(torch.tensor(prompt), ratio)) + 2
                assert kept[b].sum() == want or (isinstance(method, Pool) and kept[b].sum() <= want)


@every_method
@torch.no_grad()
def test_text_only_sample_of_a_vlm_is_unaffected(method):
    model, batch = build(VLM), inputs(VLM, 3, pad=True)
    logits, _ = run(model, batch, method)
    real = batch["attention_mask"][1].bool()
    plain = model(**batch).logits[1, real]
    assert torch.allclose(logits[1, real], plain, atol=2e-5)
    assert (logits[0, -1] - model(**batch).logits[0, -1]).abs().max() > 1e-3  # the sample with pictures is


@every_method
@pytest.mark.parametrize("kind", [VLM, "qwen2.5-vl", *TEXT])
def test_a_batch_is_its_samples_alone(method, kind):
    model, batch, method = build(kind), inputs(kind, 3, pad=True), fitting(kind, method)
    logits, stats = run(model, batch, method)
    for b in range(3):
        one, one_stats = run(model, alone(batch, b, 9), method)
        assert torch.allclose(logits[b, -1], one[0, -1], atol=3e-5)
        shift = int((batch["attention_mask"][b] == 0).sum())
        for stage in one_stats.stages:
            whole = next(s for s in stats.stages if s.layer == stage.layer)
            assert (whole.keep[b][whole.size[b] > 0] - shift).tolist() == stage.keep[0][stage.size[0] > 0].tolist()


@every_method
@pytest.mark.parametrize("kind", [VLM, "qwen3"])
def test_order_of_the_batch_does_not_matter(method, kind):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    logits, _ = run(model, batch, method)
    order = [2, 0, 1]
    turned = {k: batch[k][order] for k in ("input_ids", "attention_mask")}
    if kind == VLM:  # sample 0 has three pictures, 1 none, 2 one
        turned["pixel_values"] = batch["pixel_values"][[3, 0, 1, 2]]
    assert torch.allclose(run(model, turned, method)[0][:, -1], logits[order, -1], atol=3e-5)


@every_method
@pytest.mark.parametrize("kind", [VLM, "qwen2-vl", "qwen3"])
def test_decoding_over_the_cache_is_recomputing(method, kind):
    """Eight steps over the cache are one forward without a cache in which the same prompt tokens are dropped."""
    model, batch, method = build(kind), inputs(kind, 3, pad=True), fitting(kind, method)
    later = torch.randint(2, 100, (3, 8), generator=torch.Generator().manual_seed(5))
    with vlmaccel.patched(model, method):
        _, steps = decode(model, batch, later)
        model(**batch)
        stages = {stage.layer: stage for stage in vlmaccel.stats(model).stages}
    whole = with_answer(batch, later)
    with vlmaccel.patched(model, Replay(stages, method.positions, method.prop_attn)):
        again = model(**whole, use_cache=False).logits[:, -8:]
    assert torch.allclose(steps, again, atol=5e-5)


@dataclass(frozen=True, eq=False)
class Replay(Method):
    """Drops and merges what another method did in a prompt, in that prompt with an answer behind it."""

    name = "replay"
    stages: dict[int, Stage]
    positions: Positions = "keep"
    prop_attn: bool = False

    def decoder_layers(self, depth):
        return tuple(self.stages)

    def decoder_layer(self, at):
        stage, n = self.stages[at.layer], at.hidden.shape[1]
        index = torch.arange(n).repeat(at.hidden.shape[0], 1) if at.run.index is None else at.run.index
        prompt = stage.group.shape[1]
        group = stage.group.gather(1, index.clamp(max=prompt - 1))
        joined = stage.keep.gather(1, group.clamp(min=0))
        slot = torch.searchsorted(index, joined).masked_fill(group < 0, -1)
        return Reduction.merge_into(torch.where(index < prompt, slot, torch.arange(n)))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@every_method
def test_no_attention_matrix_is_made(method):
    if isinstance(method, Greedy):
        pytest.skip("compares all tokens of a picture with one another: an N x N matrix is its definition")
    n = 1024
    model = build("llama")
    batch = {"input_ids": torch.randint(2, 100, (1, n), generator=torch.Generator().manual_seed(0))}
    with Largest() as largest:
        run(model, batch, method)
    assert largest.numel < n * n / 2  # one head's matrix; nor the four heads' together in any form


@every_method
@torch.no_grad()
def test_prompts_too_short_to_lose_anything(method):
    model = build("llama")
    for n in (1, 2):
        batch = {"input_ids": torch.arange(5, 5 + n)[None]}
        with vlmaccel.patched(model, method):
            assert torch.equal(model(**batch).logits, build("llama")(**batch).logits)


@every_method
@torch.no_grad()
def test_duplicate_and_zero_tokens(method):
    """Equal scores everywhere, and vectors without a direction."""
    model = build("llama")
    weight = model.get_input_embeddings().weight
    kept = weight[7].clone()
    weight[7] = 0
    try:
        logits, stats = run(model, {"input_ids": torch.full((2, 12), 7)}, method)
    finally:
        weight[7] = kept
    assert logits.isfinite().all()
    assert all((s.keep.diff() > 0).all() for s in stats.stages)
    assert torch.equal(stats.stages[0].keep[0], stats.stages[0].keep[1])


@every_method
@torch.no_grad()
def test_half_precision_runs_and_keeps_the_counts(method):
    model, batch = build(VLM), inputs(VLM, 3, pad=True)
    _, full = run(model, batch, method)
    model.to(torch.bfloat16)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    logits, half = run(model, batch, method)
    assert logits.isfinite().all()
    assert [s.size.sum(1).tolist() for s in half.stages] == [s.size.sum(1).tolist() for s in full.stages]


@settings(max_examples=12)
@given(
    st.lists(st.integers(1, 14), min_size=1, max_size=3),
    st.floats(0, 1),
    st.integers(1, DEPTH - 1),
    st.sampled_from(sorted(METHODS)),
    st.sampled_from(["keep", "renumber", "calibrated"]),
)
def test_any_lengths_budgets_and_paddings(lengths, ratio, layer, name, positions):
    model = build("llama")
    method = METHODS[name]
    options = {"ratio": ratio, "positions": positions}
    method = replace(method, **options, **({} if isinstance(method, PyramidDrop) else {"layer": layer}))
    generator = torch.Generator().manual_seed(sum(lengths))
    prompts = [torch.randint(2, 100, (n,), generator=generator).tolist() for n in lengths]
    n = max(lengths)
    ids = torch.tensor([[PAD] * (n - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (n - len(p)) + [1] * len(p) for p in prompts])
    with vlmaccel.patched(model, method), torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -1]
        for b, prompt in enumerate(prompts):
            one = model(input_ids=torch.tensor([prompt])).logits[0, -1]
            assert torch.allclose(logits[b], one, atol=5e-5)


@every_method
@torch.no_grad()
def test_padding_on_the_right_is_no_different(method):
    model = build("qwen3")
    prompts = [torch.randint(2, 100, (n,), generator=torch.Generator().manual_seed(n)) for n in (17, 11)]
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=PAD)
    mask = (torch.arange(17) < torch.tensor([[17], [11]])).long()
    with vlmaccel.patched(model, method):
        logits = model(input_ids=ids, attention_mask=mask).logits
        for b, prompt in enumerate(prompts):
            one = model(input_ids=prompt[None]).logits[0, -1]
            assert torch.allclose(logits[b, len(prompt) - 1], one, atol=3e-5)
