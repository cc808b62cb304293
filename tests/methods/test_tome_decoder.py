"""Merging neighbours in a decoder, against a slow and obvious search."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vlmaccel
from tests.support.models import build, inputs
from vlmaccel.methods import ToMeDecoder
from vlmaccel.methods.selection import representatives
from vlmaccel.methods.tome_decoder import merge_down


def by_search(metric, size, place, view, kept):
    """Groups as sets: every other one looks among the others for the likest near it, the best matched join first."""
    groups = {i: [i] for i in range(len(metric))}
    total = {i: (metric[i] * size[i]).double() for i in groups}
    reach = 1
    while len(groups) > kept:
        left = sorted(groups)
        found = []
        for a in left[::2]:
            near = [
                b
                for b in left[1::2]
                if view[a] == view[b] and max(abs(place[a][0] - place[b][0]), abs(place[a][1] - place[b][1])) <= reach
            ]
            if near or reach >= 2**20:
                near = near or left[1::2]
                cosine = [float(torch.cosine_similarity(total[a], total[b], dim=0)) for b in near]
                found.append((-max(cosine), a, near[cosine.index(max(cosine))]))
        for _, a, b in sorted(found)[: len(groups) - kept]:
            groups[b] += groups.pop(a)
            total[b] = total[b] + total.pop(a)
        reach *= 2
    return sorted(sorted(g) for g in groups.values())


@given(st.integers(1, 5), st.integers(1, 6), st.floats(0.05, 1), st.integers(1, 2))
def test_groups_are_those_of_a_search(height, width, ratio, views):
    generator = torch.Generator().manual_seed(height + 10 * width)
    n = height * width * views
    metric = torch.randn(n, 4, generator=generator)
    size = torch.randint(1, 4, (n,), generator=generator)
    index = torch.arange(n)
    place = torch.stack([index % (height * width) // width, index % width], 1)
    view = index // (height * width)
    kept = max(1, int(n * ratio))
    label = merge_down(metric, size, place, view, kept)
    got = sorted([i for i in range(n) if label[i] == x] for x in label.unique())
    assert len(got) == kept
    assert got == by_search(metric, size, place.tolist(), view.tolist(), kept)


@pytest.mark.parametrize("position", ["median", "first"])
def test_where_a_group_stands(position):
    label = torch.tensor([5, 2, 5, 5, 2, 9, 5])
    stands = {"median": [3, 4, 3, 3, 4, 5, 3], "first": [0, 1, 0, 0, 1, 5, 0]}
    assert representatives(label, position).tolist() == stands[position]


@torch.no_grad()
def test_only_tokens_of_one_picture_merge():
    kind = "llava-clip-llama"
    model, batch = build(kind), inputs(kind, 3, pad=True)
    with vlmaccel.patched(model, ToMeDecoder(layer=1, ratio=0.3)):
        model(**batch)
        stats = vlmaccel.stats(model)
    stage, tokens = stats.stages[0], stats.token_map
    assert (stage.size > 1).any()
    for group, image in zip(stage.group, tokens.image, strict=True):
        for slot in group[group >= 0].unique():
            assert image[group == slot].unique().numel() == 1


@torch.no_grad()
def test_looks_at_keys_without_positions():
    """The same picture tokens further back in the prompt are merged the same."""
    model = build("llama")
    ids = torch.randint(2, 100, (1, 24), generator=torch.Generator().manual_seed(0))
    found = []
    for shift in (0, 7):
        method = ToMeDecoder(layer=0, ratio=0.5, target="text")
        with vlmaccel.patched(model, method):
            positions = torch.arange(24)[None] + shift
            model(input_ids=ids, position_ids=positions)
            found.append(vlmaccel.stats(model).stages[0].group)
    assert torch.equal(*found)
