"""The cross-modal evictions: closed forms against autograd and direct recomputation, sanity of the scores, whole models."""

from dataclasses import fields, replace

import pytest
import torch
from torch.func import jacrev

import vlmaccel
from tests.methods.test_properties import alone
from tests.support.drops import answer_tokens, decode
from tests.support.models import DEPTH, IMAGE, build, inputs
from vlmaccel.methods import SnapKV
from vlmaccel.methods.entropy import EntropyEviction, entropy, evenly
from vlmaccel.methods.hessian import (
    HessianEviction,
    damage,
    diagonal,
    lowest,
    output_norm,
    projection,
    removal_round,
    removed,
)
from vlmaccel.methods.sensitivity import NOTE, Sensitivity, coupling, inner, key_gradient, with_hop

VLM = "llava-clip-llama"
METHODS = {
    "sensitivity": Sensitivity(budget=0.4, window=4, sinks=1),
    "sensitivity-uniform": Sensitivity(
        budget=0.4, window=4, sinks=1, coupling="uniform", readers=3, pool=5, group="max"
    ),
    "sensitivity-direct": Sensitivity(budget=0.4, window=4, sinks=1, beta=0.0),
    "hessian": HessianEviction(budget=0.4, window=4, sinks=1),
    "hessian-rough": HessianEviction(budget=0.3, window=2, sinks=1, preselect=1.5, dims=4, step=0.3),
    "hessian-diagonal": HessianEviction(budget=0.4, window=4, sinks=1, mode="diagonal"),
    "entropy": EntropyEviction(budget=0.4, window=4),
    "entropy-post-vision": EntropyEviction(budget=0.4, window=4, probes=2, lam=2.0, rows="post-vision"),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
kinds = pytest.mark.parametrize("kind", [VLM, "qwen2", "qwen2-hybrid"])
B, K, G, Q, M, D, WIDTH = 2, 2, 3, 4, 7, 5, 11


class Layer:
    """Attention of a layer in float64: (B, K, G, Q, M) of Q rows, heads grouped by KV head."""

    def __init__(self, seed=0, keys=None, values=None):
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.double)  # noqa: E731
        self.queries, self.weight = normal(B, K, G, Q, D), normal(K, G, D, WIDTH)
        self.keys = normal(B, K, M, D) if keys is None else keys
        self.values = normal(B, K, M, D) if values is None else values
        self.attention = self.attend(self.keys)
        self.outputs = self.attention @ self.values[:, :, None]
        self.gram = self.weight @ self.weight.mT
        self.row = 1 / output_norm(self.outputs, self.weight)

    def attend(self, keys):
        return (self.queries @ keys[:, :, None].mT / D**0.5).softmax(-1)

    def heads(self, keys, values):
        """(B, K, G, Q, WIDTH) every head's part of the layer's output."""
        return torch.einsum("bkgqd,kgdn->bkgqn", self.attend(keys) @ values[:, :, None], self.weight)

    def parts(self):
        """(B, K, Q, M, WIDTH) what every entry adds to the output's change when it goes: sum of a (o - v) W_O."""
        off = self.outputs[..., None, :] - self.values[:, :, None, None]
        return torch.einsum("bkgqm,bkgqmd,kgdn->bkqmn", self.attention, off, self.weight)

    def without(self, gone):
        """(B, K, Q) squared change of each KV head's part of the output when the entries `gone` (B, K, M) are gone."""
        weight = self.attention * ~gone[:, :, None, None]
        outputs = weight / weight.sum(-1, keepdim=True) @ self.values[:, :, None]
        return torch.einsum("bkgqd,kgdn->bkqn", outputs - self.outputs, self.weight).square().sum(-1)

    def hessian(self):
        """(B, K, M, M)"""
        return torch.einsum("bkqmn,bkqtn,bq->bkmt", self.parts(), self.parts(), self.row)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_gradients_are_autograd_s():
    layer = Layer()
    by_key, by_value = jacrev(layer.heads, argnums=(0, 1))(layer.keys, layer.values)
    # (B, K, G, Q, WIDTH, B, K, M, D): other samples and KV heads play no part
    own = lambda x: torch.einsum("bkgqnbkmd->bkgqnmd", x).square().sum((4, 6))  # noqa: E731
    close(own(by_key), key_gradient(layer.attention, layer.queries, layer.values, layer.gram))
    close(own(by_value), layer.attention.square() * layer.gram.diagonal(dim1=2, dim2=3).sum(-1)[:, :, None, None])


def test_products_are_those_of_the_differences():
    layer = Layer()
    left, right = layer.outputs[:, :, 0], layer.outputs[:, :, 2]
    gram = layer.weight[:, 0] @ layer.weight[:, 2].mT
    off = [(x[:, :, :, None] - layer.values[:, :, None]) for x in (left, right)]
    close(torch.einsum("bkqmd,kde,bkqme->bkqm", off[0], gram, off[1]), inner(left, right, layer.values, gram))


def test_direct_term_vanishes_where_values_are_the_output_and_scales_with_the_projection():
    same = torch.randn(B, K, 1, D, dtype=torch.double).expand(-1, -1, M, -1)
    layer = Layer(values=same)
    assert key_gradient(layer.attention, layer.queries, same, layer.gram).max() < 1e-13
    layer = Layer()
    once, nine = (key_gradient(layer.attention, layer.queries, layer.values, layer.gram * x) for x in (1, 9))
    close(once * 9, nine)


def test_removal_of_one_and_of_a_set_is_exact():
    layer = Layer()
    part = projection(layer.weight, G * D)
    project = layer.outputs @ part, layer.values[:, :, None] @ part
    nothing = torch.zeros(B, K, M, dtype=torch.bool)
    for gone in (nothing, nothing.index_fill(2, torch.tensor([1, 4]), True)):
        mass, change = removed(layer.attention, *project, gone)
        cost = damage(layer.attention, *project, mass, change, layer.row)
        for t in range(M):
            if not gone[0, 0, t]:
                want = layer.without(gone.index_fill(2, torch.tensor(t), True)) * layer.row[:, None]
                close(cost[..., t], want.sum(-1))


def test_diagonal_is_the_hessian_s_and_leave_one_out_without_denominator():
    layer = Layer()
    got = diagonal(layer.attention, layer.outputs, layer.values, layer.weight, layer.row)
    close(got, layer.hessian().diagonal(dim1=2, dim2=3))
    one_head = Layer()
    one_head.weight[:, 1:] = 0  # then there is one denominator, 1 - a
    got = diagonal(one_head.attention, one_head.outputs, one_head.values, one_head.weight, one_head.row)
    for t in range(M):
        gone = torch.zeros(B, K, M, dtype=torch.bool).index_fill(2, torch.tensor(t), True)
        change = one_head.without(gone) * (1 - one_head.attention[:, :, 0, :, t]).square()
        close(got[..., t], (change * one_head.row[:, None]).sum(-1))


def test_hessian_is_symmetric_positive_and_zero_for_all_tokens_together():
    hessian = Layer().hessian()
    close(hessian, hessian.mT)
    assert torch.linalg.eigvalsh(hessian).min() > -1e-12
    assert hessian.sum((2, 3)).abs().max() < 1e-12


def test_projection_keeps_the_largest_part():
    layer = Layer()
    whole = layer.weight.flatten(1, 2) @ layer.weight.flatten(1, 2).mT
    errors = []
    for dims in (1, 4, 11, 99):
        part = projection(layer.weight, dims)
        assert part.shape == (K, G, D, min(dims, G * D))
        errors.append(float((part.flatten(1, 2) @ part.flatten(1, 2).mT - whole).square().sum()))
    errors = [error if error > 1e-12 else 0.0 for error in errors]  # rounding
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 1e-20  # the rank is WIDTH


def rounds_of(layer, number, step=0.01, free=None):
    part = projection(layer.weight, G * D)
    free = torch.ones(layer.attention.shape[:2] + layer.attention.shape[4:], dtype=torch.bool) if free is None else free
    number = torch.full(free.shape[:2], number)
    outputs, values = layer.outputs @ part, layer.values[:, :, None] @ part
    return removal_round(layer.attention, outputs, values, layer.row, free, torch.zeros_like(free), number, step)


def test_greedy_removes_one_of_two_duplicates_first():
    """Two equal tokens that stand for much: the diagonal keeps both, although either does for both."""
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(B, K, M, D, generator=generator, dtype=torch.double) for _ in range(2))
    keys[:, :, 5], values[:, :, 5] = keys[:, :, 2], values[:, :, 2]
    layer = Layer(keys=keys, values=values)
    score = diagonal(layer.attention, layer.outputs, layer.values, layer.weight, layer.row)
    close(score[..., 2], score[..., 5])
    when = rounds_of(layer, M - 1)
    assert (when[..., 2] != when[..., 5]).all()
    # once one of them has gone, its twin costs more than before
    part = projection(layer.weight, G * D)
    outputs, values = layer.outputs @ part, layer.values[:, :, None] @ part
    gone = torch.zeros(B, K, M, dtype=torch.bool).index_fill(2, torch.tensor(5), True)
    nothing = removed(layer.attention, outputs, values, gone & False)
    before = damage(layer.attention, outputs, values, *nothing, layer.row)
    after = damage(layer.attention, outputs, values, *removed(layer.attention, outputs, values, gone), layer.row)
    assert (after[..., 2] > before[..., 2]).all()


def test_greedy_takes_what_a_slow_search_takes():
    layer = Layer(seed=4)
    when = rounds_of(layer, 4)
    for b in range(B):
        for k in range(K):
            gone = torch.zeros(B, K, M, dtype=torch.bool)
            for now in range(1, 5):
                cost = {}
                for t in (~gone[b, k]).nonzero().flatten().tolist():
                    more = gone.clone()
                    more[b, k, t] = True
                    cost[t] = float((layer.without(more)[b, k] * layer.row[b]).sum())
                t = min(cost, key=cost.__getitem__)
                assert when[b, k, t] == now
                gone[b, k, t] = True
    assert (when == 5).sum() == B * K * 3
    free = torch.arange(M).expand(B, K, M) > 1
    assert (rounds_of(layer, 5, free=free)[..., :2] == 6).all()  # what is not free stays


def test_greedy_leaves_less_error_on_clustered_keys_than_the_diagonal():
    generator = torch.Generator().manual_seed(0)
    m, keep, rows = 128, 24, 16
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    near = torch.arange(m) % 16
    keys, values = (normal(1, 1, 16, 32)[:, :, near] * 1.5 + 0.2 * normal(1, 1, m, 32) for _ in range(2))
    layer = Layer.__new__(Layer)
    layer.values, layer.weight = values, normal(1, 2, 32, 64)
    layer.attention = (normal(1, 1, 2, rows, 32) @ keys[:, :, None].mT / 32**0.5).softmax(-1)
    layer.outputs = layer.attention @ values[:, :, None]
    layer.row = 1 / output_norm(layer.outputs, layer.weight)
    part = projection(layer.weight, 32)  # of 64
    free = torch.ones(1, 1, m, dtype=torch.bool)
    when = removal_round(
        layer.attention,
        layer.outputs @ part,
        values[:, :, None] @ part,
        layer.row,
        free,
        free & False,
        torch.tensor([[m - keep]]),
        0.05,
    )
    score = diagonal(layer.attention, layer.outputs, values, layer.weight, layer.row)
    errors = [
        layer.without(lowest(x, free, torch.tensor([[m - keep]]))).mul(layer.row).mean().sqrt() for x in (when, score)
    ]
    assert errors[0] < 0.75 * errors[1]


def test_the_hop_has_the_mean_of_the_direct_term_and_beta_weighs_it():
    generator = torch.Generator().manual_seed(1)
    direct, hop = torch.rand(2, B, K, M, generator=generator, dtype=torch.double)
    hop[..., 3] = 0  # no text reads it
    hop[1] *= 1e-30
    beta = torch.full((B, 1, M), 0.5, dtype=torch.double)
    got = with_hop(direct, hop, beta)
    close(got.sum((1, 2)), 1.5 * direct.sum((1, 2)))
    close(got[..., 3], direct[..., 3])
    assert torch.equal(with_hop(direct, hop, 0 * beta), direct)
    assert torch.equal(with_hop(direct, 0 * hop, beta), direct)


def test_coupling_is_the_share_of_attention_by_modality():
    mass = torch.rand(B, K, M, dtype=torch.double)
    modality = torch.tensor([1, 2, 2, 3, 1, 1, 2], dtype=torch.int8).expand(B, 1, M)
    share = coupling(mass, modality)
    close(share[:, 0, 0] + share[:, 0, 1] + share[:, 0, 3], torch.ones(B, dtype=torch.double))
    close(share[:, 0, 3], mass[..., 3].sum(1) / mass.sum((1, 2)))


def test_entropy_is_bounded_and_additive():
    out, read = torch.rand(2, 50, 3, dtype=torch.double)
    both = entropy(out) + entropy(read)
    joint = out[..., :, None] * read[..., None, :]
    close(both, entropy(joint.flatten(1)))
    assert (both >= 0).all() and (both <= 2 * torch.tensor(3.0).log() + 1e-12).all()
    assert entropy(torch.tensor([[0.0, 2.0], [0.0, 0.0]])).tolist() == [0, 0]
    close(entropy(torch.ones(3, dtype=torch.double)), torch.tensor(3, dtype=torch.double).log())


@pytest.mark.parametrize("most", [1, 3, 7, 20])
def test_rows_spread_evenly(most):
    among = torch.rand(4, 19, generator=torch.Generator().manual_seed(0)) < 0.6
    among[3] = False
    rows, counts = evenly(among, most)
    for b in range(4):
        got, there = rows[b][counts[b]].tolist(), among[b].nonzero().flatten().tolist()
        assert len(got) == min(most, len(there))
        assert set(got) <= set(there)
        assert got == sorted(got)
        assert got[-1:] == there[-1:]
        gaps = torch.tensor([there.index(x) for x in got]).diff()
        assert gaps.numel() == 0 or int(gaps.max() - gaps.min()) <= 1


@torch.no_grad()
def whole(model, batch):
    """Per layer of one sample, straight from the model: attention (H, n, n), values (H, n, d), queries (H, n, d), and
    output projection (H, d, D)."""
    seen = []

    def look(module, args, kwargs, out):
        x = kwargs["hidden_states"]
        q, v = (p(x)[0].unflatten(-1, (-1, module.head_dim)).transpose(0, 1) for p in (module.q_proj, module.v_proj))
        weight = module.o_proj.weight.mT.unflatten(0, (-1, module.head_dim))
        seen.append([x.double() for x in (out[1][0], v.repeat_interleave(len(q) // len(v), 0), q, weight)])

    text = getattr(model.model, "language_model", model.model)
    handles = [layer.self_attn.register_forward_hook(look, with_kwargs=True) for layer in text.layers]
    model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def scores_of(method, model, batch):
    """The scores of every layer, (H_kv, n), of one sample."""
    scores = {}

    class Watched(type(method)):
        def score(self, at):
            score = super().score(at)
            scores[at.layer] = score[0].double()
            return score

    with vlmaccel.patched(model, Watched(**{f.name: getattr(method, f.name) for f in fields(method)})), torch.no_grad():
        model(**batch)
    return [scores[i] for i in range(DEPTH)]


def slow_gradient(layer):
    """(H, n, n) squared derivative of row i's output by key j, head by head."""
    attention, values, queries, weight = layer
    off = torch.einsum("hijd,hdn->hijn", (attention @ values)[:, :, None] - values[:, None], weight).square().sum(-1)
    return attention.square() * off * queries.square().sum(-1)[..., None] / queries.shape[-1]


def by_group(x):
    return x.unflatten(0, (2, -1)).mean(1)


@pytest.mark.parametrize("kind", [VLM, "qwen2"])
def test_sensitivity_is_what_a_slow_sum_gives(kind):
    model, batch = build(kind, "eager"), inputs(kind, 1)
    modality = 1 + (batch["input_ids"][0] == IMAGE).long()
    text = (modality == 1).nonzero().flatten()[-5:]
    got = scores_of(Sensitivity(budget=0.3, window=3, sinks=1, beta=0.7, readers=5), model, batch)
    layers = whole(model, batch)
    for i, layer in enumerate(layers):
        gradient = slow_gradient(layer)
        want = by_group(gradient[:, -3:].sum(1))
        if i + 1 < DEPTH:
            attention, _, _, weight = layers[i + 1]
            value = attention.square() * weight.square().sum((1, 2))[:, None, None]
            felt = (slow_gradient(layers[i + 1]) + value)[:, -3:].sum((0, 1))
            hop = by_group((gradient.tril(-1) * felt[:, None])[:, text].sum(1))
            mass = layer[0][:, text].sum((0, 1))
            beta = 0.7 * torch.stack([mass[modality == m].sum() for m in modality]) / mass.sum()
            want = want + beta * hop * want.mean() / hop.mean()
        torch.testing.assert_close(got[i], want, rtol=1e-3, atol=1e-5 * float(want.max()))


def test_diagonal_is_what_a_slow_sum_gives():
    model, batch = build(VLM, "eager"), inputs(VLM, 1)
    got = scores_of(HessianEviction(budget=0.3, window=3, sinks=1, mode="diagonal"), model, batch)
    for score, (attention, values, _, weight) in zip(got, whole(model, batch), strict=True):
        outputs = (attention @ values)[:, -3:]
        norm = torch.einsum("hqd,hdn->qn", outputs, weight).square().sum(-1)
        each = (
            torch.einsum("hqjd,hdn->hqjn", outputs[:, :, None] - values[:, None], weight) * attention[:, -3:, :, None]
        )
        want = (each.unflatten(0, (2, -1)).sum(1).square().sum(-1) / norm[:, None]).sum(1)
        torch.testing.assert_close(score, want, rtol=1e-3, atol=1e-5 * float(want.max()))


def test_entropy_is_what_whole_rows_give():
    model, batch = build(VLM, "eager"), inputs(VLM, 1)
    visual = batch["input_ids"][0] == IMAGE
    options = dict(budget=0.3, window=3, sinks=1)
    got = scores_of(EntropyEviction(**options, lam=0.5, probes=64), model, batch)
    base = scores_of(SnapKV(**options), model, batch)
    for score, plain, (attention, *_) in zip(got, base, whole(model, batch), strict=True):
        attention = by_group(attention)
        later = torch.ones(attention.shape[1:]).tril(-1)
        parts = [visual, ~visual]
        out = [(attention * later)[:, m].sum(1) / later[m].sum(0).clamp(min=1) for m in parts]
        read = [attention[:, :, m].sum(2) for m in parts]
        both = entropy(torch.stack(out, -1)) + entropy(torch.stack(read, -1))
        torch.testing.assert_close(
            score, plain * (1 + 0.5 * both / (2 * torch.tensor(2.0).log())), rtol=1e-3, atol=1e-7
        )


def kept(method, kind, pad=True):
    """Logical index of what stays, per layer: (B, H_kv, k)."""
    model, batch = build(kind), inputs(kind, 3, pad=pad)
    with vlmaccel.patched(model, method), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    return [layer.slots.index.masked_fill(layer.slots.sizes == 0, -1) for layer in cache.layers], cache


@kinds
def test_entropy_without_weight_is_snapkv_and_one_modality_too(kind):
    mine, want = (kept(m, kind)[0] for m in (EntropyEviction(budget=0.4, window=4, lam=0.0), SnapKV(0.4, window=4)))
    assert all(torch.equal(a, b) for a, b in zip(mine, want, strict=True))
    mine = kept(EntropyEviction(budget=0.4, window=4, lam=5.0), kind)[0]
    same = [torch.equal(a[1], b[1]) for a, b in zip(mine, want, strict=True)]  # text only
    assert all(same)
    if kind == VLM:
        assert not all(torch.equal(a, b) for a, b in zip(mine, want, strict=True))


def test_entropy_is_bounded_in_a_model():
    seen = []

    class Watched(EntropyEviction):
        def _entropy(self, at):
            seen.append((super()._entropy(at), at.prompt))
            return seen[-1][0]

    kept(Watched(budget=0.4, window=4, probes=8), VLM)
    assert len(seen) == DEPTH
    for value, prompt in seen:
        assert value.min() > -1e-6
        assert value.max() < 2 * torch.tensor(2.0).log() + 1e-6  # text and pictures
        assert value[prompt.expand_as(value)].std() > 0.01


def test_the_last_layer_has_the_direct_term_only_and_the_others_not():
    with_it, without = (kept(replace(METHODS["sensitivity"], beta=b), VLM)[0] for b in (3.0, 0.0))
    same = [torch.equal(a, b) for a, b in zip(with_it, without, strict=True)]
    assert same[-1]
    assert not all(same[:-1])


def test_sensitivity_leaves_nothing_behind():
    _, cache = kept(METHODS["sensitivity"], VLM)
    assert all(NOTE not in layer.notes for layer in cache.layers)


@kinds
def test_sensitivity_follows_what_others_evict_before_it(kind):
    """Layer by layer SnapKV leaves 70 %, then the sensitivity of what is left decides."""
    model, batch = build(kind), inputs(kind, 3, pad=True)
    methods = [SnapKV(0.7, window=4), Sensitivity(0.4, window=4, sinks=1)]
    with vlmaccel.patched(model, methods), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    left = kept(methods[0], kind)[0]
    for layer, before in zip(cache.layers, left, strict=True):
        for b in range(3):
            for k in range(before.shape[1]):
                there = layer.slots.sizes[b, k] > 0
                assert set(layer.slots.index[b, k][there].tolist()) <= set(before[b, k].tolist())


@every_method
@kinds
@torch.no_grad()
def test_whole_budget_is_bit_identical(method, kind):
    model, batch, later = build(kind), inputs(kind, 3, pad=True), answer_tokens(3)[:, :3]
    want = decode(model, batch, later)
    with vlmaccel.patched(model, replace(method, budget=1.0)):
        got = decode(model, batch, later)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@every_method
@kinds
@torch.no_grad()
def test_a_batch_is_its_samples_alone(method, kind):
    model, batch, later = build(kind), inputs(kind, 3, pad=True), answer_tokens(3)[:, :3]
    plain = decode(model, batch, later)[1]
    with vlmaccel.patched(model, method):
        steps = decode(model, batch, later)[1]
        for b in range(3):
            one = decode(model, alone(batch, b, 9), later[b : b + 1])[1]
            assert torch.allclose(steps[b], one[0], atol=3e-5)
    assert (steps - plain).abs().max() > 1e-3


@every_method
@torch.no_grad()
def test_a_second_turn(method):
    """Old entries, kept by each KV head on its own, and new ones compete; samples of the same length only."""
    model, batch = build(VLM), inputs(VLM, 3)
    more = torch.randint(2, 100, (3, 12), generator=torch.Generator().manual_seed(2))
    with vlmaccel.patched(model, method):
        cache = model(**batch, use_cache=True).past_key_values
        cache = model(more, past_key_values=cache, use_cache=True).past_key_values
        logits = model(more[:, :1], past_key_values=cache, use_cache=True).logits
    n = batch["input_ids"].shape[1] + 12
    assert logits.isfinite().all()
    assert [layer.keys.shape[2] - 1 for layer in cache.layers] == [int(n * method.budget)] * DEPTH


@every_method
@torch.no_grad()
def test_scores_that_are_not_finite_are_an_error(method):
    model = build("qwen2")
    model.model.layers[0].self_attn.k_proj.weight[0, 0] = torch.nan
    with vlmaccel.patched(model, method), pytest.raises(ValueError, match=f"{method.name}: .* layer 0 are NaN"):
        model(**inputs("qwen2", 2, pad=True), use_cache=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sensitivity(beta=-1), "beta"),
        (lambda: Sensitivity(coupling="all"), "coupling"),
        (lambda: Sensitivity(readers=0), "readers"),
        (lambda: HessianEviction(mode="full"), "mode"),
        (lambda: HessianEviction(dims=0), "dims"),
        (lambda: HessianEviction(step=0), "step"),
        (lambda: HessianEviction(preselect=0.5), "preselect"),
        (lambda: EntropyEviction(lam=-0.1), "lam"),
        (lambda: EntropyEviction(probes=0), "probes"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
