"""What `vlmaccel bench kernels` runs: every operator at shapes of real models, and the ways in which torch can do the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, one_hot, pad, scaled_dot_product_attention

from vlmaccel.evals.published_tome import match
from vlmaccel.kernels.attention_lse import attention_lse
from vlmaccel.kernels.bipartite_match import bipartite_match
from vlmaccel.kernels.block_index import computed_share, dense_mask, vertical_slash_index
from vlmaccel.kernels.block_prefill import block_prefill
from vlmaccel.kernels.farthest_first import farthest_first
from vlmaccel.kernels.greedy_map import greedy_map
from vlmaccel.kernels.key_bias_attention import key_bias_attention
from vlmaccel.kernels.merge_tokens import merge_tokens
from vlmaccel.kernels.mixed_decode import mixed_decode
from vlmaccel.kernels.quantize_pack import dequantize, quantize_pack
from vlmaccel.kernels.score_rows import score_rows
from vlmaccel.kernels.token_prefill import token_prefill

OPERATORS: dict[str, Callable[..., Any]] = {
    "bipartite_match": bipartite_match,
    "merge_tokens": merge_tokens,
    "farthest_first": farthest_first,
    "greedy_map": greedy_map,
    "key_bias_attention": key_bias_attention,
    "score_rows": score_rows,
    "token_prefill": token_prefill,
    "block_prefill": block_prefill,
    "quantize_pack": quantize_pack,
    "dequantize": dequantize,
    "mixed_decode": mixed_decode,
}
HEADS = {  # query heads, key heads, head_dim
    "vit-l": (16, 16, 64),
    "llava-7b": (32, 32, 128),
    "llava-next-7b": (32, 8, 128),
    "qwen2-vl-2b": (12, 2, 128),
}
GROUP = 32  # entries, or channels, that share a scale
RESIDUAL = 128  # newest entries of a cache, in full precision

Ways = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Work:
    """What a case does with its inputs.

    arguments: of the operator. torch: ways to have the same result from torch. replaces: ways to what the operator takes
    the place of, with another result. flops: of the matrix products that cannot be avoided (a multiply-add is two). reads:
    bytes of the arguments that have to be read, None for all. error: of a result against torch's.
    """

    arguments: tuple
    torch: Ways
    replaces: Ways = field(default_factory=dict)
    flops: float = 0.0
    reads: float | None = None
    error: Callable[[Any, Any], float] | None = None


@dataclass(frozen=True)
class Case:
    """An operator at a shape; make(draw) draws its inputs."""

    operator: str
    shape: str
    make: Callable[[Draw], Work]


class Draw:
    """Random inputs on a device in a dtype, the same ones each time."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.generator = torch.Generator(device).manual_seed(0)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.long) -> Tensor:
        """From low to high - 1."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=dtype)

    def some(self, count: int, of: int, *shape: int) -> Tensor:
        """(*shape, count) int64, so many of the numbers below `of`, ascending."""
        chance = torch.rand(*shape, of, generator=self.generator, device=self.device)
        return chance.topk(count, dim=-1).indices.sort(-1).values

    def heads(self, batch: int, heads: int, tokens: int, dim: int) -> Tensor:
        """(B, H, n, d) laid out as a projection leaves it."""
        return self.normal(batch, tokens, heads, dim).transpose(1, 2)

    def qkv(self, model: str, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads, dim = HEADS[model]
        return tuple(self.heads(batch, h, tokens, dim) for h in (heads, kv_heads, kv_heads))


def causal_pairs(n: float) -> float:
    """Pairs of a row and a key that it sees."""
    return n * (n + 1) / 2


def match_case(batch: int, tokens: int, dim: int = 64) -> Case:
    """ToMe's matching in a vision transformer; an eighth of the tokens merge."""

    def make(draw: Draw) -> Work:
        metric, r = draw.normal(batch, tokens, dim, dtype=torch.float), tokens // 8
        unit = torch.nn.functional.normalize(metric, dim=-1)

        def likeness(result: tuple[Tensor, ...]) -> Tensor:
            """Sum of the cosines of the pairs that merge."""
            if len(result) == 2:  # ours: keep and group
                keep, group = result
                partner = keep.gather(1, group)
            else:  # as published
                left, source, target = (x[..., 0] for x in result)
                partner = torch.arange(tokens, device=left.device).repeat(len(left), 1)
                partner.scatter_(1, 2 * source, 2 * target + 1)
            together = unit * unit.gather(1, partner[..., None].expand_as(unit))
            return (together.sum(-1) * (partner != torch.arange(tokens, device=partner.device))).sum(1)

        return Work(
            (metric, r, 1),
            {"as published": lambda: match(metric, r)},
            flops=2 * batch * (tokens / 2) ** 2 * dim,
            error=lambda ours, theirs: relative_error(likeness(ours), likeness(theirs)),
        )

    return Case("bipartite_match", f"{batch} x {tokens} tokens, d {dim}", make)


def merge_case(batch: int, tokens: int, width: int = 1024) -> Case:
    """The residual stream of ViT-L, of whose tokens an eighth merge."""

    def make(draw: Draw) -> Work:
        x, size = draw.normal(batch, tokens, width), draw.integers(1, 9, batch, tokens)
        keep, group = bipartite_match(draw.normal(batch, tokens, 64, dtype=torch.float), tokens // 8, 1)
        n = keep.shape[1]
        place = (group + n * torch.arange(batch, device=x.device)[:, None]).flatten()

        def total() -> Tensor:
            return torch.zeros(batch * n, device=x.device).index_add_(0, place, size.flatten().float())

        def weighted() -> Tensor:
            return x * size[..., None].to(x.dtype)

        def share() -> Tensor:
            return (size.flatten() / total()[place]).to(x.dtype)

        def by_index_add() -> Tensor:
            out = x.new_zeros(batch * n, width).index_add_(0, place, weighted().view(-1, width))
            return (out / total()[:, None].to(x.dtype)).view(batch, n, width)

        def by_scatter() -> Tensor:
            index = group[..., None].expand_as(x)
            out = x.new_zeros(batch, n, width).scatter_reduce(1, index, weighted(), "sum")
            return out / total().view(batch, n, 1).to(x.dtype)

        def by_product() -> Tensor:
            return one_hot(group, n).to(x.dtype).mT @ (x * share().view(batch, tokens, 1))

        def by_bags() -> Tensor:
            by_slot, order = place.sort(stable=True)
            start = torch.searchsorted(by_slot, torch.arange(batch * n, device=x.device))
            rows = x.view(-1, width)
            out = embedding_bag(order, rows, start, mode="sum", per_sample_weights=share()[order])
            return out.view(batch, n, width)

        ways = {
            "index_add": by_index_add,
            "scatter_reduce": by_scatter,
            "embedding_bag": by_bags,
            "one-hot product": by_product,
        }
        return Work((x, group, size, n), ways)

    return Case("merge_tokens", f"{batch} x {tokens} tokens, {width} wide", make)


def farthest_case(tokens: int, kept: float) -> Case:
    """DivPrune's choice among the tokens of a picture; distances are in float32 whatever the tokens are in."""

    def make(draw: Draw) -> Work:
        unit = torch.nn.functional.normalize(draw.normal(tokens, 256, dtype=torch.float), dim=-1)
        distance, count = 1 - unit @ unit.mT, round(kept * tokens)
        start = torch.zeros(1, dtype=torch.long, device=draw.device)

        def step_by_step() -> Tensor:
            picked = torch.empty(count, dtype=torch.long, device=draw.device)
            open_ = torch.ones(tokens, dtype=torch.bool, device=draw.device)
            picked[0] = start[0]
            left = torch.full((tokens,), torch.inf, device=draw.device)
            for number in range(1, count):
                before = picked[number - 1 : number]
                open_.index_fill_(0, before, False)
                left = left.minimum(distance[before].view(-1))
                picked[number] = left.where(open_, -torch.inf).argmax()
            return picked

        return Work((distance, start, count), {"step by step": step_by_step})

    return Case("farthest_first", f"{tokens:,} points, {kept:.0%} kept", make)


def greedy_case(items: int, kept: float) -> Case:
    """CDPruner's choice among the tokens of a picture, in float32 whatever the tokens are in."""

    def make(draw: Draw) -> Work:
        unit = torch.nn.functional.normalize(draw.normal(items, 1024, dtype=torch.float), dim=-1)
        relevance = torch.rand(items, generator=draw.generator, device=draw.device)
        kernel, count = unit @ unit.mT * relevance * relevance[:, None], round(kept * items)
        least = torch.tensor(1e-6, device=draw.device)

        def step_by_step() -> tuple[Tensor, Tensor]:
            picked = torch.empty(count, dtype=torch.long, device=draw.device)
            rows, gain = kernel.new_zeros(count, items), kernel.diagonal().clone()
            for number in range(count):
                best = gain.argmax(0, keepdim=True)
                row = kernel[best] - rows[:number, best].mT @ rows[:number]
                rows[number] = row.view(-1) / gain[best].sqrt()
                gain = (gain - rows[number].square()).index_fill_(0, best, -torch.inf)
                picked[number] = best.view(())
            return picked, rows

        def growth(result: tuple[Tensor, Tensor]) -> Tensor:
            """The square roots of what the determinant grows by; of two items that are nearly as good either will do."""
            picked, rows = result
            return rows.gather(1, picked[:, None])

        return Work(
            (kernel, least, count),
            {"step by step": step_by_step},
            error=lambda ours, theirs: relative_error(growth(ours), growth(theirs)),
        )

    return Case("greedy_map", f"{items:,} items, {kept:.0%} kept", make)


def bias_case(model: str, batch: int, tokens: int, causal: bool = False) -> Case:
    """Attention over tokens of which some stand for several."""

    def make(draw: Draw) -> Work:
        query, key, value = draw.qkv(model, batch, tokens)
        heads, kv_heads, dim = HEADS[model]
        bias, scale = draw.integers(1, 9, batch, tokens).float().log(), dim**-0.5

        def masked() -> Tensor:
            mask = bias.to(query.dtype)[:, None, None]
            k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
            if causal:
                later = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
                mask = mask.expand(-1, -1, tokens, -1).masked_fill(later, -torch.inf)
            return scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=scale)

        def folded() -> Tensor:
            # eight channels: fused attention wants a multiple
            q, k, v = (pad(x, (0, 8)) for x in (query, key, value))
            q[..., dim], k[..., dim] = 1, (bias / scale)[:, None]
            return dense(q, k, v, scale, causal)[..., :dim]

        return Work(
            (query, key, value, bias, scale, causal),
            {"SDPA, bias as a mask": masked, "SDPA, bias as a channel": folded},
            {"SDPA without bias": lambda: dense(query, key, value, scale, causal)},
            flops=4 * batch * heads * dim * (causal_pairs(tokens) if causal else tokens**2),
        )

    return Case("key_bias_attention", f"{model}, {batch} x {tokens:,}{', causal' if causal else ''}", make)


def score_case(model: str, tokens: int, rows: int | None = None, batch: int = 1, known: bool = False) -> Case:
    """What each key gets from the last rows of a prefill, or from all. known: attention has told their log-sum-exp."""

    def make(draw: Draw) -> Work:
        query, key, value = draw.qkv(model, batch, tokens)
        heads, kv_heads, dim = HEADS[model]
        count = rows or tokens
        lse = attention_lse(query, key, value, is_causal=True, enable_gqa=True)[1] if known else None
        query, scale = query[:, :, tokens - count :], dim**-0.5
        lse = None if lse is None else lse[:, :, tokens - count :]
        place = torch.arange(tokens, device=draw.device)
        row, index = place[tokens - count :].repeat(batch, 1), place.repeat(batch, 1, 1)
        most = 2**28 if draw.cuda else 2**22  # logits at a time
        step = max(1, most // (batch * heads * tokens))

        def by_products() -> Tensor:
            out = torch.zeros(batch, heads, tokens, device=draw.device)
            for first in range(0, count, step):
                q = query[:, :, first : first + step]
                last = tokens - count + first + q.shape[2]
                grouped = q.reshape(batch, kv_heads, -1, dim) @ key[:, :, :last].mT
                logits = grouped.view(batch, heads, -1, last).float() * scale
                later = place[:last] > place[last - q.shape[2] : last, None]
                out[..., :last] += logits.masked_fill(later, -torch.inf).softmax(-1).sum(2)
            return out

        pairs = causal_pairs(tokens) - causal_pairs(tokens - count)
        return Work(
            (query, key, row, index, None, scale, 0, "sum", lse),
            {"products, softmax, sum": by_products},
            flops=2 * batch * heads * dim * pairs,
        )

    looking = f"{rows} rows" if rows else "all rows"
    return Case("score_rows", f"{model}, {tokens:,} keys, {looking}{', normaliser known' * known}", make)


def token_case(model: str, tokens: int, kept: float, batch: int = 1) -> Case:
    """ZipVL's prefill."""

    def make(draw: Draw) -> Work:
        query, key, value = draw.qkv(model, batch, tokens)
        heads, _, dim = HEADS[model]
        count, scale = round(kept * tokens), dim**-0.5
        chosen = draw.some(count, tokens, batch)

        def gathered() -> Tensor:
            index = chosen[:, None, :, None]
            q, k, v = (x.gather(2, index.expand(-1, x.shape[1], -1, dim)) for x in (query, key, value))
            mixed = dense(q, k, v, scale, causal=True)
            return torch.zeros_like(query).scatter_(2, index.expand(-1, heads, -1, dim), mixed)

        return Work(
            (query, key, value, chosen, scale),
            {"gather, SDPA, scatter": gathered},
            {"SDPA of all tokens": lambda: dense(query, key, value, scale, causal=True)},
            flops=4 * batch * heads * dim * causal_pairs(count),
            reads=kept * nbytes((query, key, value)),
        )

    return Case("token_prefill", f"{model}, {tokens:,} tokens, {kept:.0%} kept", make)


def block_case(model: str, tokens: int, kept: float, block: int = 128, compiled: bool = False) -> Case:
    """Every block of rows has its own list of key blocks, drawn for each head, its own block among them. compiled: beside
    FlexAttention, too."""

    def make(draw: Draw) -> Work:
        heads, _, _ = HEADS[model]
        number = torch.arange(-(-tokens // block), device=draw.device)
        count = (kept * (number + 1)).ceil().long()[:, None]
        chance = torch.rand(1, heads, len(number), len(number), generator=draw.generator, device=draw.device)
        chance.masked_fill_(number > number[:, None], -1).diagonal(dim1=2, dim2=3).fill_(2)
        rank = chance.argsort(-1, descending=True).argsort(-1)
        blocks = torch.where(rank < count, number, len(number)).sort(-1).values[..., : int(count.max())]
        blocks = blocks.masked_fill(blocks == len(number), -1).int()
        return _listed(draw, model, tokens, blocks, blocks.new_empty(*blocks.shape[:3], 0), block, compiled)

    return Case("block_prefill", f"{model}, {tokens:,} tokens, {kept:.0%} of the blocks", make)


def lines_case(model: str, tokens: int, vertical: int, slash: int, block: int = 64) -> Case:
    """Vertical-slash: some keys and the blocks on some diagonals; these lie together, as they do in language."""

    def make(draw: Draw) -> Work:
        heads, _, _ = HEADS[model]
        keys = draw.some(vertical, tokens, 1, heads)
        diagonals = torch.arange(slash, device=draw.device).repeat(1, heads, 1)
        blocks, columns = vertical_slash_index(keys, diagonals, tokens, tokens, block)
        return _listed(draw, model, tokens, blocks, columns, block, False)

    return Case("block_prefill", f"{model}, {tokens:,} tokens, {vertical:,} keys and {slash:,} diagonals", make)


def _listed(draw: Draw, model: str, tokens: int, blocks: Tensor, columns: Tensor, block: int, compiled: bool) -> Work:
    query, key, value = draw.qkv(model, 1, tokens)
    heads, kv_heads, dim = HEADS[model]
    scale, start = dim**-0.5, torch.zeros(1, dtype=torch.long, device=draw.device)
    share = computed_share(blocks, columns, start, tokens, tokens, block).mean().item()

    def masked() -> Tensor:
        mask = dense_mask(blocks, columns, start, tokens, tokens, block)
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
        return scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=scale)

    ways: dict[str, Callable[[], object]] = {}
    if tokens <= (8192 if draw.cuda else 4096):
        ways["SDPA with a mask"] = masked
    if compiled:
        ways["FlexAttention"] = flex(query, key, value, blocks, block, scale)
    return Work(
        (query, key, value, blocks, columns, start, block, scale),
        ways,
        {"SDPA of all pairs": lambda: dense(query, key, value, scale, causal=True)},
        flops=4 * heads * dim * share * causal_pairs(tokens),
    )


def flex(query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, block: int, scale: float) -> Callable[[], Tensor]:
    """torch's own block-sparse attention, compiled at its first call."""
    from torch.nn.attention.flex_attention import flex_attention

    mask, run = flex_mask(blocks, block, query.shape[2]), _compiled(flex_attention)
    return lambda: run(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])


def flex_mask(blocks: Tensor, block: int, tokens: int) -> Any:
    """The lists as FlexAttention takes them; of a block's list only its own block, the last one, needs the causal mask."""
    from torch.nn.attention.flex_attention import BlockMask

    count = (blocks >= 0).sum(-1).int()
    number = torch.arange(blocks.shape[2], device=blocks.device, dtype=torch.int32)
    own = pad(number[:, None], (0, len(number) - 1)).expand(*blocks.shape[:2], -1, -1).contiguous()
    others = blocks.clamp(min=0)  # the last of them is not counted
    return BlockMask.from_kv_blocks(
        torch.ones_like(count),
        own,
        count - 1,
        pad(others, (0, len(number) - others.shape[3])),
        BLOCK_SIZE=block,
        mask_mod=lambda b, h, row, column: column <= row,
        seq_lengths=(tokens, tokens),
    )


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def quantize_case(bits: int, dim: int, tokens: int, model: str = "llava-7b", compiled: bool = False) -> Case:
    """Keys (dim -2) or values (-1) of a prefill."""

    def make(draw: Draw) -> Work:
        _, kv_heads, width = HEADS[model]
        x = draw.normal(1, kv_heads, tokens, width)
        ways = {"torch operations": lambda: quantize_by_torch(x, bits, dim)}
        if compiled and draw.cuda:
            ways["the same, compiled"] = lambda: _compiled(quantize_by_torch)(x, bits, dim)
        return Work((x, bits, GROUP, dim, torch.half), ways, error=lambda a, b: packed_error(a, b, bits, dim))

    what = "keys" if dim == -2 else "values"
    return Case("quantize_pack", f"{model}, {tokens:,} tokens, {what} in {bits} bits", make)


def dequantize_case(bits: int, dim: int, tokens: int, model: str = "llava-7b", compiled: bool = False) -> Case:
    """The same back."""

    def make(draw: Draw) -> Work:
        _, kv_heads, width = HEADS[model]
        part = random_codes(draw, (1, kv_heads, tokens, width), bits, dim)
        ways = {"torch operations": lambda: dequantize_by_torch(part, bits, dim, draw.dtype)}
        if compiled and draw.cuda:
            ways["the same, compiled"] = lambda: _compiled(dequantize_by_torch)(part, bits, dim, draw.dtype)
        return Work((*part, bits, dim, draw.dtype), ways)

    what = "keys" if dim == -2 else "values"
    return Case("dequantize", f"{model}, {tokens:,} tokens, {what} in {bits} bits", make)


def decode_case(model: str, tokens: int, batch: int, bits: Mapping[int, float]) -> Case:
    """A decode step over a cache of which shares are in few bits (bits -> share), the newest entries in full precision."""

    def make(draw: Draw) -> Work:
        heads, kv_heads, dim = HEADS[model]
        scale = dim**-0.5
        packed: list[Tensor] = []
        for b, share in bits.items():
            n = round((tokens - RESIDUAL) * share / GROUP) * GROUP
            for along in (-2, -1):
                packed += random_codes(draw, (batch, kv_heads, n, dim), b, along)
        query = draw.normal(batch, heads, 1, dim)
        exact = [draw.normal(batch, kv_heads, RESIDUAL, dim) for _ in range(2)]

        def written_out(which: int) -> Tensor:
            along = (-2, -1)[which]
            parts = [
                dequantize_by_torch(packed[6 * i + 3 * which :][:3], b, along, draw.dtype) for i, b in enumerate(bits)
            ]
            return torch.cat([*parts, exact[which]], 2)

        full: list[Tensor] = []

        def in_full() -> Tensor:
            if not full:
                full.extend(map(written_out, range(2)))
            return step_by_sdpa(query, full[0], full[1], scale)

        return Work(
            (query, *exact, packed, list(bits), None, scale),
            {
                "dequantise, SDPA": lambda: step_by_sdpa(query, written_out(0), written_out(1), scale),
                "dequantise, products": lambda: step_by_products(query, written_out(0), written_out(1), scale),
            },
            {"SDPA, nothing in few bits": in_full},
            flops=4 * batch * heads * dim * tokens,
        )

    what = ", ".join(f"{share:.0%} in {b} bits" if share < 1 else f"{b} bits" for b, share in bits.items())
    return Case("mixed_decode", f"{model}, {batch} x {tokens:,} entries, {what}", make)


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
    """All of the attention, by torch's fused form."""
    return scaled_dot_product_attention(
        query, key, value, is_causal=causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def step_by_sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """A decode step; the query heads that share keys are rows of one head."""
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    return scaled_dot_product_attention(grouped, key, value, scale=scale).reshape(query.shape)


def step_by_products(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same as two matrix products."""
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    weights = (grouped @ key.mT).float().mul_(scale).softmax(-1).to(value.dtype)
    return (weights @ value).reshape(query.shape)


def random_codes(draw: Draw, shape: tuple[int, ...], bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `quantize_pack` could have made of values from -2 to 2."""
    codes = draw.integers(0, 256, *shape[:-1], shape[-1] * bits // 8, dtype=torch.uint8)
    groups = list(shape)
    groups[dim] //= GROUP
    spread = 1 + 0.1 * draw.normal(*groups, dtype=torch.float)
    return codes, (spread * 4 / (2**bits - 1)).half(), (-2 * spread).half()


def quantize_by_torch(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The grid as its formula says."""
    inner = -1 if dim == -1 else -2
    grouped = x.float().unflatten(dim, (-1, GROUP))
    zero = grouped.amin(inner, keepdim=True).half()
    scale = ((grouped.amax(inner, keepdim=True) - zero.float()) / (2**bits - 1)).clamp(min=2.0**-20).half()
    codes = ((grouped - zero.float()) / scale.float()).round().clamp(0, 2**bits - 1).to(torch.uint8).view(x.shape)
    packed = codes[..., : x.shape[-1] * bits // 8].clone()
    for number, part in enumerate(codes.chunk(8 // bits, -1)):
        packed = part if number == 0 else packed | part << (bits * number)
    return packed, scale.squeeze(inner), zero.squeeze(inner)


def dequantize_by_torch(part: Sequence[Tensor], bits: int, dim: int, dtype: torch.dtype) -> Tensor:
    """code * scale + zero; part: codes, scale and zero."""
    codes, scale, zero = part
    inner = -1 if dim == -1 else -2
    x = torch.cat([codes >> (bits * i) & (2**bits - 1) for i in range(8 // bits)], -1)
    grouped = x.unflatten(dim, (-1, GROUP)).float() * scale.float().unsqueeze(inner) + zero.float().unsqueeze(inner)
    return grouped.to(dtype).view(x.shape)


def packed_error(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], bits: int, dim: int) -> float:
    """Of what the codes stand for."""
    a, b = (dequantize_by_torch(x, bits, dim, torch.float) for x in (ours, theirs))
    return relative_error(a, b)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Root mean square of the difference, of that of theirs."""
    ours, theirs = ours.float(), theirs.float()
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()


def nbytes(what: object) -> int:
    """Of all tensors in it."""
    if isinstance(what, Tensor):
        return what.numel() * what.element_size()
    return sum(map(nbytes, what)) if isinstance(what, (tuple, list)) else 0


def gpu_cases() -> Iterator[Case]:
    """At the sizes that GPUs are used for."""
    for batch, tokens in ((8, 577), (32, 577), (8, 1025), (32, 1025)):
        yield match_case(batch, tokens)
        yield merge_case(batch, tokens)
    for tokens, kept in ((576, 0.5), (2880, 0.5), (4096, 0.25), (4096, 0.5)):
        yield farthest_case(tokens, kept)
    for items, kept in ((576, 0.11), (576, 0.5), (768, 0.25), (768, 0.5)):
        yield greedy_case(items, kept)
    for batch, tokens in ((8, 577), (32, 577), (8, 1025)):
        yield bias_case("vit-l", batch, tokens)
    yield bias_case("llava-next-7b", 1, 2992, causal=True)
    yield bias_case("qwen2-vl-2b", 1, 8192, causal=True)
    for model, tokens, rows in (
        ("llava-next-7b", 2992, 64),
        ("llava-next-7b", 2992, None),
        ("qwen2-vl-2b", 8192, None),
        ("qwen2-vl-2b", 32768, 64),
        ("qwen2-vl-2b", 32768, None),
    ):
        yield score_case(model, tokens, rows)
        if rows is None:
            yield score_case(model, tokens, known=True)
    for model, tokens, kept in (
        ("llava-next-7b", 2992, 0.5),
        ("llava-next-7b", 8192, 0.5),
        ("qwen2-vl-2b", 8192, 0.5),
        ("qwen2-vl-2b", 32768, 0.5),
        ("qwen2-vl-2b", 32768, 0.25),
    ):
        yield token_case(model, tokens, kept)
    yield block_case("llava-next-7b", 8192, 0.25, compiled=True)
    yield block_case("qwen2-vl-2b", 8192, 0.25, compiled=True)
    yield block_case("qwen2-vl-2b", 32768, 0.1, compiled=True)
    yield lines_case("qwen2-vl-2b", 8192, 500, 1500)
    yield lines_case("qwen2-vl-2b", 32768, 1000, 6096)
    yield from _quantized(8192)
    for batch in (1, 8):
        for bits in (2, 4, 8):
            yield decode_case("qwen2-vl-2b", 32768, batch, {bits: 1})
    for bits in (2, 4, 8):
        yield decode_case("llava-7b", 32768, 1, {bits: 1})
    for batch in (1, 8):
        yield decode_case("llava-next-7b", 32768, batch, {2: 0.75, 4: 0.25})


def cpu_cases() -> Iterator[Case]:
    """At the sizes that CPUs can do."""
    for batch in (1, 8):
        yield match_case(batch, 577)
        yield merge_case(batch, 577)
    yield farthest_case(576, 0.5)
    yield farthest_case(2880, 0.5)
    yield greedy_case(256, 0.5)
    yield greedy_case(576, 0.11)
    yield bias_case("vit-l", 1, 577)
    yield bias_case("vit-l", 8, 577)
    yield bias_case("llava-next-7b", 1, 2992, causal=True)
    yield score_case("llava-next-7b", 2992, 64)
    yield score_case("llava-next-7b", 2992)
    yield score_case("llava-next-7b", 2992, known=True)
    yield score_case("qwen2-vl-2b", 8192, 64)
    yield token_case("llava-next-7b", 2992, 0.5)
    yield token_case("qwen2-vl-2b", 8192, 0.5)
    yield block_case("llava-next-7b", 2992, 0.5, compiled=True)
    yield block_case("qwen2-vl-2b", 8192, 0.25, compiled=True)
    yield lines_case("qwen2-vl-2b", 4096, 300, 800)
    yield from _quantized(4096)
    for model in ("llava-7b", "qwen2-vl-2b"):
        for bits in (2, 4, 8):
            yield decode_case(model, 32768, 1, {bits: 1})
    yield decode_case("qwen2-vl-2b", 32768, 1, {2: 0.75, 4: 0.25})


def _quantized(tokens: int) -> Iterator[Case]:
    for make in (quantize_case, dequantize_case):
        for bits in (2, 4, 8):
            yield make(bits, -2, tokens, compiled=bits == 4)
        yield make(4, -1, tokens)


def chosen(cases: Iterable[Case], operators: Iterable[str] | None) -> list[Case]:
    """The cases of these operators, or all; ValueError for one that is not there."""
    wanted = list(operators or OPERATORS)
    if unknown := set(wanted) - set(OPERATORS):
        raise ValueError(f"no operator {', '.join(map(repr, sorted(unknown)))}; there are: {', '.join(OPERATORS)}")
    order = list(OPERATORS)
    return sorted((case for case in cases if case.operator in wanted), key=lambda case: order.index(case.operator))
