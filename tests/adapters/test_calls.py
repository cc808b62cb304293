"""The many ways a model is called: whatever the caller's route, a drop is what dropping by hand gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import vlmaccel
from tests.support.drops import (
    FixedDrop,
    KeepAll,
    assert_like_reference,
    decode,
    go_on,
    make_plan,
    policy,
    reference_traces,
)
from tests.support.models import DEPTH, KINDS, QWEN, VLMS, build, inputs
from tests.support.mrope import places
from tests.support.reference import Positions, Reference
from vlmaccel.hooks import Attention, DecoderLayer
from vlmaccel.reduction import Reduction

SOME = ("llama", "qwen2-hybrid", "llava-clip-mistral", "llava-onevision", "qwen2-vl", "qwen3-vl")
NONE = torch.zeros(3, 0, dtype=torch.long)


def setting(kind: str, layers: tuple[int, ...] = (1, 3), **options: Any) -> tuple[Any, dict[str, Tensor], Any]:
    """Model, a padded batch of three, and a plan for it."""
    batch = inputs(kind, 3, pad=True)
    return build(kind), batch, make_plan(batch["attention_mask"], layers, **options)


@pytest.mark.parametrize("kind", SOME)
@torch.no_grad()
def test_logits_to_keep(kind: str) -> None:
    model, batch, plan = setting(kind)
    length = batch["input_ids"].shape[1]
    with vlmaccel.patched(model, FixedDrop(plan)):
        whole = model(**batch).logits
        for keep in (1, 4, torch.tensor([0, 2, length - 1])):
            logits = model(**batch, logits_to_keep=keep).logits
            wanted = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
            assert logits.shape == wanted.shape
            stays = (plan[3][:, -keep:] if isinstance(keep, int) else plan[3][:, keep])[..., None]
            assert (logits - wanted).mul(stays).abs().max() < 1e-5


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@torch.no_grad()
def test_positions_and_masks_given_by_the_caller(kind: str, positions: Positions) -> None:
    """Position ids that do not count padding (as generate makes them), none at all, and no mask where none is needed."""
    model, batch, plan = setting(kind)
    mask, positions = batch["attention_mask"], policy(kind, positions)
    method = FixedDrop(plan, positions)
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    if kind in QWEN:
        counted = counted.repeat(3, 1, 1)
        for b, at in enumerate(places(model, batch)):
            counted[:, b, mask[b].bool()] = at
    with vlmaccel.patched(model, method):
        assert_like_reference(
            reference_traces(model, batch, NONE, plan, positions),
            mask,
            model(**batch, position_ids=counted).logits,
            None,
        )
    batch = inputs(kind, 3)
    plan = make_plan(batch["attention_mask"], (0, 2))
    with vlmaccel.patched(model, FixedDrop(plan, positions)):
        logits = model(**{k: v for k, v in batch.items() if k != "attention_mask"}).logits
    traces = reference_traces(model, batch, NONE, plan, positions)
    assert_like_reference(traces, batch["attention_mask"], logits, None)


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@torch.no_grad()
def test_padding_on_the_right(kind: str, positions: Positions) -> None:
    model, batch, plan = setting(kind)
    left, positions = batch["attention_mask"], policy(kind, positions)
    shift = (left == 0).sum(1)

    def turn(x: Tensor) -> Tensor:
        return torch.stack([row.roll(-int(s)) for row, s in zip(x, shift, strict=True)])

    names = {"input_ids", "attention_mask", "mm_token_type_ids"}
    right = {k: turn(v) if k in names else v for k, v in batch.items()}
    plain = model(**right).logits
    with vlmaccel.patched(model, KeepAll((0, 2), "selection")):
        assert torch.equal(model(**right).logits, plain)
    with vlmaccel.patched(model, FixedDrop({k: turn(kept) for k, kept in plan.items()}, positions)):
        logits = model(**right).logits
    for b, trace in enumerate(reference_traces(model, batch, NONE, plan, positions)):
        assert (logits[b, trace.index] - trace.logits).abs().max() < 2e-5


# a lazy cache does not know of sliding layers: with that model it is wrong, patched or not
@pytest.mark.parametrize(
    ("kind", "make"), [(k, m) for k in SOME for m in ("lazy", "from config") if (k, m) != ("qwen2-hybrid", "lazy")]
)
@torch.no_grad()
def test_a_cache_of_the_callers_own(kind: str, make: str) -> None:
    model, batch, plan = setting(kind, (0, 3))
    cache = DynamicCache() if make == "lazy" else DynamicCache(config=model.config.get_text_config())
    with vlmaccel.patched(model, FixedDrop(plan, policy(kind, "renumber"))):
        own = model.generate(**batch, max_new_tokens=6, do_sample=False, past_key_values=cache)
        default = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(own, default)
    assert cache.get_seq_length() == batch["input_ids"].shape[1] + 5
    held = cache.layers[4].keys.shape[-2]
    if kind != "qwen2-hybrid":
        assert held == int(plan[3].sum(1).max()) + 5


@pytest.mark.parametrize("kind", SOME)
@torch.no_grad()
def test_two_conversations_in_turn(kind: str) -> None:
    """What was dropped belongs to the cache, not to the model: another prompt in between changes nothing."""
    model = build(kind)
    batches = [inputs(kind, 3, pad=True), inputs(kind, 2)]
    plans = [make_plan(b["attention_mask"], (1, 3), seed=s) for s, b in enumerate(batches)]
    policies = (policy(kind, "renumber"), policy(kind, "keep"))
    methods = [FixedDrop(p, positions) for p, positions in zip(plans, policies, strict=True)]
    later = torch.randint(2, 110, (3, 8), generator=torch.Generator().manual_seed(5))
    outs = []
    for batch, method in zip(batches, methods, strict=True):
        with vlmaccel.patched(model, method):
            outs.append(model(**batch, use_cache=True))
    steps: list[list[Tensor]] = [[], []]
    with vlmaccel.patched(model, KeepAll((2,))):  # decoding needs a patched model, whatever the method
        for t in range(8):
            for i, batch in enumerate(batches):
                new = later[: len(batch["input_ids"]), t : t + 1]
                outs[i] = go_on(model, batch, new, t, outs[i].past_key_values)
                steps[i].append(outs[i].logits[:, -1])
    for i, batch in enumerate(batches):
        size = len(batch["input_ids"])
        traces = reference_traces(model, batch, later[:size], plans[i], policies[i])
        assert_like_reference(traces, batch["attention_mask"], None, torch.stack(steps[i], 1))


@dataclass(frozen=True, eq=False)
class SecondDrop(FixedDrop):
    """Another method of the same kind, to be combined with the first."""

    name: ClassVar[str] = "second-drop"


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize(
    ("policies", "layers"),
    [
        (("keep", "renumber"), (1, 3)),
        (("renumber", "keep"), (1, 3)),
        (("renumber", "renumber"), (1, 3)),
        (("keep", "renumber"), (2, 2)),  # to the reference these are one stage with the second policy
        (("keep", "keep"), (2, 2)),
    ],
)
@torch.no_grad()
def test_two_methods_together(kind: str, policies: tuple[Positions, Positions], layers: tuple[int, int]) -> None:
    """Each with its own position policy, at different layers or one after the other at the same."""
    model, batch, _ = setting(kind)
    mask, policies = batch["attention_mask"], (policy(kind, policies[0]), policy(kind, policies[1]))
    first = make_plan(mask, (layers[0],))[layers[0]]
    second = make_plan(first.long(), (layers[1],), seed=1)[layers[1]]
    later = torch.randint(2, 110, (3, 4), generator=torch.Generator().manual_seed(5))
    both = [FixedDrop({layers[0]: first}, policies[0]), SecondDrop({layers[1]: second}, policies[1])]
    with vlmaccel.patched(model, both):
        prompt, steps = decode(model, batch, later)
    plan, positions = {layers[0]: first, layers[1]: second}, dict(zip(layers, policies, strict=True))
    if layers[0] == layers[1]:  # one stage for the reference
        positions = {layers[0]: policies[1]}
    traces = reference_traces(model, batch, later, plan, positions)
    assert_like_reference(traces, mask, prompt, steps)


@pytest.mark.parametrize("kind", SOME)
def test_loss_and_gradients_flow_through_a_drop(kind: str) -> None:
    model, batch, plan = setting(kind)
    kept = plan[3]
    labels = batch["input_ids"].masked_fill(~(kept & (torch.arange(kept.shape[1]) > kept.shape[1] - 6)), -100)
    plain = model(**batch, labels=labels).loss
    with vlmaccel.patched(model, KeepAll((1, 3), "selection")):
        assert torch.equal(model(**batch, labels=labels).loss, plain)
    with vlmaccel.patched(model, FixedDrop(plan)):
        out = model(**batch, labels=labels)
    assert not torch.equal(out.loss, plain)
    logits, targets = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    assert torch.allclose(out.loss, torch.nn.functional.cross_entropy(logits, targets))
    out.loss.backward()
    text = getattr(model.model, "language_model", model.model)
    for layer in text.layers:
        assert layer.self_attn.k_proj.weight.grad.abs().max() > 0
    with vlmaccel.patched(model, FixedDrop(plan)), pytest.raises(ValueError, match="label"):
        model(**batch, labels=batch["input_ids"])


@dataclass(frozen=True, eq=False)
class WrongShape(KeepAll):
    """Returns a reduction of the wrong number of tokens."""

    def decoder_layer(self, at: DecoderLayer) -> Reduction:
        return Reduction.identity(1, 3)


def test_a_reduction_of_the_wrong_shape_is_refused() -> None:
    model, batch, _ = setting("llama")
    with vlmaccel.patched(model, WrongShape((2,))), pytest.raises(ValueError, match=r"\(1, 3\).*\(3, 30\)"):
        model(**batch)


@dataclass(frozen=True, eq=False)
class Probe(FixedDrop):
    """Drops as planned, and notes the attention rows it is offered, before every layer and after every attention."""

    name: ClassVar[str] = "probe"
    seen: Any = None

    def decoder_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))

    def attention_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))

    def decoder_layer(self, at: DecoderLayer) -> Reduction | None:
        self.note("before", at)
        return super().decoder_layer(at) if at.layer in self.plan else None

    def attention(self, at: Attention) -> None:
        self.note("after", at)

    def note(self, when: str, at: DecoderLayer) -> None:
        batch, n = at.tokens.modality.shape
        index = torch.arange(n).expand(batch, n) if at.run.index is None else at.run.index
        real = torch.ones(batch, n, dtype=torch.bool) if at.run.size is None else at.run.size > 0
        rows = torch.stack([torch.full((batch,), n - 1), torch.full((batch,), n - 3)], 1)
        self.seen[when, at.layer] = (index + at.run.past, real, rows, at.scores.rows(rows), at.hidden)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("kind", "positions"), [(k, ("keep", "renumber")[i % 2]) for i, k in enumerate(KINDS)])
@torch.no_grad()
def test_scores_are_the_layers_own_attention(kind: str, positions: Positions, attn: str) -> None:
    """Both forms: on the input of a layer before its drop (PyramidDrop), and of the attention that ran (FastV)."""
    model, batch = build(kind, attn), inputs(kind, 3, pad=True)
    mask, positions = batch["attention_mask"], policy(kind, positions)
    plan = make_plan(mask, (1, 3), ragged=kind != "llama")
    for kept in plan.values():
        kept[:, -3:] = True  # the probed rows are there for every sample
    seen: dict[Any, Any] = {}
    with vlmaccel.patched(model, Probe(plan, positions, seen)):
        model(**batch)
    reference = Reference(model)
    traces = reference_traces(model, batch, NONE, plan, positions)
    for b, trace in enumerate(traces):
        start = int((mask[b] == 0).sum())
        for when, k in seen:
            index, real, _, scores, hidden = (x[b] for x in seen[when, k])
            columns = trace.rows[k] if when == "before" else trace.kept[k]
            expected = reference.attention(trace, k, before_drop=when == "before")
            place = index - start
            mine = scores.double().mean(0)[:, torch.isin(place, columns) & real]
            theirs = expected[[len(columns) - 1, len(columns) - 3]]
            assert (mine - theirs).abs().max() < 1e-5
            assert float(scores[:, :, ~(torch.isin(place, columns) & real)].abs().sum()) == 0
            if when == "before":
                assert (hidden[torch.isin(place, columns) & real] - trace.inputs[k]).abs().max() < 2e-5
    assert len(seen) == 2 * DEPTH


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_stats_count_what_is_there(kind: str) -> None:
    model, batch, plan = setting(kind)
    cache = model(**batch, use_cache=True).past_key_values
    full = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    with vlmaccel.patched(model, FixedDrop(plan)):
        kept = model(**batch, use_cache=True).past_key_values
        stats = vlmaccel.stats(model)
    assert stats.kv_bytes_full == full
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
    assert held <= stats.kv_bytes and held < full
    mean = batch["attention_mask"].sum(1).float().mean()
    counts = [mean, *[plan[1].sum(1).float().mean()] * 2, *[plan[3].sum(1).float().mean()] * 3]
    assert stats.tokens == pytest.approx([float(c) for c in counts])
    if kind in VLMS:
        image = batch["input_ids"] == model.config.image_token_id
        assert stats.nominal_visual_tokens == pytest.approx(float(image.sum(1).float().mean()))
        assert stats.visual_tokens[1] == pytest.approx(float((image & plan[1]).sum(1).float().mean()))
