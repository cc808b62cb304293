"""Many questions behind one picture in one pass of a language model, as if each had a prompt of its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedTokenizerFast

PACKED, PACKED_MATMUL = "demo_packed", "demo_packed_matmul"


@dataclass(frozen=True)
class Prompt:
    """The text around a picture and a question, as the chat template writes it.

    start: before the picture. question: from the picture to the answer, with {} for the question.
    """

    start: str
    question: str


@dataclass(frozen=True)
class Layout:
    """Where the visual tokens of a picture stand.

    positions: (n,), or (3, n) for time, row and column, counted from 0. extent: by how much text behind the picture
    is later than text before it.
    """

    positions: Tensor
    extent: int

    def batch(self, size: int) -> Layout:
        """The same for so many pictures: positions (B, n) or (3, B, n)."""
        return Layout(self.positions.unsqueeze(-2).expand(*self.positions.shape[:-1], size, -1), self.extent)


@dataclass(frozen=True)
class Packed:
    """Several questions with answers behind one picture each, as if every question had its own prompt.

    Questions do not see one another, and the positions of each go on right behind the picture.
    """

    start: Tensor  # (prefix,) ids before the picture
    ids: Tensor  # (B, T) ids after it
    labels: Tensor  # (B, T) the answers and their end tokens in `ids`, elsewhere -100
    positions: Tensor  # (B, prefix + visual + T), or (3, B, ...)
    mask: Tensor  # (B, 1, T, prefix + visual + T) True where a token after the picture sees another
    lengths: list[int]  # answer tokens, end token included, of every question of the batch


def pack(
    tokenizer: PreTrainedTokenizerFast, prompt: Prompt, dialogues: list[list[tuple[str, str]]], visual: Layout
) -> Packed:
    """Pack (question, answer) pairs behind visual tokens with positions (B, n) or (3, B, n)."""
    start = tokenizer.encode(prompt.start)
    first = len(start) + visual.extent
    ids, labels, positions, owners = [], [], [], []
    lengths = []
    for dialogue in dialogues:
        row_ids: list[int] = []
        row_labels: list[int] = []
        row_positions: list[int] = []
        row_owner: list[int] = []
        for number, (question, answer) in enumerate(dialogue, start=1):
            asked = _encode(tokenizer, prompt.question.format(question))
            answered = [*_encode(tokenizer, answer), tokenizer.eos_token_id]
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
    *axes, tokens = visual.positions.shape
    before = torch.arange(len(start)).expand(*axes, -1)
    # the owner of the shared prefix is 0, of padding -1
    owner = nn.functional.pad(pad(owners, padding_value=-1), (len(start) + tokens, 0))
    seen = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])
    return Packed(
        start=torch.tensor(start),
        ids=pad(ids, padding_value=tokenizer.pad_token_id),
        labels=pad(labels, padding_value=-100),
        positions=torch.cat([before, len(start) + visual.positions, pad(positions).expand(*axes, -1)], dim=-1),
        mask=(seen & torch.ones_like(seen).tril())[:, None, len(start) + tokens :],
        lengths=lengths,
    )


@functools.cache
def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def answer_logits(model: Any, visual: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
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
    return model.lm_head(hidden[:, prefix - 1 : -1][answered]).float(), packed.labels[answered]


def matmul_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """What SDPA computes, by matrix products, whose backward pass is much faster on a CPU when heads have 32 channels."""
    # under autocast only the values have come as bfloat16: rotating the others gave float32 again
    logits = (query * scale).to(value.dtype) @ key.to(value.dtype).transpose(-1, -2)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -math.inf)
    return logits.softmax(-1) @ value


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    prefix_length: int = 0,
    attend: Callable[..., Tensor] = nn.functional.scaled_dot_product_attention,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention that knows that the shared prefix is causal: SDPA skips half of it, which a given mask would not."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    attention = functools.partial(attend, scale=scaling)
    prefix = slice(0, prefix_length)
    parts = [attention(query[:, :, prefix_length:], key, value, attn_mask=attention_mask)]
    if prefix_length:
        causal = attention(query[:, :, prefix], key[:, :, prefix], value[:, :, prefix], is_causal=True)
        parts = [causal, *parts]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(PACKED, packed_attention)
AttentionInterface.register(PACKED_MATMUL, functools.partial(packed_attention, attend=matmul_attention))
