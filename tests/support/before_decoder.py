"""What holds for methods that reduce the tokens of pictures, whatever they go by: checks that take a kind of model and
a method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vlmaccel
from tests.support import models, qwen_vl
from tests.support.drops import answer_tokens, decode, with_answer
from vlmaccel.hooks import Method
from vlmaccel.run import Modality
from vlmaccel.stats import Stats

VLM = "llava-clip-llama"
KINDS = (VLM, "llava-siglip-llama", "llava-next", "qwen2-vl", "qwen2.5-vl", "qwen3-vl")


@torch.no_grad()
def run(model: Any, batch: dict[str, Tensor], method: Method) -> tuple[Tensor, Stats]:
    """Logits of a patched forward, and its statistics."""
    with vlmaccel.patched(model, method):
        logits = model(**batch).logits
        return logits, vlmaccel.stats(model)  # type: ignore[return-value]


def alone(kind: str, batch: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    """Sample b of a batch without its padding, with its own pictures only."""
    if kind in models.QWEN:
        return qwen_vl.alone(batch, b)
    real = batch["attention_mask"][b].bool()
    one = {name: batch[name][b : b + 1, real] for name in ("input_ids", "attention_mask")}
    before, own = (3, 0, 1)[:b], (3, 0, 1)[b]  # pictures of the samples of `models.inputs`
    for name in ("pixel_values", "image_sizes"):
        if name in batch and own:
            one[name] = batch[name][sum(before) : sum(before) + own]
    return one


def kept(stats: Stats, stage: int = 0) -> list[list[int]]:
    """Numbers of the tokens that are left, of every sample, without padding before it."""
    stage_ = stats.stages[stage]
    padding = (stats.token_map.modality == Modality.PAD).sum(1)
    return [
        (row[size > 0] - shift).tolist() for row, size, shift in zip(stage_.keep, stage_.size, padding, strict=True)
    ]


@torch.no_grad()
def check_identity(kind: str, attn: str, method: Method) -> None:
    """A method that may keep all gives the logits of the unpatched model, to the bit."""
    model, batch = models.build(kind, attn), models.inputs(kind, 3, pad=True)
    logits, stats = run(model, batch, method)
    assert torch.equal(logits, model(**batch).logits)
    assert not stats.stages


def check_batch_is_singles(kind: str, attn: str, method: Method) -> None:
    """A left-padded batch of three pictures, none, and one is its samples alone."""
    model, batch = models.build(kind, attn), models.inputs(kind, 3, pad=True)
    logits, stats = run(model, batch, method)
    assert stats.stages
    for b in range(3):
        one, one_stats = run(model, alone(kind, batch, b), method)
        assert torch.allclose(logits[b, -1], one[0, -1], atol=5e-5)
        for number, stage in enumerate(one_stats.stages):
            assert stage.layer == stats.stages[number].layer
            assert kept(one_stats, number)[0] == kept(stats, number)[b]


@torch.no_grad()
def check_text_is_unaffected(method: Method) -> None:
    """The sample without a picture is as it was, the others are not."""
    model, batch = models.build(VLM), models.inputs(VLM, 3, pad=True)
    logits, _ = run(model, batch, method)
    plain, real = model(**batch).logits, batch["attention_mask"][1].bool()
    assert torch.allclose(logits[1, real], plain[1, real], atol=2e-5)
    assert (logits[[0, 2], -1] - plain[[0, 2], -1]).abs().amax(1).min() > 1e-3


@torch.no_grad()
def check_decoding_is_recomputing(kind: str, method: Method) -> None:
    """Eight steps over the cache are one forward without one over prompt and answer; for methods that do not look at
    the text."""
    model, batch = models.build(kind), models.inputs(kind, 3, pad=True)
    later = answer_tokens(3)
    with vlmaccel.patched(model, method):
        _, steps = decode(model, batch, later)
        again = model(**with_answer(batch, later), use_cache=False).logits[:, -later.shape[1] :]
    assert torch.allclose(steps, again, atol=5e-5)


@torch.no_grad()
def check_half_precision(method: Method) -> None:
    """In bfloat16 the counts are the same."""
    model, batch = models.build(VLM), models.inputs(VLM, 3, pad=True)
    _, full = run(model, batch, method)
    model.to(torch.bfloat16)
    logits, half = run(model, batch | {"pixel_values": batch["pixel_values"].bfloat16()}, method)
    assert logits.isfinite().all()
    assert [s.size.gt(0).sum(1).tolist() for s in half.stages] == [s.size.gt(0).sum(1).tolist() for s in full.stages]


@torch.no_grad()
def check_generate_keeps_the_same(kind: str, method: Method) -> None:
    """`generate` keeps the tokens that a bare forward keeps."""
    model, batch = models.build(kind), models.inputs(kind, 3, pad=True)
    _, stats = run(model, batch, method)
    with vlmaccel.patched(model, method):
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        assert kept(vlmaccel.stats(model)) == kept(stats)  # type: ignore[arg-type]


@torch.no_grad()
def check_chunks(kind: str, method: Method, whole: Method) -> None:
    """A prompt that comes in chunks loses tokens in each; nothing changes where `whole` keeps all."""
    model, batch = models.build(kind), models.inputs(kind, 1)
    how: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, prefill_chunk_size=8)
    plain = model.generate(**batch, **how)
    with vlmaccel.patched(model, whole):
        assert torch.equal(model.generate(**batch, **how), plain)
    with vlmaccel.patched(model, method):
        out = model.generate(**batch, **how, return_dict_in_generate=True, output_logits=True)
        held = vlmaccel.stats(model).kv_bytes  # type: ignore[union-attr]
        assert all(logits.isfinite().all() for logits in out.logits)
    with vlmaccel.patched(model, whole):
        model.generate(**batch, **how)
        assert held < vlmaccel.stats(model).kv_bytes  # type: ignore[union-attr]


@torch.no_grad()
def check_second_turn(method: Method) -> None:
    """A picture in a later turn loses tokens as one in the first."""
    model, batch = models.build(VLM), models.inputs(VLM, 1)
    n = models.picture_tokens(VLM, (24, 24))
    more = {"input_ids": torch.tensor([[*[models.IMAGE] * n, 5, 6, 7]]), "pixel_values": batch["pixel_values"][:1]}
    with vlmaccel.patched(model, method):
        cache = model(**batch, use_cache=True).past_key_values
        mask = torch.ones(1, batch["input_ids"].shape[1] + n + 3, dtype=torch.long)
        logits = model(**more, attention_mask=mask, past_key_values=cache).logits
        group = vlmaccel.stats(model).stages[0].group[0, :n]  # type: ignore[union-attr]
    assert logits.isfinite().all()
    assert len(group[group >= 0].unique()) < n


def pictures(stats: Stats) -> list[tuple[int, Tensor]]:
    """Sample and tokens of every picture of a batch."""
    image = stats.token_map.image
    return [
        (b, (row == number).nonzero().flatten())
        for b, row in enumerate(image)
        for number in row.unique().tolist()
        if number >= 0
    ]
