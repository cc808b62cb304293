"""Merging in every kind of vision transformer, against the same model over duplicates of the merged tokens."""

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
from torch import nn

import vlmaccel
from tests.support.vits import DEPTH, KINDS, PATCH, PATCHES, PREFIX, ROPE, SIDE, build, outputs, pictures
from vlmaccel.adapters.base import find_adapter
from vlmaccel.kernels.bipartite_match import reference as match_by_hand
from vlmaccel.methods import FastV, ToMe

every_kind = pytest.mark.parametrize("kind", KINDS)
SOME = (
    "timm-siglip",
    "timm-deit-distilled",
    "timm-eva02",
    "hf-dinov2-registers",
    "hf-clip",
    "open-clip",
    "open-clip-custom",
)


def over_duplicates(model, pixels, stages):
    """Outputs of an unpatched model in which every token of a group has the group's mean: a key of size s is then s keys.

    Returns them with the metric of every block (B, N, head_dim).
    """
    parts = find_adapter(model).vision(model)
    groups = {stage.layer: stage for stage in stages}
    now, metrics, handles = [], {}, []

    def mean(i, module, args):
        if i in groups:
            group = groups[i].group
            member = (group[:, :, None] == group[:, None, :]).to(args[0])
            args[0].copy_(member @ args[0] / member.sum(-1, keepdim=True))
            now.append(groups[i])

    def rope(module, args, kwargs):
        if kwargs.get("rope") is None or not now:
            return None
        stands = now[-1].keep.gather(1, now[-1].group)[:, parts.prefix :] - parts.prefix
        table = kwargs["rope"] if kwargs["rope"].ndim == 3 else kwargs["rope"][None]
        return args, {**kwargs, "rope": torch.stack([table[:, index] for index in stands])}

    def keys(i, metric, module, args, output):
        metrics[i] = metric(output.detach())

    for i, part in enumerate(parts.blocks):
        handles += [
            part.block.register_forward_pre_hook(rope, with_kwargs=True),
            part.norm.register_forward_pre_hook(partial(mean, i)),
            part.keys.register_forward_hook(partial(keys, i, part.metric)),
        ]
    try:
        return outputs(model, pixels), metrics
    finally:
        for handle in handles:
            handle.remove()


@every_kind
@torch.no_grad()
def test_r_zero_is_bit_identical(kind):
    model, pixels = build(kind), pictures()
    before = outputs(model, pixels)
    for method in (ToMe(r=0), ToMe(r=-3), ToMe(r=[0, 0]), ToMe(keep=1.0), ToMe(speedup=1)):
        with vlmaccel.patched(model, method):
            assert torch.equal(outputs(model, pixels), before)
            assert vlmaccel.stats(model).tokens == [PATCHES + PREFIX.get(kind, 1)] * (DEPTH + 1)
    assert torch.equal(outputs(model, pixels), before)


@every_kind
@pytest.mark.parametrize("r", [5, (9, -1), [0, 100, 3]], ids=str)
@torch.no_grad()
def test_a_merged_token_is_its_duplicates(kind, r):
    model, pixels = build(kind).double(), pictures(3).double()
    plain = outputs(model, pixels)
    with vlmaccel.patched(model, ToMe(r=r, prop_attn=True)):
        got, stats = outputs(model, pixels), vlmaccel.stats(model)
    want, metrics = over_duplicates(model, pixels, stats.stages)
    assert torch.allclose(got, want, atol=1e-11, rtol=1e-11)
    assert (got - plain).abs().max() > 1e-2
    prefix, n = PREFIX.get(kind, 1), PATCHES + PREFIX.get(kind, 1)
    assert stats.prefix == prefix
    keep, group = torch.arange(n).repeat(3, 1), torch.arange(n).repeat(3, 1)
    counts = ToMe(r=r).counts(vlmaccel.hooks.Tower(DEPTH, n, prefix, None))
    for stage in stats.stages:  # the published matching, over the keys of the merged tokens
        left = torch.stack([m[index] for m, index in zip(metrics[stage.layer], keep, strict=True)])
        chosen, joined = match_by_hand(left, counts[stage.layer], prefix)
        keep, group = keep.gather(1, chosen), joined.gather(1, group)
        assert torch.equal(stage.keep, keep)
        assert torch.equal(stage.group, group)


@every_kind
@torch.no_grad()
def test_sizes_sum_to_all_tokens_and_groups_partition_them(kind):
    model, prefix = build(kind), PREFIX.get(kind, 1)
    with vlmaccel.patched(model, ToMe(r=11)):
        outputs(model, pictures())
        stats = vlmaccel.stats(model)
    assert [stage.layer for stage in stats.stages] == list(range(DEPTH))
    for stage, n in zip(stats.stages, stats.tokens[1:], strict=True):
        assert (stage.size.sum(1) == PATCHES + prefix).all()
        for size, group in zip(stage.size, stage.group, strict=True):
            assert group.bincount(minlength=n).tolist() == size.tolist()
            assert size.min() >= 1
            assert group[:prefix].tolist() == list(range(prefix))  # class, distillation, registers: alone, in front
            assert (size[:prefix] == 1).all()


@every_kind
@torch.no_grad()
def test_a_batch_is_its_pictures_alone(kind):
    model, pixels = build(kind).double(), pictures(4).double()
    with vlmaccel.patched(model, ToMe(r=9)):
        whole = outputs(model, pixels)
        for b in range(4):
            assert torch.allclose(outputs(model, pixels[b : b + 1]), whole[b : b + 1], atol=1e-10)
        order = [2, 0, 3, 1]
        assert torch.allclose(outputs(model, pixels[order]), whole[order], atol=1e-10)


@every_kind
def test_training_and_inference_agree(kind):
    model, pixels = build(kind), pictures()
    with vlmaccel.patched(model, ToMe(r=9)):
        trained = outputs(model, pixels)
        with torch.no_grad():
            assert torch.allclose(outputs(model, pixels), trained, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["timm-class", *SOME])
def test_gradients_are_those_of_the_model_over_duplicates(kind):
    model, pixels = build(kind).double(), pictures().double()
    weight = torch.randn(outputs(model, pixels).shape, generator=torch.Generator().manual_seed(0)).double()

    def gradients(run):
        model.zero_grad()
        (run() * weight).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with vlmaccel.patched(model, ToMe(r=9)):
        got = gradients(lambda: outputs(model, pixels))
        stages = vlmaccel.stats(model).stages
    want = gradients(lambda: over_duplicates(model, pixels, stages)[0])
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert torch.allclose(got[name], gradient, atol=1e-9, rtol=1e-9), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["timm-class", "timm-eva", *SOME])
@torch.no_grad()
def test_half_precision_is_near_float32(kind, dtype):
    model, pixels = build(kind), pictures()
    with vlmaccel.patched(model, ToMe(r=[6])):  # one merge: rounding may turn later choices
        want = outputs(model, pixels)
        group = vlmaccel.stats(model).stages[0].group
        got = outputs(model.to(dtype), pixels.to(dtype))
        assert got.dtype == dtype
        same = (vlmaccel.stats(model).stages[0].group == group).all(1)
    assert got.isfinite().all()
    error = (got.float() - want).abs()
    assert error[same].max() <= (0.08 if dtype == torch.bfloat16 else 0.01) * want.abs().max() if same.any() else True
    assert error.mean() < 0.1 * want.abs().mean()


def logits_of(out):
    return getattr(out, "logits", None) if hasattr(out, "logits") else getattr(out, "pooler_output", out)


@pytest.mark.parametrize(
    "kind",
    [
        "timm-class",
        "hf-siglip",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("timm-siglip", "timm-eva02", "hf-vit", "open-clip")),
    ],
)
@torch.no_grad()
def test_compiles_into_one_graph(kind):
    model, pixels = build(kind), pictures()
    with vlmaccel.patched(model, ToMe(speedup=1.4)):
        want = logits_of(model(pixels))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.allclose(logits_of(compiled(pixels)), want, atol=1e-5)
        tokens = vlmaccel.stats(model).tokens
        assert tokens[-1] < tokens[0]
        assert torch.allclose(logits_of(compiled(pixels.flip(0))), want.flip(0), atol=1e-5)
    plain = logits_of(torch.compile(model, backend="eager")(pixels))  # unpatching is seen by compiled code
    assert torch.allclose(plain, logits_of(model(pixels)), atol=1e-5)
    assert not torch.allclose(plain, want, atol=1e-2)


@pytest.mark.parametrize("strict", [True, False])
@torch.no_grad()
def test_exports_or_says_why_not(strict):
    model, pixels = build("timm-class"), pictures()
    with vlmaccel.patched(model, ToMe(r=5)):
        exported = torch.export.export(model, (pixels,), strict=strict).module()
        assert torch.allclose(exported(pixels), model(pixels), atol=1e-5)
    model = build("hf-vit")
    with vlmaccel.patched(model, ToMe(r=5)), pytest.raises(Exception, match="torch.export makes one for this model"):
        torch.export.export(model, (pixels,), strict=strict)
    assert model(pixels).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["timm-class", "timm-registers", "timm-eva02", "timm-no-class"])
@torch.no_grad()
def test_feature_maps_have_every_patch(kind):
    """Blocks whose outputs are looked at give all patches, each with the value of its group."""
    model, pixels = build(kind).double(), pictures().double()
    side = SIDE // PATCH
    with vlmaccel.patched(model, ToMe(r=9)):
        final = model.forward_features(pixels)
        last, maps = model.forward_intermediates(pixels, indices=[0, 2, DEPTH - 1])
        stages = vlmaccel.stats(model).stages
        logits = model(pixels)
    assert [tuple(m.shape) for m in maps] == [(2, 32, side, side)] * 3
    assert torch.allclose(last, final)
    assert torch.allclose(model.forward_head(final), logits)
    for stage, feature in zip([stages[i] for i in (0, 2, DEPTH - 1)], maps, strict=True):
        patches = feature.flatten(2).mT
        group = stage.group[:, PREFIX.get(kind, 1) :]
        equal = (patches[:, :, None] == patches[:, None]).all(-1)
        assert torch.equal(equal, group[:, :, None] == group[:, None])


@pytest.mark.parametrize("kind", ["timm-class", "timm-eva02", "timm-no-class"])
@torch.no_grad()
def test_patches_are_put_back_for_whoever_looks(kind):
    """A head that reads the class token only needs no patches; a hook on the norm before it does."""
    model, pixels = build(kind).double(), pictures().double()
    seen = []
    with vlmaccel.patched(model, ToMe(r=9)):
        logits = model(pixels)
        with model.norm.register_forward_hook(lambda module, args, output: seen.append(output)):
            watched = model(pixels)
        final = model.forward_features(pixels)
        model.reset_classifier(5, global_pool="avg")
        averaged = model(pixels)
        assert torch.allclose(averaged, model.forward_head(model.forward_features(pixels)))
    assert torch.allclose(logits, watched) and torch.allclose(seen[0], final)


@pytest.mark.parametrize("kind", ["hf-vit", "hf-dinov2", "hf-clip", "hf-siglip"])
@torch.no_grad()
def test_hidden_states_have_every_patch(kind):
    model, pixels = build(kind), pictures()
    with vlmaccel.patched(model, ToMe(r=9)):
        for _ in range(2):  # the second time transformers' own hooks are there already
            states = model(pixels, output_hidden_states=True).hidden_states
            assert {s.shape[1] for s in states} == {PATCHES + PREFIX.get(kind, 1)}
        group = vlmaccel.stats(model).stages[1].group
    equal = (states[2][:, :, None] == states[2][:, None]).all(-1)
    assert torch.equal(equal, group[:, :, None] == group[:, None])


@torch.no_grad()
def test_other_picture_sizes():
    model, pixels = build("timm-dynamic").double(), pictures(2, 32, 48).double()
    with vlmaccel.patched(model, ToMe(keep=0.5)):
        got, stats = model(pixels), vlmaccel.stats(model)
        assert stats.image == (32, 48)
        assert stats.tokens[-1] == 1 + 8 * 12 // 2
        model(pictures(1).double())
        assert vlmaccel.stats(model).tokens[-1] == 1 + PATCHES // 2
    want, _ = over_duplicates(model, pixels, stats.stages)
    assert torch.allclose(got, want, atol=1e-11)


@pytest.mark.parametrize("kind", ["timm-class", "timm-eva02"])
def test_patch_dropout_in_training(kind):
    from timm.layers import PatchDropout, PatchDropoutWithIndices

    model = build(kind).train()
    model.patch_drop = (PatchDropoutWithIndices if kind in ROPE else PatchDropout)(0.5, num_prefix_tokens=1)
    with vlmaccel.patched(model, ToMe(r=3)):
        model(pictures()).sum().backward()
        assert vlmaccel.stats(model).tokens == [33, 30, 27, 24, 21]
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["timm-class", "timm-eva02", "hf-vit", "hf-dinov2", "hf-clip", "open-clip"])
def test_gradient_checkpointing_changes_no_gradient(kind):
    """Of two passes, whose gradients are worked out together, and twice."""
    model = build(kind).double().train()
    enable = {"hf": "gradient_checkpointing_enable"}.get(kind.split("-")[0], "set_grad_checkpointing")
    first, second = pictures(2).double(), pictures(3).double().flip(-1)
    weight = torch.randn(outputs(model, first).shape, generator=torch.Generator().manual_seed(1)).double()

    def gradients():
        model.zero_grad(set_to_none=True)
        loss = (outputs(model, first) * weight).sum() + outputs(model, second).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    with vlmaccel.patched(model, ToMe(r=5)):
        plain = gradients()
        getattr(model, enable)()
        again = gradients()
        with torch.no_grad():
            model(first)
        assert vlmaccel.stats(model).tokens[-1] < vlmaccel.stats(model).tokens[0]
    assert plain.keys() == again.keys() and len(plain) > 10
    for name, gradient in plain.items():
        assert torch.allclose(again[name], gradient, rtol=1e-9, atol=1e-9), name


def test_a_tower_that_is_checkpointed_as_a_whole():
    model, pixels = build("timm-class").double().train(), pictures().double()

    def gradients(call):
        model.zero_grad(set_to_none=True)
        call().square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    with vlmaccel.patched(model, ToMe(r=5)):
        plain = gradients(lambda: model(pixels))
        again = gradients(lambda: torch.utils.checkpoint.checkpoint(model, pixels, use_reentrant=False))
    assert len(plain) == len(again)
    assert all(torch.allclose(*pair, rtol=1e-9, atol=1e-9) for pair in zip(plain, again, strict=True))


def test_reentrant_checkpointing_of_whole_blocks_is_refused():
    from timm.layers import set_reentrant_ckpt

    model = build("timm-class").train()
    model.set_grad_checkpointing()
    pixels = pictures().requires_grad_()
    set_reentrant_ckpt(True)
    try:
        with vlmaccel.patched(model, ToMe(r=3)), pytest.raises(RuntimeError, match="use_reentrant=False"):
            model(pixels)
    finally:
        set_reentrant_ckpt(False)
    model(pixels).sum().backward()


@torch.no_grad()
def test_a_mask_of_the_callers_own_is_refused():
    model = build("timm-class")
    with vlmaccel.patched(model, ToMe(r=3)):
        with pytest.raises(NotImplementedError, match="attention mask"):
            model(pictures(), attn_mask=torch.zeros(65, 65))
        model(pictures())  # and works on


def test_targets_that_cannot_be_met_say_what_can():
    model = build("timm-class")
    with vlmaccel.patched(model, ToMe(speedup=50)), pytest.raises(ValueError, match="at most 2"):
        model(pictures())
    with vlmaccel.patched(model, ToMe(keep=0.01, schedule=-1)), pytest.raises(ValueError, match="the least is"):
        model(pictures())
    assert model(pictures()).isfinite().all()


def test_models_and_methods_that_do_not_fit():
    model = build("timm-class")
    with pytest.raises(NotImplementedError, match="decoder_layer.*timm-vit"):
        vlmaccel.patch(model, FastV())
    with pytest.raises(NotImplementedError, match="visual_tokens.*timm-vit"):
        vlmaccel.patch(model, ToMe(after="carry"))
    import timm

    for name in ("vit_small_patch16_18x2_224", "vit_base_patch16_rpn_224"):
        with pytest.raises(NotImplementedError, match="cannot be merged in"):
            vlmaccel.patch(timm.create_model(name, depth=2) if "18x2" in name else _post_norm(), ToMe(r=1))
    with pytest.raises(NotImplementedError, match="several vision towers"):
        vlmaccel.patch(nn.ModuleList([build("timm-class"), build("timm-class")]))
    assert not hasattr(model, "_vlmaccel")


def _post_norm():
    from timm.models.vision_transformer import ResPostBlock, VisionTransformer

    return VisionTransformer(img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=4, block_fn=ResPostBlock)


@pytest.mark.parametrize("kind", ["timm-class", "hf-clip", "open-clip-model"])
@torch.no_grad()
def test_survives_copies_and_threads(kind):
    model, pixels = vlmaccel.patch(build(kind), "tome", r=9), pictures()
    want = outputs(model, pixels)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        vlmaccel.stats(model)
        assert torch.equal(outputs(twin, pixels), want)
        assert vlmaccel.stats(twin).tokens == vlmaccel.stats(model).tokens
        vlmaccel.unpatch(twin)
        assert torch.equal(outputs(model, pixels), want)
    found = {}

    def work(name, batch):
        with torch.no_grad():
            found[name] = [outputs(model, batch) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(b, pixels[b : b + 1])) for b in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for b in range(2):
        assert all(torch.allclose(out, want[b : b + 1], atol=1e-5) for out in found[b])


def test_the_default_of_a_vit_is_tome():
    model = build("hf-vit")
    with vlmaccel.patched(model), torch.no_grad():
        model(pictures())
        stats = vlmaccel.stats(model)
    assert 1.5 <= stats.flops_full / stats.flops < 1.6
    assert "ToMe" in str(stats)


@pytest.mark.parametrize("kind", ["timm-mae", "hf-mae"])
@torch.no_grad()
def test_mae_weights_go_without_proportional_attention(kind):
    model, pixels = build("timm-mae" if kind == "timm-mae" else "hf-vit"), pictures()
    if kind == "hf-mae":
        model.config.architectures = ["ViTMAEForPreTraining"]
    found = {}
    for prop_attn in (None, True, False):
        with vlmaccel.patched(model, ToMe(r=9, prop_attn=prop_attn)):
            found[prop_attn] = outputs(model, pixels)
    assert torch.equal(found[None], found[False])
    assert not torch.equal(found[None], found[True])


@torch.no_grad()
def test_a_tower_of_timm_inside_open_clip():
    import open_clip

    torch.manual_seed(0)
    vision = dict(timm_model_name="vit_tiny_patch16_224", timm_model_pretrained=False, image_size=224)
    text = dict(context_length=8, vocab_size=64, width=32, heads=4, layers=1)
    model, pixels = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval(), pictures(1, 224, 224)
    before = outputs(model, pixels)
    assert find_adapter(model).name == "timm-vit"
    with vlmaccel.patched(model, ToMe(r=0)):
        assert torch.equal(outputs(model, pixels), before)
    with vlmaccel.patched(model, ToMe(keep=0.25)):
        assert (outputs(model, pixels) - before).abs().max() > 1e-4
        assert vlmaccel.stats(model).tokens[-1] == 1 + 196 // 4
