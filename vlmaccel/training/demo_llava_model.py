"""The demo's tiny LLaVA: its vocabulary, processor and weights, and many questions behind one picture."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
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

PATCH_SIZE = 8
IMAGE_SIZE = 192
GRID = IMAGE_SIZE // PATCH_SIZE
VISUAL_TOKENS = GRID * GRID

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
PAD, UNK, BOS, EOS, IMAGE = range(len(SPECIAL))
PROMPT_WORDS = ("user", "assistant", ":", "?", ".")
# fmt: off
QUESTION_WORDS = (
    "what", "is", "the", "does", "image", "contain", "a", "there", "not", "no", "yes",
    "shape", "present", "in", "color", "of", "at", "describe",
)
# fmt: on
WORDS = (*SPECIAL, *PROMPT_WORDS, *QUESTION_WORDS, *COLORS, *SHAPES)
VOCABULARY = {word: i for i, word in enumerate(WORDS)}

# the text of a prompt before and after question and picture; the chat template writes the same
PROMPT_START = "USER:"
ANSWER_START = " ASSISTANT:"
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

PACKED = "demo_llava_packed"


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


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Fan-in initialisation.

    With the usual std of 0.02, made for wide models, attention is so flat at width 192 that the language
    model does not learn which shape goes with which colour.
    """
    for name, parameter in model.named_parameters():
        if "position_embedding" in name or "class_embedding" in name:
            nn.init.normal_(parameter, std=0.3)
        elif "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.5)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
            parameter.mul_(0.3)  # what a layer adds to the residual stream starts small


def to_pixels(pictures: list[np.ndarray]) -> Tensor:
    """uint8 (192, 192, 3) pictures as the model's pixel values, as the image processor makes them."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def vision(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The patch features LLaVA uses, (B, 576, 128), and the CLS feature of the last layer, (B, 128)."""
    output = model.model.vision_tower(pixels, output_hidden_states=True)
    return output.hidden_states[-2][:, 1:], output.pooler_output


@dataclass(frozen=True)
class Packed:
    """Several questions with answers behind one picture each, as if every question had its own prompt.

    Questions do not see one another, and the positions of each go on right behind the picture.
    """

    start: Tensor  # (prefix,) ids before the picture
    ids: Tensor  # (B, T) ids after it
    labels: Tensor  # (B, T) the answers and their end tokens in `ids`, elsewhere -100
    positions: Tensor  # (B, prefix + visual + T)
    mask: Tensor  # (B, 1, T, prefix + visual + T) True where a token after the picture sees another
    lengths: list[int]  # answer tokens, end token included, of every question of the batch


def pack(
    tokenizer: PreTrainedTokenizerFast, dialogues: list[list[tuple[str, str]]], visual_positions: Tensor
) -> Packed:
    """Pack (question, answer) pairs behind visual tokens; their positions (B, n) count from 0 to 575."""
    start = [BOS, *_encode(tokenizer, PROMPT_START)]
    first = len(start) + VISUAL_TOKENS
    ids, labels, positions, owners = [], [], [], []
    lengths = []
    for dialogue in dialogues:
        row_ids: list[int] = []
        row_labels: list[int] = []
        row_positions: list[int] = []
        row_owner: list[int] = []
        for number, (question, answer) in enumerate(dialogue, start=1):
            asked = _encode(tokenizer, question + ANSWER_START)
            answered = [*_encode(tokenizer, answer), EOS]
            length = len(asked) + len(answered)
            row_ids += [*asked, *answered]
            row_labels += [-100] * len(asked) + answered
            row_positions += range(first, first + length)
            row_owner += [number] * length
            lengths.append(len(answered))
        ids.append(torch.tensor(row_ids))
        labels.append(torch.tensor(row_labels))
        positions.append(torch.tensor(row_positions))
        owners.append(torch.tensor(row_owner))
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
    batch, visual = visual_positions.shape
    before = torch.arange(len(start)).expand(batch, -1)
    # the owner of the shared prefix is 0, of padding -1
    owner = nn.functional.pad(pad(owners, padding_value=-1), (len(start) + visual, 0))
    seen = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])
    return Packed(
        start=torch.tensor(start),
        ids=pad(ids, padding_value=PAD),
        labels=pad(labels, padding_value=-100),
        positions=torch.cat([before, len(start) + visual_positions, pad(positions)], dim=1),
        mask=(seen & torch.ones_like(seen).tril())[:, None, len(start) + visual :],
        lengths=lengths,
    )


@functools.cache
def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def answer_logits(model: LlavaForConditionalGeneration, visual: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """Logits (N, vocabulary) of all answer tokens of the batch, and the N tokens themselves."""
    decoder = model.model.language_model
    start = decoder.embed_tokens(packed.start).expand(len(visual), -1, -1)
    embeddings = torch.cat([start, visual.to(start.dtype), decoder.embed_tokens(packed.ids)], dim=1)
    prefix = start.shape[1] + visual.shape[1]
    hidden = decoder(
        inputs_embeds=embeddings,
        attention_mask=packed.mask,
        position_ids=packed.positions,
        use_cache=False,
        prefix_length=prefix,
    ).last_hidden_state
    answered = packed.labels >= 0
    # the token before an answer token predicts it; no answer comes first behind the prefix
    return model.lm_head(hidden[:, prefix - 1 : -1][answered]), packed.labels[answered]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    prefix_length: int = 0,
    **_: object,
) -> tuple[Tensor, None]:
    """SDPA that knows that the shared prefix is causal: it skips half of it, which a given mask would not."""
    attention = functools.partial(nn.functional.scaled_dot_product_attention, scale=scaling)
    prefix = slice(0, prefix_length)
    parts = [attention(query[:, :, prefix_length:], key, value, attn_mask=attention_mask)]
    if prefix_length:
        causal = attention(query[:, :, prefix], key[:, :, prefix], value[:, :, prefix], is_causal=True)
        parts = [causal, *parts]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(PACKED, packed_attention)
