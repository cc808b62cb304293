"""Registers behind pictures, pooled and learned: against rows put in by hand, in batches, over caches, in training; files."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import vlmaccel
from tests.methods.test_properties import alone
from tests.support.drops import GREEDY, STEPS, answer_tokens, decode, go_on, turns, with_answer
from tests.support.models import DEPTH, IMAGE, PAD, QWEN, build, inputs, picture_tokens
from tests.support.reference import Reference
from tests.support.registers import assert_same, pictures_of, register_logits
from vlmaccel.hooks import Method
from vlmaccel.methods import (
    AttentionSum,
    DivPrune,
    FastV,
    MixedPrecisionKV,
    NeighbourCosine,
    Pool,
    PyramidDrop,
    Registers,
    SnapKV,
    ToMeDecoder,
    Uniform,
    Victor,
    VLCache,
    ZipVL,
)
from vlmaccel.methods.registers import stretches
from vlmaccel.methods.victor import load_registers, save_registers
from vlmaccel.run import Modality

VLM, WIDTH, LAYER = "llava-clip-llama", 32, 2
LEARNED = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(21))
VICTOR = Victor(LEARNED, layer=LAYER)
METHODS = {
    "victor": VICTOR,
    "registers": Registers(4, layer=LAYER),
    "registers-attention": Registers(4, layer=LAYER, pooling="attention"),
    "registers-before-the-decoder": Registers(4, layer=0),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def lengths_of(kind, b, video=False):
    """Tokens of the pictures of sample b, in order."""
    if kind in QWEN:
        grids = {0: [6, 4, 2], 1: [], 2: [12, 4] if video else [12]}
        return grids[b % 3]
    if video and b % 3 == 2:
        return [9]
    sizes = {0: [(24, 32), (20, 20), (40, 20)], 1: [], 2: [(70, 48)]}[b % 3]
    return [picture_tokens(kind, size, len(sizes)) for size in sizes]


def learned_reference(model, kind, batch, later, video=False, ends=()):
    """Reference logits of every sample of a batch and the tokens `later` (B, T) behind it, under `VICTOR`."""
    reference = Reference(model)
    for b, embeds in enumerate(reference.embed(batch)):
        pictures = [(tokens, LEARNED) for tokens in pictures_of(model, batch, b, lengths_of(kind, b, video))]
        yield register_logits(model, reference.followed(embeds, later[b]), pictures, LAYER, ends)


WAYS = ["llava-clip-llama", "llava-siglip-qwen2", "llava-next", "llava-onevision", "qwen2-vl", "qwen3-vl"]


@pytest.mark.parametrize(("kind", "attn", "pad"), turns(WAYS, ("sdpa", "eager"), (True, False)))
@torch.no_grad()
def test_learned_registers_are_rows_put_in_by_hand(kind, attn, pad):
    model, batch, later = build(kind, attn), inputs(kind, 3, pad), answer_tokens(3)
    with vlmaccel.patched(model, VICTOR):
        prompt, steps = decode(model, batch, later)
        said = model.generate(**batch, **GREEDY)
    for b, logits in enumerate(learned_reference(model, kind, batch, later)):
        assert_same(prompt[b, batch["attention_mask"][b].bool()], logits[:-STEPS])
        assert_same(steps[b], logits[-STEPS:])
    new = said.sequences[:, batch["input_ids"].shape[1] :]
    for b, logits in enumerate(learned_reference(model, kind, batch, new[:, :-1])):
        assert_same(torch.stack(said.logits, 1)[b], logits[-STEPS:])


@pytest.mark.parametrize("kind", ["llava-onevision", "qwen2.5-vl", "qwen3-vl"])
@torch.no_grad()
def test_a_video_has_registers_of_its_own(kind):
    model, batch, later = build(kind), inputs(kind, 3, pad=True, video=True), answer_tokens(3)
    with vlmaccel.patched(model, VICTOR):
        _, steps = decode(model, batch, later)
    for b, logits in enumerate(learned_reference(model, kind, batch, later, video=True)):
        assert_same(steps[b], logits[-STEPS:])


def pooled_by_hand(tokens, pooling):
    """Four registers of a picture of 3 x 3 tokens (9, D): the quarters of a 2 x 2 grid."""
    cells = {}
    for i, token in enumerate(tokens):
        cells.setdefault((i // 3 * 2 // 3, i % 3 * 2 // 3), []).append(token)
    means = torch.stack([sum(members) / len(members) for _, members in sorted(cells.items())])
    if pooling == "grid":
        return means
    rows = []
    for mean in means:
        weights = torch.stack([mean @ token for token in tokens]).div(tokens.shape[1] ** 0.5).softmax(0)
        rows.append(sum(w * token for w, token in zip(weights, tokens, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("pooling", ["grid", "attention"])
@pytest.mark.parametrize("layer", [0, 3])
@torch.no_grad()
def test_pooled_registers_are_rows_put_in_by_hand(pooling, layer):
    model, batch, later = build(VLM), inputs(VLM, 3, pad=True), answer_tokens(3)
    with vlmaccel.patched(model, "registers", registers=4, layer=layer, pooling=pooling):
        prompt, steps = decode(model, batch, later)
    reference = Reference(model)
    for b, embeds in enumerate(reference.embed(batch)):
        pictures = [(p, pooled_by_hand(embeds[p], pooling)) for p in pictures_of(model, batch, b, lengths_of(VLM, b))]
        logits = register_logits(model, reference.followed(embeds, later[b]), pictures, layer)
        assert_same(prompt[b, batch["attention_mask"][b].bool()], logits[:-STEPS])
        assert_same(steps[b], logits[-STEPS:])


@torch.no_grad()
def test_a_prompt_that_ends_in_a_picture():
    """The last token is read off even if it is visual and rows come in behind it."""
    model, batch = build(VLM), inputs(VLM)
    end = int((batch["input_ids"][0] == IMAGE).nonzero()[-1]) + 1
    batch = {**batch, **{k: batch[k][:, :end] for k in ("input_ids", "attention_mask")}}
    later = answer_tokens(1)
    with vlmaccel.patched(model, VICTOR):
        _, steps = decode(model, batch, later)
        last = model(**batch, logits_to_keep=1).logits
    (logits,) = learned_reference(model, VLM, batch, later, ends=[end - 1])
    assert_same(steps[0], logits[-STEPS:])
    assert_same(last[0], logits[-STEPS - 1 :][:1])


@every_method
@pytest.mark.parametrize("kind", [VLM, "qwen3-vl"])
@torch.no_grad()
def test_a_batch_is_its_samples_alone(method, kind):
    model, batch, later = build(kind), inputs(kind, 3, pad=True), answer_tokens(3)
    with vlmaccel.patched(model, method):
        together = decode(model, batch, later)[1]
        for b in range(3):
            one = decode(model, alone(batch, b, 9), later[b : b + 1])[1]
            assert torch.allclose(together[b], one[0], atol=3e-5)


@every_method
@torch.no_grad()
def test_padding_on_the_right_is_no_different(method):
    model, batch = build(VLM), inputs(VLM, 3, pad=True)
    real = batch["attention_mask"].bool()
    turned = {**batch, "input_ids": torch.full_like(batch["input_ids"], PAD)}
    turned["attention_mask"] = batch["attention_mask"].flip(1)
    turned["input_ids"][turned["attention_mask"].bool()] = batch["input_ids"][real]
    with vlmaccel.patched(model, method):
        left, right = model(**batch).logits, model(**turned).logits
    for b in range(3):
        n = int(real[b].sum())
        assert torch.allclose(left[b, -1], right[b, n - 1], atol=3e-5)


@every_method
@torch.no_grad()
def test_text_alone_is_unaffected(method):
    model, batch = build(VLM), inputs(VLM, 3, pad=True)
    plain = model(**batch).logits
    with vlmaccel.patched(model, method):
        logits = model(**batch).logits
        text = model(input_ids=torch.arange(5, 20)[None]).logits
    real = batch["attention_mask"][1].bool()
    assert torch.allclose(logits[1, real], plain[1, real], atol=2e-5)
    assert (logits[0, -1] - plain[0, -1]).abs().max() > 1e-3
    assert torch.equal(text, model(input_ids=torch.arange(5, 20)[None]).logits)


@torch.no_grad()
def test_a_picture_of_no_more_tokens_than_registers_stays_as_it_is():
    model, batch = build(VLM), inputs(VLM, 3, pad=True)
    with vlmaccel.patched(model, Registers(9)):
        logits = model(**batch).logits
    assert torch.equal(logits, model(**batch).logits)


@torch.no_grad()
def test_pictures_of_different_sizes_in_a_sample():
    """Of two pictures, the smaller one stays, the larger one is summarised."""
    model, batch = build("qwen2-vl"), inputs("qwen2-vl")  # of 6, 4 and 2 tokens
    with vlmaccel.patched(model, Registers(4, layer=1)):
        model(**batch)
        stats = vlmaccel.stats(model)
    kept = stats.token_map.image[0, stats.stages[-1].keep[0]]
    assert [int((kept == number).sum()) for number in range(3)] == [4, 4, 2]
    assert [stage.layer for stage in stats.stages] == [0, 1]


@torch.no_grad()
def test_late_layers_hold_registers_and_text_only():
    model, batch = build(VLM), inputs(VLM, 3, pad=True)
    with vlmaccel.patched(model, [VICTOR, SnapKV(budget=1.0)]):  # with a method on entries, they know their modality
        cache = model(**batch, use_cache=True).past_key_values
        stats = vlmaccel.stats(model)
    special = batch["input_ids"] == IMAGE
    assert cache.get_seq_length() == batch["input_ids"].shape[1]
    for k, layer in enumerate(cache.layers):
        slots = layer.slots
        real = (slots.sizes > 0)[:, 0] & ~slots.padded(batch["attention_mask"] == 0)[:, 0]
        visual = (real & (slots.modality[:, 0] >= Modality.IMAGE)).sum(1).tolist()
        pictures = [3, 0, 1]
        tokens = [9 * p if k < LAYER else 0 for p in pictures]
        assert visual == [t + len(LEARNED) * p for t, p in zip(tokens, pictures, strict=True)]
        text = real & (slots.modality[:, 0] == Modality.TEXT)
        assert text.sum(1).tolist() == (batch["attention_mask"].bool() & ~special).sum(1).tolist()
    n, m = 9, len(LEARNED)
    mean = (LAYER * (n + m) + (DEPTH - LAYER) * m) / DEPTH  # of a picture: k (N + M) + (L - k) M over L layers
    assert stats.mean_visual_tokens == pytest.approx(mean * 4 / 3)
    assert stats.nominal_visual_tokens == pytest.approx(n * 4 / 3)


@torch.no_grad()
def test_tokens_matter_through_registers_only():
    """Noise on the picture's rows behind the last layer that has them changes nothing."""
    model, batch = build(VLM), inputs(VLM, 3, pad=True)

    def noise(module, args, output):
        visual = rows_of_tokens(output.shape[1])
        return torch.where(visual[..., None], torch.randn_like(output) * 100, output)

    def rows_of_tokens(n):
        stage = seen["stages"][0]
        assert stage.keep.shape[1] == n
        own = stage.group.gather(1, stage.keep) == torch.arange(n)
        return own & (batch["input_ids"].gather(1, stage.keep) == IMAGE)

    with vlmaccel.patched(model, VICTOR):
        logits = model(**batch).logits
        seen = {"stages": vlmaccel.stats(model).stages}
        handle = model.model.language_model.layers[LAYER - 1].register_forward_hook(noise)
        with handle:
            same = model(**batch).logits
        with model.model.language_model.layers[LAYER - 2].register_forward_hook(noise):
            other = model(**batch).logits
    real = batch["attention_mask"].bool() & (batch["input_ids"] != IMAGE)
    assert torch.equal(same[real], logits[real])
    assert (other[0, -1] - logits[0, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [VLM, "qwen2-vl"])
@torch.no_grad()
def test_beams_with_a_cache_and_without(kind):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    beams = dict(max_new_tokens=STEPS, num_beams=3, do_sample=False, return_dict_in_generate=True, output_scores=True)
    with vlmaccel.patched(model, VICTOR):
        cached = model.generate(**batch, **beams)
        again = model.generate(**batch, **beams, use_cache=False)
    assert torch.equal(cached.sequences, again.sequences)
    new = cached.sequences[:, batch["input_ids"].shape[1] :]
    for b, logits in enumerate(learned_reference(model, kind, batch, new)):
        score = logits[-STEPS - 1 : -1].log_softmax(-1).gather(1, new[b, :, None]).mean()
        assert abs(score - cached.sequences_scores[b]) < 1e-5


@torch.no_grad()
def test_assisted_decoding():
    model, batch = build(VLM), inputs(VLM)
    with vlmaccel.patched(model, VICTOR):
        greedy = model.generate(**batch, **GREEDY)
        assisted = model.generate(**batch, **GREEDY, prompt_lookup_num_tokens=3)
    assert torch.equal(assisted.sequences, greedy.sequences)


def conversation(batch, said):
    """A question with another picture behind the answer `said` (B, T): the new tokens and pixels, the whole sequence."""
    question = torch.randint(2, 110, (len(said), 6), generator=torch.Generator().manual_seed(8))
    new = torch.cat([question[:, :3], torch.full((len(said), 9), IMAGE), question[:, 3:]], 1)
    pixels = torch.randn(len(said), 3, 24, 24, generator=torch.Generator().manual_seed(9))
    return new, pixels, with_answer(batch, torch.cat([said, new], 1))


@pytest.mark.parametrize(("attn", "pad"), [("sdpa", True), ("eager", False)])
@torch.no_grad()
def test_a_second_turn_with_a_new_picture(attn, pad):
    model, batch, said = build(VLM, attn), inputs(VLM, 3, pad), answer_tokens(3)
    new, pixels, talk = conversation(batch, said)
    later = answer_tokens(3).flip(1)
    with vlmaccel.patched(model, VICTOR):
        out = model(**batch, use_cache=True)
        for t in range(STEPS):
            out = go_on(model, batch, said[:, t : t + 1], t, out.past_key_values)
        out = go_on(model, batch, new, STEPS, out.past_key_values, pixel_values=pixels)
        prompt, steps = out.logits, []
        for t in range(STEPS):
            out = go_on(model, talk, later[:, t : t + 1], t, out.past_key_values)
            steps.append(out.logits[:, -1])
    reference = Reference(model)
    for b, first in enumerate(reference.embed(batch)):
        turn = {"input_ids": new[b : b + 1], "attention_mask": torch.ones(1, 15), "pixel_values": pixels[b : b + 1]}
        second = reference.embed(turn)[0]
        whole = torch.cat([first, reference.words(said[b]), second, reference.words(later[b])])
        pictures = [(p, LEARNED) for p in pictures_of(model, talk, b, [*lengths_of(VLM, b), 9])]
        logits = register_logits(model, whole, pictures, LAYER)
        assert_same(prompt[b], logits[-STEPS - 15 : -STEPS])
        assert_same(torch.stack(steps, 1)[b], logits[-STEPS:])


@torch.no_grad()
def test_prefill_in_chunks():
    """What a chunk has of a picture is a picture; two without a word between them are one (a chunk cannot tell)."""
    model, batch = build(VLM), inputs(VLM, 1)
    length, reference = batch["input_ids"].shape[1], Reference(model)
    first, second, third = pictures_of(model, batch, 0, [9, 9, 9])
    cut = third[4]
    with vlmaccel.patched(model, VICTOR):
        between = model.generate(**batch, **GREEDY, prefill_chunk_size=third[0] - 1)
        inside = model.generate(**batch, **GREEDY, prefill_chunk_size=cut)
    for said, parts, ends in (
        (between, [first + second, third], []),
        (inside, [first + second, third[:4], third[4:]], [cut - 1]),
    ):
        sample = reference.followed(reference.embed(batch)[0], said.sequences[0, length:-1])
        logits = register_logits(model, sample, [(p, LEARNED) for p in parts], LAYER, ends)
        assert_same(torch.stack(said.logits, 1)[0], logits[-STEPS:])


@torch.no_grad()
def test_an_unprunable_cache_keeps_the_model_as_it_is():
    model, batch = build(VLM), inputs(VLM)
    plain = model.generate(**batch, **GREEDY, cache_implementation="static")
    with vlmaccel.patched(model, VICTOR), pytest.warns(UserWarning, match="nothing is dropped"):
        same = model.generate(**batch, **GREEDY, cache_implementation="static")
    assert torch.equal(same.sequences, plain.sequences)


CACHES = {
    "snapkv": SnapKV(budget=6, window=3, sinks=1),
    "vl-cache": VLCache(budget=0.4, threshold=0.3),
    "mixed": MixedPrecisionKV(low_bits=8, group=4, residual=4),
}


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES.keys())
@pytest.mark.parametrize("kind", [VLM, "llava-siglip-qwen2", "qwen2-vl"])
@torch.no_grad()
def test_with_a_method_on_the_cache(cache, kind):
    model, batch, later = build(kind), inputs(kind, 3, pad=True), answer_tokens(3)
    with vlmaccel.patched(model, VICTOR):
        plain = decode(model, batch, later)[1]
        alone_bytes = vlmaccel.stats(model).kv_bytes
    with vlmaccel.patched(model, [VICTOR, cache]):
        steps = decode(model, batch, later)[1]
        less = vlmaccel.stats(model).kv_bytes
        assert less < alone_bytes
        if isinstance(cache, MixedPrecisionKV):  # where its groups of entries begin depends on the batch
            assert (steps - plain).abs().max() < 0.1
            return
        for b in range(3):
            one = decode(model, alone(batch, b, 9), later[b : b + 1])[1]
            assert torch.allclose(steps[b], one[0], atol=5e-5)


@torch.no_grad()
def test_a_whole_budget_after_registers_changes_nothing():
    model, batch, later = build(VLM), inputs(VLM, 3, pad=True), answer_tokens(3)
    with vlmaccel.patched(model, VICTOR):
        plain = decode(model, batch, later)[1]
    for cache in (SnapKV(budget=1.0), VLCache(budget=1.0), MixedPrecisionKV(low_bits=4, residual=1000)):
        with vlmaccel.patched(model, [VICTOR, cache]):
            assert torch.allclose(decode(model, batch, later)[1], plain, atol=2e-5)
    with vlmaccel.patched(model, [VICTOR, ZipVL(tau=0.999999, kv="full")]):
        assert torch.allclose(decode(model, batch, later)[1], plain, atol=2e-5)


LATER = {
    "pyramiddrop": PyramidDrop(ratio=0.3, layers=(4,)),
    "pyramiddrop-earlier-too": PyramidDrop(ratio=0.2, layers=(1, 3)),
    "fastv": FastV(layer=1, ratio=0.3),
    "fastv-later": FastV(layer=4, ratio=0.2),
    "attention-sum": AttentionSum(layer=1, ratio=0.3),
    "neighbour-cosine": NeighbourCosine(layer=1, ratio=0.5),
    "divprune": DivPrune(ratio=0.4),
    "uniform": Uniform(ratio=0.3, layer=0, positions="renumber"),
    "pool": Pool(layer=0, ratio=0.5),
    "pool-later": Pool(layer=4, ratio=0.2),
    "tome-decoder": ToMeDecoder(layer=1, ratio=0.5, positions="calibrated"),
}


@pytest.mark.parametrize("later_method", LATER.values(), ids=LATER.keys())
@torch.no_grad()
def test_with_a_method_that_drops(later_method):
    """Other methods drop and merge the picture's tokens as long as they are there, never registers."""
    model, batch, later = build(VLM), inputs(VLM, 3, pad=True), answer_tokens(3)
    with vlmaccel.patched(model, [VICTOR, later_method]):
        together = decode(model, batch, later)[1]
        model(**batch)
        stats = vlmaccel.stats(model)
        assert [stats.visual_tokens[k] for k in range(LAYER, DEPTH)] == [len(LEARNED) * 4 / 3] * (DEPTH - LAYER)
        assert stats.visual_tokens[0] > len(LEARNED) * 4 / 3
        for b in range(3):
            one = decode(model, alone(batch, b, 9), later[b : b + 1])[1]
            assert torch.allclose(together[b], one[0], atol=3e-5)


def test_gradient_reaches_learned_registers():
    model, batch = build(VLM), inputs(VLM, 3, pad=True)
    learned = torch.nn.Parameter(LEARNED.clone())
    labels = batch["input_ids"].clone()
    labels[:, :-4] = -100
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    with vlmaccel.patched(model.train(), Victor(learned, layer=LAYER)):
        out = model(**batch, labels=labels)
        out.loss.backward()
    assert out.logits.shape[1] == labels.shape[1]
    by_hand = torch.nn.functional.cross_entropy(out.logits[:, -5:-1].flatten(0, 1), labels[:, -4:].flatten())
    assert torch.allclose(out.loss, by_hand)
    assert learned.grad is not None and (learned.grad.abs().amax(1) > 0).all()
    # the gradient is that of finite differences
    direction = torch.randn(LEARNED.shape, generator=torch.Generator().manual_seed(4))
    losses = []
    with torch.no_grad():
        for step in (-1e-2, 1e-2):
            with vlmaccel.patched(model, Victor(LEARNED + step * direction, layer=LAYER)):
                losses.append(model(**batch, labels=labels).loss.double())
    slope = float((losses[1] - losses[0]) / 2e-2)
    assert slope == pytest.approx(float((learned.grad * direction).sum()), rel=0.05, abs=1e-3)
    assert all(torch.equal(p, plain[name]) for name, p in model.named_parameters())


def test_a_label_on_a_dropped_token_is_refused():
    model, batch = build(VLM), inputs(VLM)
    with vlmaccel.patched(model, VICTOR), pytest.raises(ValueError, match="a token that has a label was dropped"):
        model(**batch, labels=batch["input_ids"])
    assert torch.isfinite(model(**batch).logits).all()


@every_method
@torch.no_grad()
def test_half_precision(method):
    model, batch = build(VLM).to(torch.bfloat16), inputs(VLM, 3, pad=True)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with vlmaccel.patched(model, method):
        assert model(**batch).logits.isfinite().all()


@torch.no_grad()
def test_copies_and_pickles_take_their_registers_along():
    model, batch = vlmaccel.patch(build(VLM), VICTOR), inputs(VLM)
    others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    logits = model(**batch).logits
    for other in others:
        assert torch.equal(other(**batch).logits, logits)


@pytest.mark.parametrize(("depth", "layer"), [(32, 3), (28, 3), (40, 4), (6, 1), (1, 1)])
def test_the_layer_is_in_proportion(depth, layer):
    assert Registers().first(depth) == layer == Victor(LEARNED).first(depth)
    assert Registers(layer=2).first(depth) == 2


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40))
def test_stretches_are_even_and_few(views, most):
    view = torch.arange(views).repeat_interleave(3)
    found = stretches(view, most)
    counts = found.bincount()
    assert len(counts) == min(views, most)
    assert (found.diff() >= 0).all()
    assert counts.max() - counts.min() <= 3


# ---- files


def test_files_come_back(tmp_path):
    path = tmp_path / "registers.safetensors"
    save_registers(path, LEARNED.bfloat16(), 2, "llava")
    registers, facts = load_registers(path)
    assert torch.equal(registers, LEARNED.bfloat16())
    assert facts == {"count": "3", "width": "32", "layer": "2", "model_type": "llava", "vlmaccel": vlmaccel.__version__}
    assert path.stat().st_size < LEARNED.nbytes + 500
    method = Victor(path, count=3)
    assert method.layer == 2 and Victor(str(path), layer=4).layer == 4
    assert str(path) in repr(method)


@torch.no_grad()
def test_a_model_with_a_file_is_one_with_its_tensor(tmp_path):
    path = tmp_path / "registers.safetensors"
    save_registers(path, LEARNED, LAYER, "llava")
    model, batch = build(VLM), inputs(VLM, 3, pad=True)
    with vlmaccel.patched(model, VICTOR):
        logits = model(**batch).logits
    vlmaccel.patch(model, "victor", registers=str(path))
    assert torch.equal(model(**batch).logits, logits)


def test_wrong_files_are_refused(tmp_path):
    path = tmp_path / "registers.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no file of registers .*nowhere"):
        Victor(tmp_path / "nowhere")
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        Victor(path)
    save_file({"weights": LEARNED}, path)
    with pytest.raises(ValueError, match="it has no tensor 'registers'"):
        Victor(path)
    save_file({"registers": LEARNED}, path)
    with pytest.raises(ValueError, match="it has no metadata count, width, layer, model_type, vlmaccel"):
        Victor(path)
    facts = {"count": "4", "width": "32", "layer": "2", "model_type": "llava", "vlmaccel": "0"}
    save_file({"registers": LEARNED}, path, metadata=facts)
    with pytest.raises(ValueError, match=r"says 4 registers of width 32, but holds \(3, 32\)"):
        Victor(path)
    save_registers(path, LEARNED, 2, "llava")
    with pytest.raises(ValueError, match="has 3 registers, not the 8 that count asks for"):
        Victor(path, count=8)


@pytest.mark.parametrize("registers", [torch.zeros(3, 16), torch.zeros(3, 64)])
@torch.no_grad()
def test_registers_of_another_model_leave_it_usable(registers, tmp_path):
    path = tmp_path / "registers.safetensors"
    save_registers(path, registers, 2, "llava")
    model, batch = build(VLM), inputs(VLM)
    plain = model(**batch).logits
    with pytest.raises(ValueError, match=r"width (16|64) in llava, and this model's is one of width 32 in llava"):
        vlmaccel.patch(model, "victor", registers=path)
    save_registers(path, LEARNED, 2, "qwen2_vl")
    with pytest.raises(ValueError, match="width 32 in qwen2_vl"):
        vlmaccel.patch(model, "victor", registers=path)
    save_registers(path, LEARNED, 9, "llava")
    with pytest.raises(ValueError, match="acts at decoder layer 9"):
        vlmaccel.patch(model, "victor", registers=path)
    assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Registers(0), "registers is the number of registers of a picture, 1 or more, not 0"),
        (lambda: Registers("file"), "learned ones come from a file, with the method 'victor'"),
        (lambda: Registers(True), "not True"),
        (lambda: Registers(layer=-1), "layer is the number of a decoder layer, 0 or more"),
        (lambda: Registers(pooling="max"), "pooling must be one of 'grid', 'attention'"),
        (lambda: Victor(LEARNED, layer=0), "layer is the number of a decoder layer, 1 or more"),
        (lambda: Victor(LEARNED[0]), r"registers are a floating point tensor \(M, D\)"),
        (lambda: Victor(LEARNED[:0]), r"registers are a floating point tensor \(M, D\)"),
        (lambda: Victor(LEARNED.long()), r"registers are a floating point tensor \(M, D\)"),
        (lambda: Victor(LEARNED, count=2), "not the 2 that count asks for"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_methods_without_insertions_have_no_such_hook_point():
    assert Method().hook_points() == ()
    assert Registers().hook_points() == VICTOR.hook_points() == ("visual_tokens", "decoder_layer")
