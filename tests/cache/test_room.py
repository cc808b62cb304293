"""Decode steps that write into spare room give what appending by copy gives, whatever happens in between."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.memory import held_bytes
from vlmaccel.cache import PrunedLayer, Slots
from vlmaccel.cache.pruned import ROOM
from vlmaccel.reduction import Reduction

BATCH, HEADS, DIM = 2, 2, 4


def draw(seed, n, batch=BATCH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, HEADS, n, DIM, generator=generator).unbind(0)


class Twin:
    """A layer, and what it should hold, kept by concatenation."""

    def __init__(self, n=7):
        self.layer = PrunedLayer()
        self.keys, self.values = draw(0, n)
        self.layer.expect(Slots(torch.arange(n).expand(BATCH, 1, n)), n)
        self.layer.update(self.keys.clone(), self.values.clone())
        self.index = torch.arange(n).expand(BATCH, 1, n)
        self.seed, self.length = 1, n

    def step(self, n=1):
        new = draw(self.seed, n, self.keys.shape[0])
        self.seed += 1
        got = self.layer.update(*(x.clone() for x in new))
        self.keys, self.values = torch.cat([self.keys, new[0]], 2), torch.cat([self.values, new[1]], 2)
        at = torch.arange(self.length, self.length + n).expand(*self.index.shape[:2], n)
        self.index, self.length = torch.cat([self.index, at], 2), self.length + n
        assert torch.equal(got[0], self.keys) and torch.equal(got[1], self.values)
        self.check()

    def check(self):
        assert torch.equal(self.layer.keys, self.keys) and torch.equal(self.layer.values, self.values)
        assert torch.equal(self.layer.dense()[0], self.keys)
        assert torch.equal(self.layer.slots.index.expand_as(self.index).long(), self.index)
        assert self.layer.get_seq_length() == self.length
        query = torch.randn(self.keys.shape[0], 2 * HEADS, 1, DIM, generator=torch.Generator().manual_seed(self.seed))
        keys, values = (x.repeat_interleave(2, 1) for x in (self.keys, self.values))
        want = (query @ keys.mT * 0.5).softmax(-1) @ values
        assert torch.allclose(self.layer.attend(query, 0.5), want, atol=1e-5)

    def reorder(self):
        at = torch.tensor([1, 1])[: self.keys.shape[0]].repeat(self.keys.shape[0] // BATCH)
        self.layer.reorder_cache(at)
        self._select(at)

    def repeat(self):
        if self.keys.shape[0] > BATCH:
            self.select()
        self.layer.batch_repeat_interleave(2)
        self._select(torch.arange(BATCH).repeat_interleave(2))

    def select(self):
        self.layer.batch_select_indices(torch.tensor([1, 0]))
        self._select(torch.tensor([1, 0]))

    def _select(self, at):
        self.keys, self.values, self.index = self.keys[at], self.values[at], self.index[at]

    def crop(self):
        self.layer.crop(-2)
        self.keys, self.values, self.index = self.keys[:, :, :-2], self.values[:, :, :-2], self.index[:, :, :-2]
        self.length -= 2

    def evict(self):
        keep = torch.arange(self.keys.shape[2]) != 2
        self.layer.reduce(Reduction.select(keep.expand(self.keys.shape[0], -1)))
        self.keys, self.values, self.index = self.keys[:, :, keep], self.values[:, :, keep], self.index[:, :, keep]

    def copied(self):
        other = copy.deepcopy(self.layer)
        # the copy and the original go on apart
        self.layer.update(*(x.clone() for x in draw(99, 1, self.keys.shape[0])))
        self.layer = other

    def several(self):
        self.step(3)


ACTIONS = ("reorder", "repeat", "select", "crop", "evict", "copied", "several")


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from(ACTIONS)), min_size=1, max_size=6))
@torch.no_grad()
def test_like_concatenation(plan):
    twin = Twin()
    for steps, action in plan:
        for _ in range(steps):
            twin.step()
        getattr(twin, action)()
        twin.check()
        twin.step()
        assert twin.layer.nbytes == held_bytes(twin.layer)


@torch.no_grad()
def test_a_step_copies_only_now_and_then():
    twin, places = Twin(), set()
    for _ in range(2 * ROOM):
        twin.step()
        places.add(twin.layer.keys.data_ptr())
    assert len(places) == 2


@torch.no_grad()
def test_room_grows_with_the_cache():
    twin = Twin(n=40 * ROOM)
    twin.step()
    assert twin.layer._room.keys.shape[2] == 40 * ROOM + 40


def test_leaving_and_entering_inference_mode():
    twin = Twin()
    with torch.inference_mode():
        for _ in range(3):
            twin.step()
    with torch.no_grad():
        for _ in range(3):
            twin.step()
    with torch.inference_mode():
        for _ in range(3):
            twin.step()


def test_a_gradient_goes_through_steps():
    twin = Twin()
    with torch.no_grad():
        for _ in range(2):
            twin.step()
        before = twin.layer.keys
        held = before.clone()
    new = [x.clone().requires_grad_() for x in draw(5, 1)]
    keys, values = twin.layer.update(*new)
    (keys.sum() + 2 * values.sum()).backward()
    assert (new[0].grad == 1).all() and (new[1].grad == 2).all()
    assert torch.equal(keys[:, :, :-1], held) and torch.equal(before, held)


def test_gradients_of_several_steps():
    """What a step has read must be there as it was when its gradient is worked out."""
    twin, query, loss = Twin(), torch.ones(DIM, 1, requires_grad=True), 0.0
    with torch.no_grad():
        twin.step()
    for t in range(3):
        keys, values = twin.layer.update(*draw(20 + t, 1))
        loss = loss + (keys @ query * values).sum()
    loss.backward()
    assert query.grad.isfinite().all()


@torch.no_grad()
def test_keys_that_somebody_has_put_in_are_kept():
    twin = Twin()
    twin.step()
    layer, other = twin.layer, twin.layer._room.keys.clone().neg_()
    layer.keys = other[:, :, : twin.keys.shape[2]]  # as it was in every way but the memory
    new = draw(5, 1)
    keys, _ = layer.update(*new)
    assert torch.equal(keys, torch.cat([-twin.keys, new[0]], 2))


@torch.no_grad()
def test_copies_go_on_apart():
    twin = Twin()
    twin.step()
    other = copy.deepcopy(twin.layer)
    twin.step()
    new = draw(77, 1)
    keys, _ = other.update(*new)
    assert torch.equal(keys, torch.cat([twin.keys[:, :, :-1], new[0]], 2))
    twin.check()


@torch.no_grad()
@pytest.mark.parametrize("prop_attn", [False, True])
def test_the_bias_follows_sizes_and_padding(prop_attn):
    layer, (keys, values) = PrunedLayer(), draw(0, 4)
    size = torch.tensor([[[0, 1, 3, 1]], [[1, 2, 1, 1]]])
    layer.expect(Slots(torch.arange(4).expand(2, 1, 4), size, prop_attn), 4)
    layer.update(keys.clone(), values.clone())
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, :2] = True
    query = torch.randn(2, 2, 1, DIM)
    for step in range(2):
        layer.announce_attend(padding[:, : 5 + step])
        new = draw(1 + step, 1)
        layer.update(*(x.clone() for x in new))
        keys, values = torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2)
        bias = torch.nn.functional.pad(size.float(), (0, step + 1), value=1.0)
        hidden = (bias == 0) | torch.nn.functional.pad(padding[:, :4], (0, step + 1))[:, None]
        bias = bias.clamp(min=1).log() if prop_attn else torch.zeros_like(bias)
        logits = query @ keys.mT * 0.5 + bias.masked_fill(hidden, -torch.inf)[:, :, None]
        assert torch.allclose(layer.attend(query, 0.5), logits.softmax(-1) @ values, atol=1e-5)


@torch.no_grad()
def test_bytes_are_those_of_every_tensor():
    twin = Twin()
    assert twin.layer.nbytes == held_bytes(twin.layer)
    twin.layer.notes["score"] = torch.zeros(2, 2, 7)
    for _ in range(3):
        twin.step()
        assert twin.layer.nbytes == held_bytes(twin.layer)
    assert twin.layer.nbytes > 2 * twin.keys.nbytes
