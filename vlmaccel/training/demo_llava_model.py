"""The demo's tiny LLaVA: its vocabulary, processor and weights."""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlmaccel.evals.easy_vqa import COLORS, SHAPES
from vlmaccel.training.demo_packing import Layout, Prompt
from vlmaccel.training.demo_stages import IMAGE_SIZE, PATCH_SIZE, PATCHES, QUESTION_WORDS, Family, initialise

VISUAL_TOKENS = PATCHES

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
PAD, UNK, BOS, EOS, IMAGE = range(len(SPECIAL))
PROMPT_WORDS = ("user", "assistant", ":", "?", ".")
WORDS = (*SPECIAL, *PROMPT_WORDS, *QUESTION_WORDS, *COLORS, *SHAPES)
VOCABULARY = {word: i for i, word in enumerate(WORDS)}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = [{'type': 'text', 'text': message['content']}] if message['content'] is string \
else message['content'] -%}
{%- if message['role'] == 'user' %}USER: {% for part in content if part['type'] == 'image' %}<image>
{% endfor %}{% for part in content if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}
{%- elif message['role'] == 'assistant' %}ASSISTANT: \
{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}</s>
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}ASSISTANT:{% endif %}"""


def build_processor() -> LlavaProcessor:
    """Tokenizer, image processor and chat template, with nothing to download."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=2048,
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the CLS token, which "default" takes off again
        chat_template=CHAT_TEMPLATE,
    )


def build_model() -> LlavaForConditionalGeneration:
    """The untrained model."""
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        projection_dim=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=24, do_sample=False
    )
    initialise(model)
    return model


def to_pixels(pictures: list[np.ndarray]) -> Tensor:
    """uint8 (192, 192, 3) pictures as the model's pixel values, as the image processor makes them."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def vision(model: LlavaForConditionalGeneration, pictures: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """The patch features LLaVA uses, (B, 576, 128), and the CLS feature of the last layer, (B, 128)."""
    output = model.model.vision_tower(to_pixels(pictures), output_hidden_states=True)
    return output.hidden_states[-2][:, 1:], output.pooler_output


FAMILY = Family(
    prompt=Prompt(start="USER:", question="{} ASSISTANT:"),
    layout=Layout(torch.arange(VISUAL_TOKENS), extent=VISUAL_TOKENS),
    side=IMAGE_SIZE // PATCH_SIZE,
    features=lambda model, pictures: vision(model, pictures)[0],
    project=lambda model, features: model.model.multi_modal_projector(features),
)
