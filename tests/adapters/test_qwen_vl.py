"""What only Qwen-VL has: positions in three axes, pictures of any size, frames with words between them, deepstack."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vlmaccel
from tests.support.drops import (
    GREEDY,
    STEPS,
    FixedDrop,
    KeepAll,
    answer_tokens,
    assert_like_reference,
    decode,
    extend_mask,
    go_on,
    make_plan,
    reference_traces,
    turns,
)
from tests.support.models import DEPTH, IMAGE, PAD, QWEN, VIDEO, VOCAB, build, inputs
from tests.support.mrope import places
from tests.support.qwen_vl import MERGE, Segment, alone, layouts, processor
from tests.support.qwen_vl import inputs as laid_out
from tests.support.reference import Reference
from vlmaccel.adapters.base import find_adapter
from vlmaccel.adapters.view import _turned
from vlmaccel.hooks import Method, VisualTokens
from vlmaccel.methods import FastV, Magnitude, NeighbourCosine, Pool, PyramidDrop, SnapKV, ToMeDecoder, Uniform
from vlmaccel.run import Modality, Run, TokenMap

every_kind = pytest.mark.parametrize("kind", QWEN)
every_video = pytest.mark.parametrize("video", [False, True])


@dataclass(frozen=True, eq=False)
class Maps(Method):
    """Notes the token map of every prefill, and does nothing."""

    name: ClassVar[str] = "maps"
    seen: list[TokenMap] = field(default_factory=list)

    def visual_tokens(self, at: VisualTokens) -> None:
        self.seen.append(at.tokens)


def batch_of(kind: str, samples: list[list[Segment]], pad: bool = True) -> dict[str, Tensor]:
    return laid_out(kind, samples, pad, IMAGE, VIDEO, PAD)


def expected(samples: list[list[Segment]]) -> list[list[tuple[int, int, list[list[int]]]]]:
    """Of every sample the modality, the number and the places [frame, row, column] of each picture, in order."""
    found = []
    for segments in samples:
        pictures = [segment for segment in segments if not isinstance(segment, int)]
        count = {"image": 0, "video": sum(what == "image" for what, _ in pictures)}
        found.append([])
        for what, (frames, height, width) in pictures:
            sides = (range(frames), range(height // MERGE), range(width // MERGE))
            cells = [[f, r, c] for f in sides[0] for r in sides[1] for c in sides[2]]
            found[-1].append((Modality.IMAGE if what == "image" else Modality.VIDEO, count[what], cells))
            count[what] += 1
    return found


def assert_map(tokens: TokenMap, ids: Tensor, samples: list[list[Segment]]) -> None:
    """The map says of every token what the layout of its sample does."""
    visual = (ids == IMAGE) | (ids == VIDEO)
    assert torch.equal(tokens.modality == Modality.IMAGE, ids == IMAGE)
    assert torch.equal(tokens.modality == Modality.VIDEO, ids == VIDEO)
    assert (tokens.image[~visual] == -1).all() and (tokens.grid[~visual] == -1).all()
    for b, pictures in enumerate(expected(samples)):
        here = visual[b]
        assert tokens.modality[b, here].tolist() == [kind for kind, _, cells in pictures for _ in cells]
        assert tokens.image[b, here].tolist() == [number for _, number, cells in pictures for _ in cells]
        assert tokens.grid[b, here].tolist() == [cell for *_, cells in pictures for cell in cells]


@pytest.mark.parametrize("kind", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_the_inputs_of_these_tests_are_laid_out_as_by_the_processor(kind: str) -> None:
    """But for the words, of which there may be more."""
    samples: list[list[Segment]] = [
        [2, ("image", (1, 4, 6)), ("image", (1, 4, 4)), 1],
        [2, ("video", (2, 4, 6)), 3],
        [3],
    ]
    pad = lambda what: f"<|vision_start|><|{what}_pad|><|vision_end|>"  # noqa: E731
    texts = [f"w5 w6 {pad('image')}{pad('image')} w7", f"w8 w9 {pad('video')} w5 w6 w7", "w4 w3 w2"]
    theirs = processor(kind, IMAGE, VIDEO, VOCAB)(
        text=texts,
        images=[[Image.new("RGB", (24, 16)), Image.new("RGB", (16, 16))], [], []],
        videos=[[], [np.zeros((4, 16, 24, 3), np.uint8)], []],
        video_metadata=[[], [dict(fps=4, total_num_frames=4, frames_indices=[0, 1, 2, 3])], []],
        do_sample_frames=False,
        padding=True,
        return_tensors="pt",
    )
    ours = batch_of(kind, samples)
    assert theirs.keys() == ours.keys()
    for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts"):
        assert name not in ours or torch.equal(torch.as_tensor(theirs[name]), ours[name])
    for name in ("pixel_values", "pixel_values_videos"):
        assert theirs[name].shape == ours[name].shape

    def outline(batch: Any, b: int) -> list[tuple[int, int]]:
        rows = (batch[name][b, batch["attention_mask"][b].bool()] for name in ("input_ids", "mm_token_type_ids"))
        tokens = [(max(token, 110), kind) for token, kind in zip(*(row.tolist() for row in rows), strict=True)]
        return [x for i, x in enumerate(tokens) if x[0] > 110 or i == 0 or tokens[i - 1] != x]

    assert all(outline(theirs, b) == outline(ours, b) for b in range(3))
    assert theirs["attention_mask"][2].tolist() == [0] * (theirs["input_ids"].shape[1] - 3) + [1] * 3


# ---- the token map


@every_kind
@every_video
@torch.no_grad()
def test_number_frame_row_and_column_of_every_token(kind: str, video: bool) -> None:
    """In a forward, which has the grids, and in `generate`, which has positions only; beams are repeated samples."""
    model, batch, maps = build(kind), inputs(kind, 3, pad=True, video=video), Maps()
    samples, ids = layouts(3, video), batch["input_ids"]
    with vlmaccel.patched(model, maps):
        model(**batch)
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        model.generate(**batch, max_new_tokens=2, do_sample=False, num_beams=2)
    forward, generated, beams = maps.seen
    assert_map(forward, ids, samples)
    assert_map(generated, ids, samples)
    assert_map(beams, ids.repeat_interleave(2, 0), [sample for sample in samples for _ in range(2)])
    assert torch.equal(forward.modality == Modality.PAD, batch["attention_mask"] == 0)


LONG: list[list[Segment]] = [
    [1, ("video", (4, 2, 4)), 2, ("video", (2, 4, 4)), ("image", (1, 4, 4)), 3],
    [3, ("video", (3, 2, 2)), 2],
]


@every_kind
@torch.no_grad()
def test_frames_are_told_apart_however_short_or_low_they_are(kind: str) -> None:
    """Frames of one row or one token, and (Qwen2.5-VL) several frames within one step of time."""
    model, maps = build(kind), Maps()
    batch = batch_of(kind, LONG)
    if kind == "qwen2.5-vl":
        batch["second_per_grid_ts"] = torch.tensor([0.1, 0.05, 0.1])
    with vlmaccel.patched(model, maps):
        model(**batch)
        model.generate(**batch, max_new_tokens=2, do_sample=False)
    for tokens in maps.seen:
        assert_map(tokens, batch["input_ids"], LONG)


@pytest.mark.parametrize(("kind", "chunk"), turns(QWEN, (5, 11, 17)))
@torch.no_grad()
def test_chunks_of_a_prompt(kind: str, chunk: int) -> None:
    """A chunk may begin within a picture: rows and columns still count from the picture's first."""
    model, maps, samples = build(kind), Maps(), layouts(3, video=False)
    batch = batch_of(kind, samples)
    with vlmaccel.patched(model, maps):
        model.generate(**batch, **GREEDY, prefill_chunk_size=chunk)
    grid = torch.cat([tokens.grid for tokens in maps.seen], 1)
    image = batch["input_ids"] == IMAGE
    assert len(maps.seen) == -(-image.shape[1] // chunk)
    want = [cell for pictures in expected(samples) for *_, cells in pictures for cell in cells]
    assert grid[image].tolist() == want


@pytest.mark.parametrize(("kind", "chunk"), turns(QWEN, (6, 17)))
@torch.no_grad()
def test_chunks_with_videos_of_several_samples(kind: str, chunk: int) -> None:
    samples: list[list[Segment]] = [[2, ("video", (2, 4, 6)), 3], [4, ("video", (2, 2, 6)), 9]]
    model, batch = build(kind), batch_of(kind, samples)
    options = {**GREEDY, "prefill_chunk_size": chunk}
    plain = model.generate(**batch, **options)
    with vlmaccel.patched(model, KeepAll((1, 3), "selection")):
        same = model.generate(**batch, **options)
    assert all(map(torch.equal, same.logits, plain.logits))
    plan = make_plan(batch["attention_mask"], (0, 3))
    with vlmaccel.patched(model, FixedDrop(plan)):
        said = model.generate(**batch, **options)
    new = said.sequences[:, batch["input_ids"].shape[1] :]
    traces = reference_traces(model, batch, new[:, :-1], plan, "keep")
    assert_like_reference(traces, batch["attention_mask"], None, torch.stack(said.logits, 1)[:, 1:])


@torch.no_grad()
def test_positions_of_one_axis_and_features_without_grids_leave_no_place() -> None:
    """What a caller may leave out: the model then numbers pictures like text."""
    model, batch, maps = build("qwen2-vl"), inputs("qwen2-vl", 3, pad=True), Maps()
    encoded = model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    counted = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    text = {k: v for k, v in batch.items() if k not in ("pixel_values", "image_grid_thw")}
    calls = [{**batch, "position_ids": counted}, {**batch, "position_ids": counted[None]}]
    calls.append({**text, "mm_encoder_outputs": {"image": encoded}})
    plain = [model(**{k: copy.copy(v) for k, v in call.items()}).logits for call in calls]
    with vlmaccel.patched(model, maps):
        assert all(torch.equal(model(**call).logits, want) for call, want in zip(calls, plain, strict=True))
    image = batch["input_ids"] == IMAGE
    for tokens in maps.seen:
        assert torch.equal(tokens.image >= 0, image)
        assert (tokens.grid == -1).all()


@torch.no_grad()
def test_positions_that_all_samples_share() -> None:
    model, maps = build("qwen2.5-vl"), Maps()
    sample: list[Segment] = [2, ("image", (1, 4, 6)), 4]
    batch = batch_of("qwen2.5-vl", [sample, sample])
    at = places(model, batch)[0][:, None]
    plain = model(**batch, position_ids=at).logits
    with vlmaccel.patched(model, maps):
        assert torch.equal(model(**batch, position_ids=at).logits, plain)
    assert_map(maps.seen[0], batch["input_ids"], [sample, sample])


# ---- positions


@pytest.mark.parametrize(("kind", "video"), turns(QWEN, (False, True)))
@torch.no_grad()
def test_rope_deltas_are_the_unpatched_models(kind: str, video: bool) -> None:
    batch, found = inputs(kind, 3, pad=True, video=video), []
    for method in (None, FixedDrop(make_plan(batch["attention_mask"], (0, 2))), PyramidDrop(), SnapKV(0.5)):
        model: Any = build(kind)
        if method is not None:
            vlmaccel.patch(model, method)
        model(**batch)
        found.append(model.model.rope_deltas.clone())
        model.generate(**batch, max_new_tokens=3, do_sample=False)
        found.append(model.model.rope_deltas.clone())
    assert all(torch.equal(found[0], deltas) for deltas in found)
    ends = torch.stack([at.max() + 1 for at in places(model, batch)])
    assert torch.equal(found[0].flatten(), ends - batch["attention_mask"].sum(1))
    assert (found[0].flatten()[[0, 2]] < 0).all() and found[0][1] == 0


@every_kind
def test_positions_cannot_be_renumbered(kind: str) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    for method in (PyramidDrop(positions="renumber"), Uniform(positions="renumber"), ToMeDecoder(positions="renumber")):
        with pytest.raises(NotImplementedError, match='3 of them.*use positions="keep"'):
            vlmaccel.patch(model, method)
    assert not hasattr(model, "_vlmaccel")
    outs = []
    for positions in (None, "keep"):
        with vlmaccel.patched(model, PyramidDrop(ratio=0.6, positions=positions)):
            outs.append(model.generate(**batch, **GREEDY))
    assert all(map(torch.equal, outs[0].logits, outs[1].logits))
    with vlmaccel.patched(model):
        assert torch.equal(model.generate(**batch, **GREEDY).sequences, build_default(kind, batch))


def build_default(kind: str, batch: dict[str, Tensor]) -> Tensor:
    """Answers of the default recipe asked for by name."""
    with vlmaccel.patched(build(kind), "divprune", ratio=0.5) as model:
        return model.generate(**batch, **GREEDY).sequences


@every_kind
@torch.no_grad()
def test_calibration_turns_by_the_rotary_frequencies_of_the_model(kind: str) -> None:
    """D(d), the mean cosine over all frequencies, whichever axis each of them belongs to."""
    model = build(kind)
    parts = find_adapter(model).parts(model)
    half = parts.layers[0].self_attn.head_dim // 2
    distance = torch.arange(40.0)
    want = (distance[:, None] * 10000 ** -(torch.arange(half) / half)).cos().mean(1)
    got = _turned(Run(TokenMap.text(1, 30), 10), parts, torch.zeros(1, 30, 32))
    assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("kind", ["qwen2-vl", "qwen3-vl"])
@torch.no_grad()
def test_calibrated_attention_adds_to_the_keys_of_pictures_only(kind: str) -> None:
    """One merge at the last layer: its attention by hand, from the layer's own input."""
    model, batch = build(kind, "eager"), inputs(kind)
    method = Pool(layer=DEPTH - 1, ratio=0.5)
    rows: dict[bool, Tensor] = {}
    last = model.model.language_model.layers[-1].self_attn
    for calibrated in (False, True):
        with vlmaccel.patched(
            model, replace(method, positions="calibrated" if calibrated else "keep", prop_attn=calibrated)
        ):
            hook = last.register_forward_hook(
                lambda module, args, out, key=calibrated: rows.update({key: out[1][0, :, -1]})
            )
            model(**batch)
            hook.remove()
            stage = vlmaccel.stats(model).stages[0]
    parts = find_adapter(model).parts(model)
    n = batch["input_ids"].shape[1]
    turned = _turned(Run(TokenMap.text(1, n), 0), parts, torch.zeros(1, n, 32))
    picture = batch["input_ids"][0, stage.keep[0]] == IMAGE
    factor = torch.where(picture, stage.size[0] * (2 - turned[n - 1 - stage.keep[0]]), 1.0)
    want = rows[False] * factor
    assert torch.allclose(rows[True], want / want.sum(-1, keepdim=True), atol=1e-5)
    assert (rows[True] - rows[False]).abs().max() > 0.01


# ---- deepstack


@pytest.mark.parametrize("layer", [0, 1, 2, 3, 5])
@pytest.mark.parametrize(("kind", "attn"), turns(("qwen3-vl", "qwen3-vl-moe"), ("sdpa", "eager")))
@torch.no_grad()
def test_features_of_deepstack_reach_the_tokens_that_are_left(kind: str, attn: str, layer: int) -> None:
    """Drops before, among and behind the layers that get them; of one picture nothing is left."""
    model, batch = build(kind, attn), inputs(kind, 3, pad=True, video=True)
    mask, later = batch["attention_mask"], answer_tokens(3)
    kept = make_plan(mask, (layer,), seed=layer)[layer] | (batch["input_ids"] < IMAGE)
    kept &= mask.bool()
    whole = batch["input_ids"][2] == VIDEO
    kept[2, whole] = False
    with vlmaccel.patched(model, FixedDrop({layer: kept})):
        prompt, steps = decode(model, batch, later)
    assert_like_reference(reference_traces(model, batch, later, {layer: kept}, "keep"), mask, prompt, steps)


@torch.no_grad()
def test_several_drops_among_the_layers_of_deepstack_and_no_output_but_the_last() -> None:
    model, batch = build("qwen3-vl"), inputs("qwen3-vl", 3, pad=True)
    mask = batch["attention_mask"]
    plan = make_plan(mask, (0, 1, 2, 3, 4, 5))
    with vlmaccel.patched(model, FixedDrop(plan)):
        prompt, steps = decode(model, batch, answer_tokens(3))
        last = model(**batch, logits_to_keep=1).logits
    assert_like_reference(reference_traces(model, batch, answer_tokens(3), plan, "keep"), mask, prompt, steps)
    assert (last[:, 0] - prompt[:, -1]).abs().max() < 1e-5


@torch.no_grad()
def test_deepstack_to_the_last_layer() -> None:
    """As many layers of features as the decoder has layers: the hidden states are whole before the last norm."""
    import transformers as hf

    config = copy.deepcopy(build("qwen3-vl").config)
    config.text_config.num_hidden_layers = 3
    torch.manual_seed(0)
    model: Any = hf.Qwen3VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]
    batch = inputs("qwen3-vl", 3, pad=True)
    plan = make_plan(batch["attention_mask"], (0, 2))
    with vlmaccel.patched(model, FixedDrop(plan)):
        prompt, steps = decode(model, batch, answer_tokens(3))
        last = model(**batch, logits_to_keep=1).logits
    traces = reference_traces(model, batch, answer_tokens(3), plan, "keep")
    assert_like_reference(traces, batch["attention_mask"], prompt, steps)
    assert (last[:, 0] - prompt[:, -1]).abs().max() < 1e-5


# ---- batches


METHODS: dict[str, Method] = {
    "fixed": FastV(layer=2, ratio=0.4),
    "magnitude": Magnitude(layer=0, ratio=0.4),
    "pyramiddrop": PyramidDrop(ratio=0.6),
    "pool": Pool(layer=1, ratio=0.4),
    "tome": ToMeDecoder(layer=2, ratio=0.4, positions="calibrated"),
    "snapkv": SnapKV(budget=0.5, window=4),
}


@pytest.mark.parametrize(("name", "kind"), turns(list(METHODS), QWEN))
@torch.no_grad()
def test_a_batch_of_pictures_and_videos_is_its_samples(kind: str, name: str) -> None:
    """Prompt and answer, whatever the number of pictures and their sizes, in any order."""
    model, batch = build(kind), inputs(kind, 3, pad=True, video=True)
    with vlmaccel.patched(model, METHODS[name]):
        said = model.generate(**batch, **GREEDY)
        for b in range(3):
            one = model.generate(**alone(batch, b), **GREEDY)
            assert torch.equal(one.sequences[0, -STEPS:], said.sequences[b, -STEPS:])
            assert (torch.stack(one.logits, 1)[0] - torch.stack(said.logits, 1)[b]).abs().max() < 5e-5


@every_kind
@torch.no_grad()
def test_texts_alone(kind: str) -> None:
    """Behind a batch with pictures, whose rope deltas the model still has."""
    model = build(kind)
    batch = {k: v for k, v in inputs("llama", 3, pad=True).items()}
    with vlmaccel.patched(model, PyramidDrop()):
        model.generate(**inputs(kind, 3, pad=True), **GREEDY)
    plain = model.generate(**batch, **GREEDY)
    with vlmaccel.patched(model, PyramidDrop()):  # drops pictures only
        same = model.generate(**batch, **GREEDY)
    assert all(map(torch.equal, same.logits, plain.logits))
    plan = make_plan(batch["attention_mask"], (1, 3))
    with vlmaccel.patched(model, FixedDrop(plan)):
        said = model.generate(**batch, **GREEDY)
    new = said.sequences[:, batch["input_ids"].shape[1] :]
    traces = reference_traces(model, batch, new[:, :-1], plan, "keep")
    assert_like_reference(traces, batch["attention_mask"], None, torch.stack(said.logits, 1)[:, 1:])


# ---- conversations


def conversation(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """A first prompt, the whole of two turns with a new picture in the second, and the answer between them."""
    first: list[list[Segment]] = [[2, ("image", (1, 4, 6)), 3], [9], [3, ("image", (1, 4, 4)), 6]]
    second: list[list[Segment]] = [[2, ("image", (1, 2, 6)), 4], [2, ("image", (1, 6, 4)), 1], [9]]
    said = answer_tokens(3)
    a, b = batch_of(kind, first), batch_of(kind, second, pad=False)
    talk = {
        "input_ids": torch.cat([a["input_ids"], said, b["input_ids"]], 1),
        "attention_mask": torch.cat([extend_mask(a["attention_mask"], STEPS), b["attention_mask"]], 1),
    }
    talk["mm_token_type_ids"] = (talk["input_ids"] == IMAGE).int()
    order, patches = [], {}  # pictures of a sample: those of the first turn, then those of the second
    for batch, samples in ((a, first), (b, second)):
        pieces = batch["pixel_values"].split(batch["image_grid_thw"].prod(1).tolist())
        at = [i for i, sample in enumerate(samples) for segment in sample if not isinstance(segment, int)]
        for sample, grid, piece in zip(at, batch["image_grid_thw"], pieces, strict=True):
            patches.setdefault(sample, []).append((grid, piece))
    order = [one for sample in sorted(patches) for one in patches[sample]]
    talk["image_grid_thw"] = torch.stack([grid for grid, _ in order])
    talk["pixel_values"] = torch.cat([piece for _, piece in order])
    new = {**b, "input_ids": b["input_ids"]}
    return a, talk, new


@pytest.mark.parametrize(("kind", "ragged"), turns(QWEN, (True, False)))
@torch.no_grad()
def test_a_new_picture_in_the_second_turn(kind: str, ragged: bool) -> None:
    """Each turn loses tokens of its own; the caller gives the positions of the second, as transformers wants it."""
    model = build(kind)
    first, talk, new = conversation(kind)
    mask, n, later = talk["attention_mask"], first["input_ids"].shape[1], answer_tokens(3).flip(1)
    positions = torch.zeros(3, *mask.shape, dtype=torch.long)
    for b, at in enumerate(places(model, talk)):
        positions[:, b, mask[b].bool()] = at
    more = {k: new[k] for k in ("pixel_values", "image_grid_thw", "mm_token_type_ids")}

    def turns_of(model: Any) -> tuple[Tensor, Tensor, Tensor]:
        cache = model(**first, use_cache=True).past_key_values
        spoken = torch.cat(
            [go_on(model, first, answer_tokens(3)[:, t : t + 1], t, cache).logits for t in range(STEPS)], 1
        )
        out = model(
            new["input_ids"],
            attention_mask=mask,
            position_ids=positions[..., n + STEPS :],
            past_key_values=cache,
            **more,
        )
        steps = [go_on(model, talk, later[:, t : t + 1], t, cache).logits for t in range(STEPS)]
        return spoken, out.logits, torch.cat(steps, 1)

    plain = turns_of(model)
    with vlmaccel.patched(model, KeepAll(tuple(range(DEPTH)), "selection")):
        assert all(map(torch.equal, turns_of(model), plain))
    plan = make_plan(mask, (1, 3), ragged=ragged)
    for kept in plan.values():
        kept[:, n - 1 : n + STEPS] = True  # a prompt's last token and answers always stay
    with vlmaccel.patched(model, FixedDrop(plan)):
        _, prompt, steps = turns_of(model)
    traces = reference_traces(model, talk, later, plan, "keep")
    assert_like_reference(traces, mask, None, steps)
    for b, trace in enumerate(traces):
        start = int((mask[b] == 0).sum())
        rows = trace.index[(trace.index >= n + STEPS - start) & (trace.index < mask.shape[1] - start)]
        where = torch.isin(trace.index, rows)
        assert (prompt[b, rows - (n + STEPS - start)] - trace.logits[where]).abs().max() < 2e-5
    maps = Maps()
    with vlmaccel.patched(model, maps):
        turns_of(model)
    tokens = maps.seen[1]
    image = new["input_ids"] == IMAGE
    assert torch.equal(tokens.image >= 0, image)
    assert tokens.grid[0, image[0]].tolist() == [[0, 0, c] for c in range(3)]
    assert tokens.grid[1, image[1]].tolist() == [[0, r, c] for r in range(3) for c in range(2)]


@pytest.mark.parametrize("kind", ["qwen2-vl", "qwen3-vl"])
@torch.no_grad()
def test_generate_goes_on_with_a_new_picture(kind: str) -> None:
    """`generate` is given the positions too: by itself it wants the old pictures once more, and then finds them too many."""
    model = build(kind)
    first, talk, new = conversation(kind)
    mask, n = talk["attention_mask"], first["input_ids"].shape[1]
    positions = torch.zeros(4, *mask.shape, dtype=torch.long)
    positions[0] = (mask.cumsum(1) - 1).clamp(min=0)
    for b, at in enumerate(places(model, talk)):
        positions[1:, b, mask[b].bool()] = at
    more = {k: new[k] for k in ("pixel_values", "image_grid_thw")}
    plan = make_plan(mask, (0, 2))
    for kept in plan.values():
        kept[:, n - 1 : n + STEPS] = True
    with vlmaccel.patched(model, FixedDrop(plan)):
        cache = model(**first, use_cache=True).past_key_values
        for t in range(STEPS):
            go_on(model, first, answer_tokens(3)[:, t : t + 1], t, cache)
        text = {k: talk[k] for k in ("input_ids", "attention_mask", "mm_token_type_ids")}
        said = model.generate(**text, **more, position_ids=positions, past_key_values=cache, **GREEDY)
    answer = said.sequences[:, mask.shape[1] :]
    traces = reference_traces(model, talk, answer[:, :-1], plan, "keep")
    assert_like_reference(traces, mask, None, torch.stack(said.logits, 1)[:, 1:])


@pytest.mark.parametrize(("kind", "video"), turns(QWEN, (False, True)))
@torch.no_grad()
def test_embeddings_and_positions_instead_of_ids(kind: str, video: bool) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True, video=video)
    mask = batch["attention_mask"]
    positions = torch.zeros(3, *mask.shape, dtype=torch.long)
    for b, at in enumerate(places(model, batch)):
        positions[:, b, mask[b].bool()] = at
    rest = {k: v for k, v in batch.items() if k not in ("input_ids", "mm_token_type_ids")}
    embeds = model.get_input_embeddings()(batch["input_ids"])
    four = torch.cat([(mask.cumsum(1) - 1).clamp(min=0)[None], positions])
    for method in (PyramidDrop(ratio=0.5), Uniform(layer=1, ratio=0.5)):
        with vlmaccel.patched(model, method):
            by_ids = model(**batch).logits
            said = model.generate(**batch, **GREEDY)
            logits = model(inputs_embeds=embeds, position_ids=positions, **rest).logits
            answer = model.generate(inputs_embeds=embeds, position_ids=four, **rest, **GREEDY)
        assert torch.equal(logits[mask.bool()], by_ids[mask.bool()])
        assert all(map(torch.equal, answer.logits, said.logits))


# ---- which models


@every_kind
@torch.no_grad()
def test_the_base_model_alone(kind: str) -> None:
    whole = build(kind)
    model, batch = whole.model, inputs(kind, 3, pad=True)
    assert find_adapter(model).name == find_adapter(whole).name == "qwen-vl"
    plan = make_plan(batch["attention_mask"], (1, 3))
    with vlmaccel.patched(whole, FixedDrop(plan)):
        want = whole(**batch).logits
    with vlmaccel.patched(model, FixedDrop(plan)):
        got = whole.lm_head(model(**batch).last_hidden_state)
    real = batch["attention_mask"].bool()
    assert torch.equal(got[real], want[real])


def test_pictures_that_do_not_fill_the_tokens_are_an_error() -> None:
    model, batch = build("qwen2-vl"), inputs("qwen2-vl", 3, pad=True)
    grids = batch["image_grid_thw"]
    batch |= {"pixel_values": batch["pixel_values"][:-48], "image_grid_thw": grids[:-1]}
    with vlmaccel.patched(model), pytest.raises(ValueError, match="image tokens of the prompts|image tokens, which"):
        model(**batch)


# ---- merging


@pytest.mark.parametrize(("kind", "method"), turns(QWEN, (Pool(layer=1, ratio=0.4), ToMeDecoder(layer=1, ratio=0.4))))
@torch.no_grad()
def test_only_tokens_of_one_frame_merge(kind: str, method: Method) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True, video=True)
    with vlmaccel.patched(model, method):
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        stats = vlmaccel.stats(model)
    (stage,), tokens = stats.stages, stats.token_map
    assert (stage.size > 1).any(1).tolist() == [True, False, True]
    for group, image, grid in zip(stage.group, tokens.image, tokens.grid, strict=True):
        for slot in group[group >= 0].unique():
            assert image[group == slot].unique().numel() == 1
            assert grid[group == slot, 0].unique().numel() == 1


@torch.no_grad()
def test_neighbours_are_those_of_the_same_frame() -> None:
    """A video of many frames beside other pictures."""
    model, batch = build("qwen3-vl"), batch_of("qwen3-vl", LONG)
    with vlmaccel.patched(model, NeighbourCosine(layer=1, ratio=0.5)):
        model(**batch)
        (stage,), tokens = vlmaccel.stats(model).stages, vlmaccel.stats(model).token_map
    reference = Reference(model)
    for b, prompt in enumerate(reference.embed(batch)):
        real = batch["attention_mask"][b].bool()
        unit = torch.nn.functional.normalize(reference.run(prompt).inputs[1], dim=1)
        place = torch.cat([tokens.image[b, real][:, None], tokens.grid[b, real]], 1).tolist()
        score = {}
        for i, (number, frame, row, column) in enumerate(place):
            near = [
                float(unit[i] @ unit[j])
                for j, (n, f, r, c) in enumerate(place)
                if i != j and (n, f) == (number, frame) and max(abs(r - row), abs(c - column)) == 1
            ]
            score[i] = sum(near) / max(1, len(near))
        kept = set(range(len(place)))
        for number in {n for n, *_ in place if n >= 0}:
            mine = sorted((i for i, at in enumerate(place) if at[0] == number), key=lambda i: (score[i], i))
            kept -= set(mine[max(1, len(mine) // 2) :])
        start = int((~real).sum())
        assert (stage.keep[b][stage.size[b] > 0] - start).tolist() == sorted(kept)
