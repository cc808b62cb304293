"""InternVL, Idefics3 and SmolVLM: descriptions of where a picture's tiles are, and what holds for every adapter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import vlmaccel
from tests.adapters.test_proof import ALL, SHAPES, check_drop
from tests.support.drops import (
    GREEDY,
    STEPS,
    FixedDrop,
    KeepAll,
    answer_tokens,
    assert_like_reference,
    decode,
    make_plan,
    reference_traces,
    turns,
    with_answer,
)
from tests.support.models import IMAGE, build, inputs
from tests.support.reference import Positions
from tests.support.tiled import TILED, TOKENS
from vlmaccel.adapters.base import find_adapter
from vlmaccel.adapters.pictures import tiled_token_map
from vlmaccel.methods import PyramidDrop, SnapKV, Uniform
from vlmaccel.run import Modality

POLICIES: tuple[Positions, ...] = ("keep", "renumber")
every_kind = pytest.mark.parametrize("kind", TILED)


@every_kind
@pytest.mark.parametrize(("attn", "shape"), [("sdpa", "three"), ("eager", "three-padded"), ("sdpa", "three-padded")])
@torch.no_grad()
def test_keeping_everything_is_bit_identical(kind: str, attn: str, shape: str) -> None:
    model, batch = build(kind, attn), inputs(kind, *SHAPES[shape])
    later, real = answer_tokens(3), batch["attention_mask"].bool()
    prompt, steps = decode(model, batch, later)
    said = model.generate(**batch, **GREEDY)
    with vlmaccel.patched(model, KeepAll(ALL, "selection")):
        patched_prompt, patched_steps = decode(model, batch, later)
        patched_said = model.generate(**batch, **GREEDY)
    assert torch.equal(patched_prompt[real], prompt[real]) and torch.equal(patched_steps, steps)
    assert all(map(torch.equal, patched_said.logits, said.logits))


@pytest.mark.parametrize(
    ("kind", "layer", "attn", "shape", "positions"),
    turns(
        [(kind, layer) for kind in TILED for layer in ((0, 1, 2, 3, 5) if kind != "smolvlm" else (1,))],
        ("sdpa", "eager"),
        SHAPES,
        POLICIES,
    ),
)
@torch.no_grad()
def test_dropping_equals_the_reference(kind: str, layer: int, attn: str, shape: str, positions: Positions) -> None:
    check_drop(kind, attn, shape, (layer,) if layer % 2 else (layer, 4), positions, ragged=True)


@every_kind
@torch.no_grad()
def test_number_tile_row_and_column_of_every_token(kind: str) -> None:
    """Tokens of a tile are in rows, as the model's own pixel shuffle leaves them."""
    model, batch = build(kind), inputs(kind, 3, pad=True)
    with vlmaccel.patched(model, "random", ratio=1.0):
        model(**batch)
        forward = vlmaccel.stats(model).token_map
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        generated = vlmaccel.stats(model).token_map
    ids = batch["input_ids"]
    cells = [[r, c] for r in range(2) for c in range(2)]
    tiles = [[3, 1, 1], [], [2]]  # those of each picture
    for tokens in (forward, generated):
        assert torch.equal(tokens.modality == Modality.IMAGE, ids == IMAGE)
        assert torch.equal(tokens.modality == Modality.PAD, batch["attention_mask"] == 0)
        for b in range(3):
            here = ids[b] == IMAGE
            if kind == "internvl":
                number = [i for i, n in enumerate(tiles[b]) for _ in range(n * TOKENS)]
                view = [tile for n in tiles[b] for tile in range(n) for _ in range(TOKENS)]
            else:
                number = [i for i in range(sum(tiles[b])) for _ in range(TOKENS)]
                view = [0] * len(number)
            assert tokens.image[b, here].tolist() == number
            assert tokens.grid[b, here].tolist() == [[v, *cells[i % TOKENS]] for i, v in enumerate(view)]
        assert (tokens.image[ids != IMAGE] == -1).all()
    place = torch.tensor([[r // 2, c // 2] for r in range(4) for c in range(4)]).float()
    if kind == "internvl":
        shuffled = model.model.pixel_shuffle(place.view(1, 4, 4, 2), 0.5).reshape(TOKENS, -1)
    else:
        shuffled = model.model.connector.pixel_shuffle(place[None], 2)[0]
    assert shuffled.view(TOKENS, 4, 2).tolist() == [[[float(x) for x in cell]] * 4 for cell in cells]


def test_a_part_of_a_tile_has_no_place() -> None:
    special = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1]]).bool()
    tokens = tiled_token_map(special, 2)
    assert tokens.image.tolist() == [[0, 0, 0, -1, 1, 1, 1, 1]]
    assert tokens.grid[0].tolist() == [[-1] * 3] * 4 + [[0, r, c] for r in range(2) for c in range(2)]


@pytest.mark.parametrize(("kind", "positions"), turns(TILED, POLICIES))
@torch.no_grad()
def test_beams_samples_chunks_and_no_cache(kind: str, positions: Positions) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    mask = batch["attention_mask"]
    plan = make_plan(mask, (1, 3))
    ways = [dict(prefill_chunk_size=17), dict(use_cache=False), dict(do_sample=True, top_k=0, num_return_sequences=2)]
    beams = dict(max_new_tokens=STEPS, num_beams=3, do_sample=False, return_dict_in_generate=True, output_scores=True)
    with vlmaccel.patched(model, FixedDrop(plan, positions)):
        cached = model.generate(**batch, **beams)
        again = model.generate(**batch, **beams, use_cache=False)
        torch.manual_seed(3)
        answers = [model.generate(**batch, **{**GREEDY, **way}) for way in ways]
    assert torch.equal(cached.sequences, again.sequences)
    for answer, way in zip(answers, ways, strict=True):
        count = way.get("num_return_sequences", 1)
        new, logits = answer.sequences[:, mask.shape[1] :], torch.stack(answer.logits, 1)
        for i in range(count):
            traces = reference_traces(model, batch, new[i::count, :-1], plan, positions)
            assert_like_reference(traces, mask, None, logits[i::count, 1:])


@every_kind
@torch.no_grad()
def test_a_second_turn(kind: str) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    length = batch["input_ids"].shape[1]
    plan = make_plan(batch["attention_mask"], (0, 2), seed=7)
    with vlmaccel.patched(model, FixedDrop(plan, "renumber")):
        first = model.generate(**batch, **GREEDY)
        question = torch.randint(2, 110, (3, 9), generator=torch.Generator().manual_seed(8))
        talk = with_answer(batch, torch.cat([first.sequences[:, length:], question], 1))
        text = {k: talk[k] for k in ("input_ids", "attention_mask")}
        second = model.generate(**text, **GREEDY, past_key_values=first.past_key_values)
    mask = talk["attention_mask"]
    plan = {k: torch.cat([kept, kept.new_ones(3, STEPS + 9)], 1) for k, kept in plan.items()}
    new = second.sequences[:, mask.shape[1] :]
    traces = reference_traces(model, talk, new[:, :-1], plan, "renumber")
    assert_like_reference(traces, mask, None, torch.stack(second.logits, 1)[:, 1:])


def alone(kind: str, batch: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    """Sample b of a batch without its padding."""
    real = batch["attention_mask"][b].bool()
    one = {k: batch[k][b : b + 1, real] for k in ("input_ids", "attention_mask")}
    tiles = (batch["input_ids"] == IMAGE).sum(1) // TOKENS
    if tiles[b] and kind == "internvl":
        one["pixel_values"] = batch["pixel_values"].split(tiles.tolist())[b]
    elif tiles[b]:
        one["pixel_values"] = batch["pixel_values"][b : b + 1, : tiles[b]]
    return one


@every_kind
@torch.no_grad()
def test_a_batch_is_its_samples(kind: str) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    for method in (PyramidDrop(ratio=0.6), Uniform(ratio=0.4), SnapKV(budget=0.5, window=4)):
        with vlmaccel.patched(model, method):
            said = model.generate(**batch, **GREEDY)
            for b in range(3):
                one = model.generate(**alone(kind, batch, b), **GREEDY)
                assert (torch.stack(one.logits, 1)[0] - torch.stack(said.logits, 1)[b]).abs().max() < 5e-5


@every_kind
@torch.no_grad()
def test_found_copied_and_given_back(kind: str) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    real = batch["attention_mask"].bool()
    plain = model(**batch).logits
    assert find_adapter(model).name == find_adapter(model.model).name == {"internvl": kind}.get(kind, "idefics3")
    vlmaccel.patch(model)
    dropped = model(**batch).logits
    twin = copy.deepcopy(model)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    assert torch.equal(model(inputs_embeds=embeds, **rest).logits[real], dropped[real])
    vlmaccel.unpatch(model)
    assert torch.equal(model(**batch).logits[real], plain[real])
    assert torch.equal(twin(**batch).logits[real], dropped[real])
    assert (dropped - plain)[0, -1].abs().max() > 0.01
