import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from vlmaccel.evals.shapes import SHAPES, build, get_shape, prompt

TINY = [name for name in SHAPES if name.startswith("tiny-")]
REAL = [name for name in SHAPES if name not in TINY]

# as counted on the published checkpoints, in millions
PARAMETERS = {
    "llava-1.5-7b": 7063,
    "llava-next-7b": 7567,
    "llava-onevision-0.5b": 894,
    "llava-onevision-7b": 8031,
    "llama-2-7b": 6738,
    "llama-3-8b": 8030,
    "mistral-7b": 7248,
    "qwen2-0.5b": 494,
    "qwen2-1.5b": 1544,
    "qwen2-7b": 7616,
    "qwen2-vl-2b": 2209,
    "qwen2-vl-2b-4k": 2209,
    "tinyllama-1.1b": 1100,
}


def meta(name, depth=None, vision_depth=None):
    shape = get_shape(name)
    auto = AutoModelForCausalLM if shape.vision is None else AutoModelForImageTextToText
    with torch.device("meta"):
        return auto.from_config(shape.config(depth, vision_depth))


@pytest.mark.parametrize("name", REAL)
def test_real_shapes_have_the_published_size(name):
    assert round(meta(name).num_parameters() / 1e6) == PARAMETERS[name]


@pytest.mark.parametrize("name", [name for name in REAL if SHAPES[name].vision and SHAPES[name].family != "qwen2_vl"])
def test_visual_tokens_of_real_shapes(name):
    shape, model = get_shape(name), meta(name, depth=1, vision_depth=1)
    side = model.config.vision_config.image_size
    size = (2, 3, side, side) if shape.views == 1 else (2, shape.views, 3, side, side)
    sizes = {} if shape.views == 1 else {"image_sizes": torch.tensor([shape.image] * 2)}
    with torch.no_grad():
        features = model.get_image_features(torch.empty(size, device="meta"), **sizes).pooler_output
    assert [tuple(f.shape) for f in features] == 2 * [(shape.visual_tokens, model.config.text_config.hidden_size)]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prompt_fits_the_model(name, dtype):
    model = build(name, depth=2, vision_depth=1, dtype=dtype)
    inputs = prompt(model, name, text_tokens=9, batch=2)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, 9 + SHAPES[name].visual_tokens)
    with torch.no_grad():
        logits = model(**inputs).logits  # the model itself refuses a wrong number of placeholders
    assert not model.training and logits.dtype == dtype
    assert logits.isfinite().all() and logits.std() > 0.1
    assert not torch.equal(logits[0], logits[1])


def test_full_depth_and_tied_weights():
    model = build("tiny-llava")
    assert model.config.text_config.num_hidden_layers == len(model.model.language_model.layers) == 6
    assert len(model.model.vision_tower.encoder.layers) == 3
    tied = SHAPES["qwen2-0.5b"].config(depth=1)
    assert tied.tie_word_embeddings and not model.config.tie_word_embeddings


def test_weights_do_not_repeat_and_follow_the_seed():
    one, same, other = (build("tiny-llama", depth=2, seed=seed).state_dict() for seed in (0, 0, 1))
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one[key], same[key]) and not torch.equal(one[key], other[key])
    assert not torch.equal(one[key], one[key.replace("0", "1")])
    assert len(one[key].unique(dim=0)) == len(one[key])
    assert one[key].std().item() == pytest.approx(64**-0.5, rel=0.1)


def test_picture_stands_after_the_prefix():
    model = build("tiny-llava", depth=1, vision_depth=1)
    for text, first in ((100, 35), (9, 4), (1, 0)):
        ids = prompt(model, "tiny-llava", text_tokens=text)["input_ids"][0]
        assert (ids == 127).nonzero().flatten().tolist() == list(range(first, first + 36))


def test_errors():
    with pytest.raises(ValueError, match=r"no shape 'llava-7b'; there are: llava-1.5-7b, .*tiny-llama"):
        build("llava-7b")
    with pytest.raises(ValueError, match="decoder of this shape has 6 layers: ask for 1 to 6, not 7"):
        build("tiny-llama", depth=7)
    with pytest.raises(ValueError, match="vision tower of this shape has 3 layers: ask for 1 to 3, not 0"):
        build("tiny-llava", depth=1, vision_depth=0)
    model = build("tiny-llama", depth=1)
    with pytest.raises(ValueError, match="at least one text token and one sample, not 0 and 1"):
        prompt(model, "tiny-llama", text_tokens=0)
