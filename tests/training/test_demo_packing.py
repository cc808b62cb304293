"""Many questions behind one picture give what each gives alone."""

from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import vlmaccel.evals.easy_vqa as data
from vlmaccel.training import demo_llava_model, demo_qwen2_vl_model
from vlmaccel.training.demo_packing import PACKED, PACKED_MATMUL, answer_logits, matmul_attention, pack

MODELS = {"llava": demo_llava_model, "qwen2-vl": demo_qwen2_vl_model}


class Case(NamedTuple):
    module: object
    processor: object
    family: object


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    module = MODELS[request.param]
    return Case(module, module.build_processor(), module.FAMILY)


def test_every_word_of_the_data_is_in_the_vocabulary(case):
    samples = data.easy_vqa("test") + data.collages("test", images=30)
    texts = {text for sample in samples for text in (sample.question, *sample.answers)}
    tokenizer = case.processor.tokenizer
    assert all(tokenizer.unk_token_id not in tokenizer.encode(text) for text in texts)
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == list(case.module.WORDS)


def prompt(case, messages, **kwargs):
    return case.processor.apply_chat_template(messages, **kwargs)


def test_packed_prompt_is_the_processors_prompt(case):
    sample = data.collages("test", images=1)[0]
    content = [{"type": "image"}, {"type": "text", "text": sample.question}]
    text = prompt(case, [{"role": "user", "content": content}], add_generation_prompt=True)
    expected = case.processor(images=sample.image, text=text)["input_ids"][0]
    dialogue = [(sample.question, sample.answers[0])]
    packed = pack(case.processor.tokenizer, case.family.prompt, [dialogue], case.family.layout.batch(1))
    asked = packed.ids[packed.labels < 0].tolist()
    image = [case.module.IMAGE] * case.module.VISUAL_TOKENS
    assert [*packed.start.tolist(), *image, *asked] == expected


@pytest.mark.parametrize("attention", [PACKED, PACKED_MATMUL])
@torch.no_grad()
def test_packed_questions_do_not_see_one_another(case, attention):
    """The logits of every answer are those of the question alone behind the picture, by plain SDPA."""
    torch.manual_seed(0)
    model = case.module.build_model()
    family = case.family
    dialogue = [(sample.question, sample.answers[0]) for sample in data.collages("test", images=1, questions=4)]
    visual = torch.randn(1, family.layout.positions.shape[-1], model.config.get_text_config().hidden_size)
    model.set_attn_implementation(attention)
    packed = pack(case.processor.tokenizer, family.prompt, [dialogue], family.layout.batch(1))
    together = answer_logits(model, visual, packed)[0].split(packed.lengths)
    model.set_attn_implementation("sdpa")
    decoder = model.model.language_model
    for pair, logits in zip(dialogue, together, strict=True):
        alone = pack(case.processor.tokenizer, family.prompt, [[pair]], family.layout.batch(1))
        text = decoder.embed_tokens(alone.ids)
        embeddings = torch.cat([decoder.embed_tokens(alone.start)[None], visual, text], dim=1)
        positions = alone.positions
        hidden = decoder(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state
        answer = len(logits)
        torch.testing.assert_close(model.lm_head(hidden[0, -answer - 1 : -1]), logits, rtol=1e-4, atol=1e-4)


def test_matmul_attention_is_attention():
    query, key, value = torch.randn(3, 2, 4, 9, 32).unbind(0)
    mask = torch.rand(2, 1, 9, 9) < 0.5
    mask[..., 0] = True
    for given in ({}, {"is_causal": True}, {"attn_mask": mask}):
        expected = scaled_dot_product_attention(query, key, value, scale=0.2, **given)
        torch.testing.assert_close(matmul_attention(query, key, value, scale=0.2, **given), expected)


def test_packed_dialogues_of_different_lengths_are_padded(case):
    """A shorter dialogue beside a longer one gives what it gives by itself."""
    family, tokenizer = case.family, case.processor.tokenizer
    torch.manual_seed(0)
    model = case.module.build_model()
    model.set_attn_implementation(PACKED)
    long = [(sample.question, sample.answers[0]) for sample in data.collages("test", images=1, questions=3)]
    visual = torch.randn(2, family.layout.positions.shape[-1], model.config.get_text_config().hidden_size)
    with torch.no_grad():
        both, labels = answer_logits(
            model, visual, pack(tokenizer, family.prompt, [long, long[:1]], family.layout.batch(2))
        )
        packed = pack(tokenizer, family.prompt, [long[:1]], family.layout.batch(1))
        alone, expected = answer_logits(model, visual[1:], packed)
    assert labels[-len(expected) :].equal(expected)
    torch.testing.assert_close(both[-len(alone) :], alone, rtol=1e-4, atol=1e-4)
