"""A slow decoder that drops tokens by hand: what every patched model is compared with.

It takes only the weights and the configuration of a model: no attention, rotary embedding, mask, cache or hook of
`transformers` or vlmaccel runs here. One sample at a time, without padding, everything in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests.support.mrope import axis_of, places

Schedule = dict[int, list[int]]
Evicted = Mapping[int, Tensor | Sequence[Tensor]]
Positions = Literal["keep", "renumber"]


@dataclass(frozen=True)
class Prompt:
    """A sample whose tokens have more to them than their embeddings (n, d).

    places: (3, n) its positions. added: (n, d) each, what goes onto the output of each of the first layers (deepstack).
    """

    embeds: Tensor
    places: Tensor
    added: list[Tensor]

    def __len__(self) -> int:
        return len(self.embeds)


@dataclass(frozen=True)
class Trace:
    """What one sample did.

    index: (n,) logical index in the sample of every row that reached the end. logits: (n, vocab) float64.
    inputs[k]: (n_k, d) what layer k received *before* a drop at that layer; rows[k]: (n_k,) their logical indices;
    positions[k]: (n_k,) or (3, n_k) their rotary positions at that point. kept[k], kept_positions[k]: the same after that drop.
    """

    index: Tensor
    logits: Tensor
    inputs: list[Tensor]
    rows: list[Tensor]
    positions: list[Tensor]
    kept: list[Tensor]
    kept_positions: list[Tensor]


def evictions(evicted: Evicted | None, k: int) -> Sequence[Tensor]:
    """Those of layer k, one after the other."""
    found = () if evicted is None else evicted.get(k, ())
    return (found,) if isinstance(found, Tensor) else found


class Reference:
    """The decoder of `model`, a text LLM of the Llama shape, a LLaVA around one, or a Qwen-VL."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        base: Any = getattr(model, "model", model)
        self.text = getattr(base, "language_model", None) or getattr(base, "text_model", base)
        self.config = self.text.config
        self.head = model.get_output_embeddings().weight.double()
        self.layers = [{n: p.double() for n, p in layer.named_parameters()} for layer in self.text.layers]
        self.heads, self.kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        self.head_dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads
        self.axis = axis_of(self.config, self.head_dim // 2)

    @torch.no_grad()
    def embed(self, inputs: dict[str, Tensor]) -> list[Any]:
        """The decoder's input of every sample of a batch without its padding: (n, d) float64 each, or a `Prompt`."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        embeds = self.model.get_input_embeddings()(ids).double()
        if self.axis is not None:
            return self._prompts(inputs, embeds)
        pictures = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes", "batch_num_images")}
        if "pixel_values" in pictures:
            features = torch.cat(list(self.model.get_image_features(**pictures).pooler_output))
            embeds[ids == self.model.config.image_token_id] = features.double()
        if "pixel_values_videos" in inputs:
            video = self.model.model.get_video_features(inputs["pixel_values_videos"]).pooler_output
            embeds[ids == self.model.config.video_token_id] = video.flatten(0, 1).double()
        return [embeds[b, mask[b]] for b in range(len(ids))]

    def _prompts(self, inputs: dict[str, Tensor], embeds: Tensor) -> list[Prompt]:
        """The same for Qwen-VL; the features of pictures are the model's own."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        added: list[Tensor] = []
        for what, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if pixels not in inputs:
                continue
            features = getattr(self.model, f"get_{what}_features")(inputs[pixels], inputs[f"{what}_grid_thw"])
            special = ids == getattr(self.model.config, f"{what}_token_id")
            embeds[special] = torch.cat(features.pooler_output).double()
            deep = getattr(features, "deepstack_features", None) or []
            added = added or [torch.zeros_like(embeds) for _ in deep]
            for layer, more in zip(added, deep, strict=True):
                layer[special] = torch.cat(more).double()
        at = places(self.model, inputs)
        return [Prompt(embeds[b, m], at[b], [layer[b, m] for layer in added]) for b, m in enumerate(mask)]

    def followed(self, prompt: Any, ids: Tensor) -> Any:
        """What `embed` gives for a sample, and the generated tokens `ids` (n,) behind it."""
        words = self.words(ids)
        if isinstance(prompt, Tensor):
            return torch.cat([prompt, words])
        later = prompt.places.max() + 1 + torch.arange(len(words))
        return Prompt(
            torch.cat([prompt.embeds, words]),
            torch.cat([prompt.places, later.expand(3, -1)], 1),
            [torch.cat([layer, torch.zeros_like(words)]) for layer in prompt.added],
        )

    def words(self, ids: Tensor) -> Tensor:
        """Embeddings (n, d) float64 of generated tokens (n,)."""
        return self.model.get_input_embeddings()(ids).detach().double()

    @torch.no_grad()
    def run(
        self,
        embeds: Tensor | Prompt,
        schedule: Schedule | None = None,
        positions: Positions | dict[int, Positions] = "keep",
        prompt: int | None = None,
        evicted: Evicted | None = None,
        attended: Mapping[int, Tensor] | None = None,
    ) -> Trace:
        """One forward over a sample, prompt and answer together.

        embeds: (n, d) float64, or a `Prompt`. schedule: {layer: logical indices of the prompt tokens that this layer and all later
        ones keep}. prompt: its length; everything after it is generated and always kept; None = all of it is prompt.
        positions: "keep" leaves every token its original number, "renumber" counts the survivors from 0 at each drop
        (so what is generated later continues that layer's own count); or one of them for each layer of the schedule.
        evicted: {layer: (H_kv, p) bool, which of the first p tokens each KV head keeps}: the rows behind those p tokens do
        not see the others; the first p rows see everything. Several of them for several evictions in a row.
        attended: {layer: (1 or H, p, p) bool, what each of the first p tokens (row) may see of them}, if it is not later; one
        that sees nothing gets nothing from the attention. The rows behind those p tokens see everything.
        """
        length = len(embeds)
        prompt = length if prompt is None else prompt
        if isinstance(embeds, Tensor):
            embeds = Prompt(embeds, torch.arange(length), [])
        hidden, rows, where = embeds.embeds, torch.arange(length), embeds.places
        trace: dict[str, list[Tensor]] = {k: [] for k in ("inputs", "rows", "positions", "kept", "kept_positions")}
        for k, weights in enumerate(self.layers):
            trace["inputs"].append(hidden)
            trace["rows"].append(rows)
            trace["positions"].append(where)
            if schedule is not None and k in schedule:
                stays = set(schedule[k]) | set(range(prompt, length))
                slots = [slot for slot, row in enumerate(rows.tolist()) if row in stays]
                hidden, rows, where = hidden[slots], rows[slots], where[..., slots]
                if (positions if isinstance(positions, str) else positions[k]) == "renumber":
                    where = torch.arange(len(rows))
            trace["kept"].append(rows)
            trace["kept_positions"].append(where)
            seen = None if attended is None else attended.get(k)
            hidden = self._layer(k, weights, hidden, rows, where, evictions(evicted, k), seen)
            if k < len(embeds.added):
                hidden = hidden + embeds.added[k][rows]
        logits = self._norm(hidden, self.text.norm.weight.double()) @ self.head.T
        return Trace(rows, logits, **trace)

    def attention(self, trace: Trace, k: int, before_drop: bool = True) -> Tensor:
        """`attention_by_head`, averaged over heads: (n, n) float64."""
        return self.attention_by_head(trace, k, before_drop).mean(0)

    @torch.no_grad()
    def attention_by_head(
        self, trace: Trace, k: int, before_drop: bool = True, evicted: Evicted | None = None
    ) -> Tensor:
        """Softmax attention of layer k: (H, n, n) float64, row = query, zero above the diagonal and where evicted.

        before_drop: on everything the layer received, as PyramidDrop ranks with layer k's own queries and keys;
        else on what the layer really ran on, as FastV reads layer K - 1. The columns are `trace.rows[k]` or
        `trace.kept[k]`.
        """
        hidden, rows, where = trace.inputs[k], trace.rows[k], trace.positions[k]
        if not before_drop:
            stays = torch.isin(rows, trace.kept[k])
            hidden, rows, where = hidden[stays], trace.kept[k], trace.kept_positions[k]
        weights = self.layers[k]
        normed = self._norm(hidden, weights["input_layernorm.weight"])
        return self._weights(k, weights, normed, rows, where, evictions(evicted, k))

    def _layer(
        self,
        k: int,
        weights: dict[str, Tensor],
        hidden: Tensor,
        rows: Tensor,
        where: Tensor,
        evicted: Sequence[Tensor],
        attended: Tensor | None,
    ) -> Tensor:
        normed = self._norm(hidden, weights["input_layernorm.weight"])
        attention = self._weights(k, weights, normed, rows, where, evicted, attended)
        value = self._heads(self._linear(weights, "self_attn.v_proj", normed), self.kv_heads)
        mixed = attention @ self._repeat(value)
        hidden = hidden + self._linear(weights, "self_attn.o_proj", mixed.transpose(0, 1).flatten(1))
        normed = self._norm(hidden, weights["post_attention_layernorm.weight"])
        if "mlp.gate.weight" in weights:
            return hidden + torch.stack([self._experts(weights, token) for token in normed])
        gate = self._linear(weights, "mlp.gate_proj", normed)
        gated = gate * torch.sigmoid(gate) * self._linear(weights, "mlp.up_proj", normed)
        return hidden + self._linear(weights, "mlp.down_proj", gated)

    def _experts(self, weights: dict[str, Tensor], token: Tensor) -> Tensor:
        """What the best experts make of one token (d,), weighed by their shares of the router's probability."""
        chosen = (weights["mlp.gate.weight"] @ token).softmax(0).sort(descending=True)
        share, which = (x[: self.config.num_experts_per_tok] for x in chosen)
        out = torch.zeros_like(token)
        for p, expert in zip(share / share.sum(), which.tolist(), strict=True):
            gate, up = (weights["mlp.experts.gate_up_proj"][expert] @ token).chunk(2)
            out += p * (weights["mlp.experts.down_proj"][expert] @ (gate * torch.sigmoid(gate) * up))
        return out

    def _weights(
        self,
        k: int,
        weights: dict[str, Tensor],
        normed: Tensor,
        rows: Tensor,
        where: Tensor,
        evicted: Sequence[Tensor],
        attended: Tensor | None = None,
    ) -> Tensor:
        query = self._heads(self._linear(weights, "self_attn.q_proj", normed), self.heads)
        key = self._heads(self._linear(weights, "self_attn.k_proj", normed), self.kv_heads)
        if "self_attn.q_norm.weight" in weights:
            query = self._norm(query, weights["self_attn.q_norm.weight"])
            key = self._norm(key, weights["self_attn.k_norm.weight"])
        query, key = self._rotate(query, where), self._repeat(self._rotate(key, where))
        distance = rows[:, None] - rows[None, :]
        sees = distance >= 0
        window = self._window(k)
        if window is not None:
            sees = sees & (distance < window)
        for kept in evicted:
            whole = torch.cat([kept, kept.new_ones(self.kv_heads, int(rows.max()) + 1)], 1)[:, rows]
            stays = whole.repeat_interleave(self.heads // self.kv_heads, 0)
            sees = sees & (stays[:, None] | (rows < kept.shape[1])[:, None])
        if attended is not None:
            p, n = attended.shape[-1], int(rows.max()) + 1
            whole = attended.new_ones(len(attended), max(n, p), max(n, p))
            whole[:, :p, :p] = attended
            sees = sees & whole[:, rows][:, :, rows]
        scores = query @ key.transpose(1, 2) / self.head_dim**0.5
        return torch.where(sees, scores, -torch.inf).softmax(-1).masked_fill(~sees.any(-1, keepdim=True), 0)

    def _window(self, k: int) -> int | None:
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        return None if kinds is not None and kinds[k] == "full_attention" else window

    def _rotate(self, x: Tensor, where: Tensor) -> Tensor:
        """Rotary embedding, each coordinate i paired with i + head_dim / 2: (heads, n, head_dim)."""
        half = self.head_dim // 2
        theta = self.config.rope_parameters["rope_theta"]
        frequency = theta ** -(torch.arange(half, dtype=torch.float64) / half)
        angle = (where[:, None] if self.axis is None else where[self.axis].T) * frequency
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def _norm(self, x: Tensor, scale: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * scale

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return x.view(len(x), heads, self.head_dim).transpose(0, 1)

    def _repeat(self, x: Tensor) -> Tensor:
        """Key-value heads to query heads: query head h reads key-value head h // (heads / kv_heads)."""
        return torch.stack([x[h // (self.heads // self.kv_heads)] for h in range(self.heads)])

    @staticmethod
    def _linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        out = x @ weights[f"{name}.weight"].T
        bias = weights.get(f"{name}.bias")
        return out if bias is None else out + bias
