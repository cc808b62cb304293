import random

import pytest
import torch
from torch import nn

import vlmaccel.evals.easy_vqa as data
from vlmaccel.training import demo_stages
from vlmaccel.training.demo_stages import cell_of


def test_patch_labels_mark_the_objects():
    collage = data.make_collage("train", random.Random(0))
    shapes, colors = demo_stages.patch_labels(collage)
    for cell in range(data.CELLS):
        inside = cell == cell_of(24)
        found_colors = set(colors[inside].tolist()) - {len(data.COLORS)}
        found_shapes = set(shapes[inside].tolist()) - {len(data.SHAPES)}
        if cell in collage.objects:
            color, shape = collage.objects[cell]
            assert found_colors == {data.COLORS.index(color)}
            assert found_shapes == {data.SHAPES.index(shape)}
        else:
            assert not found_colors
            assert not found_shapes


@pytest.mark.parametrize("side", [24, 12])
def test_some_tokens_cover_every_object(side):
    collage = data.make_collage("train", random.Random(0))
    generator = torch.Generator().manual_seed(0)
    kept = demo_stages.some_tokens(collage, side, per_object=2, background=3, limit=40, generator=generator)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == 2 * len(collage.objects) + 3
    assert set(cell_of(side)[kept].tolist()) >= set(collage.objects)


def test_fit_warms_up_holds_and_falls():
    rates = []
    weight = nn.Parameter(torch.zeros(1))

    def loss(progress):
        rates.append(optimizers[0].param_groups[0]["lr"])
        return (weight * 0).sum(), {"progress": [progress]}

    optimizers = []
    adamw = torch.optim.AdamW

    def watched(*args, **kwargs):
        optimizers.append(adamw(*args, **kwargs))
        return optimizers[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", watched)
        demo_stages.fit("test", [weight], loss, steps=200, peak_rate=1.0, hold=0.5)
    assert rates[0] == pytest.approx(1 / demo_stages.WARM_UP, abs=1e-5)
    assert rates[60:101] == pytest.approx([1.0] * 41, abs=1e-5)
    assert rates[101:] == sorted(rates[101:], reverse=True) and rates[-1] < 0.01


def test_initialise_keeps_the_variance():
    layer = nn.Linear(400, 400)
    model = nn.ModuleDict({"fc1": layer, "fc2": nn.Linear(400, 400)})
    torch.manual_seed(0)
    demo_stages.initialise(model)
    x = torch.randn(200, 400)
    assert (x @ model["fc1"].weight.T).std().item() == pytest.approx(1, rel=0.05)
    assert (x @ model["fc2"].weight.T).std().item() == pytest.approx(0.3, rel=0.05)
