"""What the adapters say each token is, against transformers' own packing of pictures."""

import pytest
import torch

import vlmaccel
from tests.support.models import IMAGE, SIDE, VLMS, build, inputs
from vlmaccel.adapters.base import picture_token_map, run_lengths
from vlmaccel.run import Modality

GRID = SIDE // 8  # patches a side


def map_of(kind, batch, **options):
    model = build(kind)
    with vlmaccel.patched(model, "random", ratio=1.0), torch.no_grad():
        model(**batch, **options)
        return vlmaccel.stats(model).token_map


@pytest.mark.parametrize("kind", VLMS)
def test_modality_and_image_of_every_token(kind):
    batch = inputs(kind, 3, pad=True)
    tokens = map_of(kind, batch)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    want = torch.where(mask == 0, Modality.PAD, torch.where(ids == IMAGE, Modality.IMAGE, Modality.TEXT))
    assert torch.equal(tokens.modality.long(), want)
    assert torch.equal(tokens.image >= 0, ids == IMAGE)
    assert [int(tokens.image[b].max()) + 1 for b in range(3)] == [3, 0, 1]
    for b in (0, 2):
        numbers = tokens.image[b][tokens.image[b] >= 0]
        assert (numbers.diff() >= 0).all()


@pytest.mark.parametrize("kind", ["llava-next", "llava-onevision"])
def test_grid_of_a_mosaic_is_where_the_model_puts_its_patches(kind):
    """Each patch is given its own number, and transformers packs, unpads and breaks the rows itself."""
    model, batch = build(kind).model, inputs(kind, 3, pad=True)
    tokens = map_of(kind, batch)
    newline = torch.tensor([-1.0])
    flat_grid = tokens.grid[tokens.image >= 0]
    start = 0
    sizes = batch["image_sizes"]
    features = build(kind).get_image_features(
        **{k: v for k, v in batch.items() if k in ("pixel_values", "image_sizes", "batch_num_images")}
    )
    for size, packed in zip(sizes, features.pooler_output, strict=True):
        grid = flat_grid[start : start + len(packed)]
        start += len(packed)
        whole = grid[: GRID * GRID]
        assert whole.tolist() == [[0, r, c] for r in range(GRID) for c in range(GRID)]
        rest = grid[GRID * GRID :]
        if len(rest) == 1:  # a picture of one crop ends in a lone newline
            assert rest.tolist() == [[-1, -1, -1]]
            continue
        crops = next(n for n in range(1, 20) if _packs(model, n, size, newline) == len(packed))
        numbers = torch.arange(crops * GRID * GRID).float().view(crops, GRID * GRID, 1)
        places = model.pack_image_features([numbers], size[None], **_options(model), image_newline=newline)[0][0]
        places = places[GRID * GRID :, 0].long() - GRID * GRID
        rows = int((places < 0).sum())
        across = len(places) // rows
        for i, (view, row, column) in enumerate(rest.tolist()):
            assert (view, row) == (1, i // across)
            assert column == (-1 if places[i] < 0 else i % across)


def _options(model):
    if "Onevision" in type(model).__name__:
        return {"vision_aspect_ratio": model.config.vision_aspect_ratio}  # how far it shrinks a large mosaic
    return {"vision_feature_select_strategy": "default"}


def _packs(model, crops, size, newline):
    """Length of a picture of that many views, or -1 if it cannot have as many."""
    try:
        numbers = torch.zeros(crops, GRID * GRID, 1)
        return len(model.pack_image_features([numbers], size[None], **_options(model), image_newline=newline)[0][0])
    except RuntimeError:
        return -1


def test_videos_are_told_apart_and_have_a_budget_like_pictures():
    batch = inputs("llava-onevision", 3, pad=True, video=True)
    model = build("llava-onevision")
    with vlmaccel.patched(model, "random", ratio=0.5), torch.no_grad():
        model(**batch)
        stats = vlmaccel.stats(model)
    video = stats.token_map.modality == Modality.VIDEO
    assert video.sum(1).tolist() == [0, 0, 9]
    kept = torch.zeros_like(video).scatter(1, stats.stages[0].keep, stats.stages[0].size > 0)
    assert int(kept[video].sum()) == 4
    assert stats.token_map.image[2][video[2]].unique().tolist() == [0]


def test_one_map_by_ids_or_by_embeddings():
    kind = "llava-clip-llama"
    model, batch = build(kind), inputs(kind, 3, pad=True)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with vlmaccel.patched(model, "uniform", ratio=0.5), torch.no_grad():
        by_ids = model(**batch).logits
        rest = {k: v for k, v in batch.items() if k != "input_ids"}
        assert torch.equal(model(inputs_embeds=embeds, **rest).logits, by_ids)


def test_pieces_of_chunked_prefill_are_taken_apart():
    special = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0]]).bool()
    assert run_lengths(special) == [2, 1, 1]
    tokens = picture_token_map(special, [4], Modality.IMAGE, None, [torch.full((4, 3), -1)])
    assert tokens.image.tolist() == [[-1, 0, 0, -1, 1], [0, -1, -1, -1, -1]]
