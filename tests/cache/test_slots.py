"""What entries stand for: appending, taking, mapping, defaults, bytes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmaccel.cache.slots import TEXT, Slots, extend

FIELDS = ("size", "calibrated", "modality")
DEFAULTS = {"size": 1, "calibrated": False, "modality": TEXT}


def make(seed, batch, groups, m, known, start=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(top):
        return torch.randint(0, top, (batch, groups, m), generator=generator)

    values = {
        "size": draw(4).int(),
        "calibrated": draw(2).bool(),
        "modality": draw(4).to(torch.int8),
    }
    index = start + torch.arange(m).expand(batch, groups, m) * 2
    return Slots(index.int().clone(), **{name: values[name] for name in known})


def written_out(slots, name, heads):
    x = getattr(slots, name)
    x = torch.full_like(slots.index, DEFAULTS[name]) if x is None else x
    return x.long().expand(-1, heads, -1)


known = st.sets(st.sampled_from(FIELDS))


@given(known, known, st.sampled_from([1, 3]), st.sampled_from([1, 3]), st.integers(1, 2), st.integers(0, 4))
def test_append_is_one_behind_the_other(mine, others, first_heads, then_heads, batch, m):
    a, b = make(1, batch, first_heads, 5, mine), make(2, batch, then_heads, m, others, start=9)
    both = a.append(b)
    heads = max(first_heads, then_heads)
    assert both.index.shape == (batch, heads, 5 + m)
    for name in ("index", *FIELDS):
        if name != "index" and name not in mine | others:
            assert getattr(both, name) is None
            continue
        write = written_out if name != "index" else lambda s, _, h: s.index.long().expand(-1, h, -1)
        want = torch.cat([write(a, name, heads), write(b, name, heads)], 2)
        assert torch.equal(write(both, name, heads), want)


def test_append_takes_the_newer_shift_and_keeps_a_weighing():
    a = Slots(torch.zeros(2, 1, 1), prop_attn=True, removed=torch.tensor([[1], [2]]))
    assert a.append(Slots(torch.ones(2, 1, 1))).removed.tolist() == [[1], [2]]
    both = a.append(Slots(torch.ones(2, 1, 1), removed=torch.tensor([[5], [6]])))
    assert both.removed.tolist() == [[5], [6]] and both.prop_attn


@given(known, st.sampled_from([1, 3]), st.sampled_from([1, 3]), st.integers(0, 5))
def test_take_picks_for_every_head(names, have, ask, k):
    slots = make(3, 2, have, 6, names)
    generator = torch.Generator().manual_seed(k)
    keep = torch.stack([torch.randperm(6, generator=generator)[:k] for _ in range(2 * ask)]).view(2, ask, k)
    taken, heads = slots.take(keep), max(have, ask)
    assert taken.index.shape == (2, heads, k)
    for name in ("index", *names):
        x, got = getattr(slots, name).expand(-1, heads, -1), getattr(taken, name)
        wide = keep.expand(-1, heads, -1)
        assert got.tolist() == [[[x[b, g, i].item() for i in wide[b, g]] for g in range(heads)] for b in range(2)]


def test_take_leaves_the_shift_of_later_tokens():
    slots = Slots(torch.arange(4)[None, None], removed=torch.tensor([[3]]))
    assert slots.take(torch.tensor([[[1]]])).removed.tolist() == [[3]]


def test_map_goes_along_the_batch_of_everything():
    slots = make(4, 3, 2, 4, FIELDS)
    slots = Slots(slots.index, slots.size, True, torch.tensor([[0], [1], [2]]), slots.calibrated, slots.modality)
    mapped = slots.map(lambda x: x[[2, 0]])
    for name in ("index", "removed", *FIELDS):
        assert torch.equal(getattr(mapped, name), getattr(slots, name)[[2, 0]])
    assert mapped.prop_attn


@given(known, st.sampled_from([1, 2]))
def test_compact_says_the_same_in_fewer_bytes(names, groups):
    slots = make(5, 2, groups, 4, names)
    wide = Slots(slots.index.long(), None if slots.size is None else slots.size.long(), modality=slots.modality)
    small = wide.compact
    assert torch.equal(small.index, slots.index) and torch.equal(small.sizes, wide.sizes)
    assert small.nbytes == 2 * groups * 4 * (4 + 4 * ("size" in names) + ("modality" in names))
    assert wide.nbytes == 2 * groups * 4 * (8 + 8 * ("size" in names) + ("modality" in names))


def test_extend_is_dense_text():
    new = extend(None, 3, 2, 2, torch.device("cpu"))
    assert new.index.tolist() == [[[3, 4]]] * 2
    more = extend(make(6, 2, 3, 2, ("modality", "size")), 7, 1, 2, torch.device("cpu"))
    assert more.index[:, :, -1].tolist() == [[7] * 3] * 2
    assert (more.modality[:, :, -1] == TEXT).all() and (more.size[:, :, -1] == 1).all()
