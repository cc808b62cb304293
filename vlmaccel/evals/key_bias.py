"""What a large `k_proj.bias` does to a quantised KV cache, and what `MixedPrecisionKV(key_bias=True)` makes of it.

    python -m vlmaccel.evals.key_bias [--out FILE]

Qwen2 and Qwen2.5 add a constant to all keys of a layer: in Qwen2.5-7B its norm is about 605 in the first layer, 921 in the
last and 22 in the median one (as reported for llama.cpp, issue 21385), and caches in few bits fail there (transformers,
issue 35185). Two tables:

1. Attention of random queries to random keys of 128 channels with rotary positions and such a bias on 5 channels that
   rotate slowly, faster and fast: divergence of each row of attention from what it is with exact keys.
2. Perplexity of real weights. SmolLM2-135M (`python -m vlmaccel.evals.smollm2` gets it) is a Llama without biases; as a
   Qwen2 with biases of 0 it computes the same. Into its first and its last layer a bias is planted then, of norms 605 and
   921, on 4 pairs of channels of every KV head that turn once in 6 to 300 tokens. As it is, it would drown all that
   these heads attend to, for unlike a trained model's, their queries never learned to live with it. So the queries are
   scaled down on these pairs, until what the bias adds to a logit has a root mean square of `--effect` over the text (1
   and 4; in the first table it is 12.5): a pattern of distances, and the way by which errors of the touched channels
   tell. What that is in Qwen2.5 is not known here; 0 would hide those errors, which flatters a grid per channel. What
   the queries read there of the tokens themselves is mostly lost. The planted model is thus another one than SmolLM2,
   and its own perplexity with an exact cache in bfloat16 is what its quantised caches are compared with.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.cache_utils import Cache, QuantizedCache, QuantizedLayer
from transformers.models.qwen2 import modeling_qwen2
from transformers.utils import is_optimum_quanto_available

import vlmaccel
from vlmaccel.adapters.decoder import cache_of
from vlmaccel.cache import KeyBias
from vlmaccel.cache.store import channels_of
from vlmaccel.evals.smollm2 import default_directory
from vlmaccel.evals.text import Perplexity, cut, load, perplexity, text_source, tokens_of
from vlmaccel.evals.timing import machine
from vlmaccel.hooks import Method
from vlmaccel.kernels.quantize_pack import dequantize, quantize_pack, scale_dtype
from vlmaccel.methods import MixedPrecisionKV

BANDS = {"no bias": (), "low": (50, 53, 56, 59, 62), "mid": (20, 21, 22, 23, 24), "high": (1, 3, 5, 7, 9)}
"""Pairs of channels, of 64, that have a bias; at theta 1e6 pair i turns once in 2 pi 1e6^(i / 64) tokens."""
QUANTISERS = {
    "per token, g=64": (-1, 64, False),
    "per channel, g=32 (KIVI)": (-2, 32, False),
    "per channel, bias off": (-2, 32, True),
    "per token, bias off": (-1, 64, True),
}
"""The dimension that groups lie along, their size, and whether the rotated bias is taken off before and put back after."""
SAME = [
    *("vocab_size", "hidden_size", "intermediate_size", "hidden_act", "rms_norm_eps", "tie_word_embeddings"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rope_parameters", "max_position_embeddings"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
]
"""What the configurations of a Llama and of the Qwen2 that equals it have in common."""
NORMS = {0: 605.0, -1: 921.0}
TURNS = (6.3, 24.0, 90.0, 300.0)  # tokens in which planted pairs turn once, about


# Random keys


@torch.no_grad()
def simulate(heads: int = 8, tokens: int = 512, rows: int = 64, norm: float = 200.0, seed: int = 0) -> list[dict]:
    """Mean KL divergence (nats) of the last `rows` rows of attention: a dict a quantiser and number of bits, with
    "quantiser", "bits" and a value for each of `BANDS`."""
    dim, kv_config = 128, {"hidden_size": heads * 128, "num_attention_heads": heads, "num_key_value_heads": heads}
    config = transformers.Qwen2Config(**kv_config, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    rotary, rotate = modeling_qwen2.Qwen2RotaryEmbedding(config), modeling_qwen2.apply_rotary_pos_emb
    random = torch.Generator().manual_seed(seed)
    query, content = (torch.randn(1, heads, tokens, dim, generator=random) for _ in range(2))
    sign = torch.randn(heads, dim, generator=random).sign()
    cos, sin = rotary(content, position_ids=torch.arange(tokens)[None])
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()[-rows:]
    found: dict[tuple[str, int], dict[str, float]] = {}
    for band, pairs in BANDS.items():
        bias = torch.zeros(heads, dim)
        if pairs:
            bias[:, list(pairs)] = norm / math.sqrt(len(pairs)) * sign[:, list(pairs)]
        queries, keys = rotate(query, content + bias[:, None], cos, sin)
        rotated = KeyBias(bias, rotary, rotate).at(torch.arange(tokens)[None, None, None])
        exact = _attention(queries[..., -rows:, :], keys, visible)
        for bits in (4, 2):
            for name, (along, group, off) in QUANTISERS.items():
                left = keys - rotated if off else keys
                packed = quantize_pack(left, bits, group, along, scale_dtype(left))
                back = dequantize(*packed, bits, along, torch.float) + (rotated if off else 0)
                log_p = _attention(queries[..., -rows:, :], back, visible)
                divergence = (exact.exp() * (exact - log_p)).masked_fill(~visible, 0).sum(-1).mean().item()
                found.setdefault((name, bits), {})[band] = divergence
    return [{"quantiser": name, "bits": bits} | row for (name, bits), row in found.items()]


def _attention(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """Logarithms of the attention of query (..., r, d) to key (..., n, d), in float64; visible: (r, n) bool."""
    logits = query.double() @ key.double().mT / math.sqrt(key.shape[-1])
    return logits.masked_fill(~visible, -torch.inf).log_softmax(-1)


# Real weights


def to_qwen2(model: Any, dtype: torch.dtype | None = None) -> Any:
    """A Llama without biases as a Qwen2, whose biases are 0, that computes the same; a Qwen2 as a copy.

    dtype: of the copy, by default the model's. Raises ValueError for a Llama that no Qwen2 can equal.
    """
    old = model.config
    head_dim = getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads
    if getattr(old, "attention_bias", False) or getattr(old, "mlp_bias", False):
        raise ValueError("the model has biases of its own")
    if old.hidden_size != old.num_attention_heads * head_dim:
        raise ValueError("heads of a Qwen2 share the hidden size, and those of this model do not")
    config = transformers.Qwen2Config(**{name: getattr(old, name) for name in SAME})
    new = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype or model.dtype)
    missing, unexpected = new.load_state_dict(model.state_dict(), strict=False)
    if unexpected or any(not name.endswith("_proj.bias") for name in missing):
        raise ValueError(f"the weights are not those of a Llama: {[*missing, *unexpected][:3]}")
    with torch.no_grad():
        for name in missing:
            new.get_parameter(name).zero_()
    return new.eval().to(model.device)


@torch.no_grad()
def plant(model: Any, ids: Tensor, norms: Mapping[int, float] = NORMS, effect: float = 1.0, seed: int = 0) -> None:
    """Give layers of a Qwen2, in place, a key bias of so large a norm; see above.

    ids: (B, N) int64, text on which queries are measured. effect: root mean square of what the bias adds to a logit,
    over the text's queries, the heads of each KV head and all distances.
    """
    config, random = model.config, torch.Generator().manual_seed(seed)
    dim = config.hidden_size // config.num_attention_heads
    speed = model.model.rotary_emb.inv_freq.cpu().float()
    pairs = sorted({int((2 * math.pi / speed - turn).abs().argmin()) for turn in TURNS})
    both = torch.tensor([*pairs, *(pair + dim // 2 for pair in pairs)])
    layers = [model.model.layers[layer].self_attn for layer in norms]
    queries: list[Tensor] = []
    handles = [a.q_proj.register_forward_hook(lambda module, args, out: queries.append(out.float())) for a in layers]
    try:
        model.model(ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    order = sorted(range(len(layers)), key=lambda i: layers[i].layer_idx)
    for i, query in zip(order, queries, strict=True):
        attention, norm = layers[i], list(norms.values())[i]
        size = norm / math.sqrt(config.num_key_value_heads * len(pairs))
        bias = torch.zeros(config.num_key_value_heads, dim)
        bias[:, pairs] = size * torch.randn(bias.shape, generator=random).sign()[:, pairs]
        attention.k_proj.bias.copy_(bias.flatten())
        # a pair of a query of length r adds size * r * cos(angle) / sqrt(dim), and angles are all as likely
        touched = query.unflatten(-1, (config.num_key_value_heads, -1, dim))[..., both].unflatten(-1, (2, -1))
        power = touched.square().sum(-2).mean((0, 1, 3)) * size**2 / (2 * dim)  # (H_kv, pairs)
        scale = (effect / (power.sum(-1, keepdim=True).sqrt().clamp(min=1e-30))).expand_as(power).repeat(1, 2)
        rows = attention.q_proj.weight.unflatten(0, (config.num_key_value_heads, -1, dim))
        rows[:, :, both] *= scale[:, None, :, None].to(rows)
        had = attention.q_proj.bias.unflatten(0, (config.num_key_value_heads, -1, dim))
        had[:, :, both] *= scale[:, None].to(had)


class PerTokenLayer(QuantizedLayer):
    """A layer of transformers' quantised cache on the grid of this package: per token, which is its default with quanto."""

    def _quantize(self, tensor: Tensor, axis: int) -> tuple:
        packed = quantize_pack(
            tensor, self.nbits, channels_of(tensor.shape[-1], self.q_group_size), -1, scale_dtype(tensor)
        )
        return *packed, self.nbits, -1, tensor.dtype

    def _dequantize(self, packed: tuple) -> Tensor:
        return dequantize(*packed)


@contextmanager
def given_cache(model: Any, make: Callable[[], Any]) -> Iterator[None]:
    """Inside it, a forward that would make a cache takes a new one of `make()`."""

    # its name was `past_key_values` until transformers 5.23
    name = next(n for n in ("cache", "past_key_values") if n in inspect.signature(model.forward).parameters)

    def add(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not kwargs.get("use_cache") or cache_of(kwargs) is not None:
            return None
        return args, kwargs | {name: make()}

    handle = model.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Way:
    """A way to hold the cache: unquantised in a dtype, a method, or another cache class."""

    dtype: torch.dtype = torch.bfloat16
    method: Method | None = None
    cache: Callable[[Any], Any] | None = None

    def on(self, model: Any) -> AbstractContextManager[Any]:
        if self.method is not None:
            return vlmaccel.patched(model, self.method)
        return nullcontext() if self.cache is None else given_cache(model, partial(self.cache, model.config))


SMOLLM2, BASE, KEPT, STAND_IN = "SmolLM2", "exact, bfloat16", ", bias kept", "stand-in for QuantizedCache"


def ways(residual: int, quanto: bool) -> dict[str, Way]:
    """What is compared; the first is what the others are compared with."""
    made = {BASE: Way(), "exact, float32": Way(torch.float32)}
    for bits in (4, 2):
        for window in dict.fromkeys((residual, 128)):
            for off in (True, False) if window == residual else (True,):
                method = MixedPrecisionKV(by="position", low_bits=bits, residual=window, key_bias=off)
                made[f"{bits} bits, window {window}{'' if off else KEPT}"] = Way(method=method)
    if quanto:
        made["QuantizedCache, quanto"] = Way(cache=lambda config: QuantizedCache("quanto", config))
    else:
        made[STAND_IN] = Way(cache=stand_in)
    return made


def stand_in(config: Any) -> Cache:
    """transformers' quantised cache with its defaults (4 bits, groups of 64, window 128), without its libraries."""
    return Cache(layers=[PerTokenLayer() for _ in range(config.num_hidden_layers)])


def compare(
    model: Any, windows: Tensor, compared: Mapping[str, Way], told: Callable[[str], object] = print
) -> dict[str, Perplexity]:
    """Perplexity of the second half of windows (W, context) behind a prefill of the first, each way. model: a Qwen2."""
    found = {}
    for dtype in dict.fromkeys(way.dtype for way in compared.values()):
        cast = to_qwen2(model, dtype)  # .to(dtype) would cut the digits of the rotary embedding's frequencies, too
        for name, way in compared.items():
            if way.dtype == dtype:
                start = time.perf_counter()
                with way.on(cast):
                    found[name] = perplexity(cast, windows, batch_size=len(windows))
                told(f"{name}: {found[name].ppl:.3f} ({time.perf_counter() - start:.0f} s)")
    return {name: found[name] for name in compared}


def planted_and_not(
    llama: Any, windows: Tensor, compared: Mapping[str, Way], effects: Sequence[float]
) -> tuple[float, dict[str, dict[str, Perplexity]]]:
    """How far logits of the Llama and the equal Qwen2 are apart; what `compare` finds for that and each planted one."""
    qwen, log = to_qwen2(llama), Console(stderr=True)
    first = windows[:1].to(llama.device)
    with torch.inference_mode():
        apart = (llama(first).logits - qwen(first).logits).abs().max().item()
    if apart > 1e-4:
        raise RuntimeError(f"logits of the Qwen2 are {apart:.1e} off those of the Llama")
    # without a bias to take off, both are the same
    once = {name: way for name, way in compared.items() if not name.endswith(KEPT)}
    models = {SMOLLM2: compare(qwen, windows, once, log.print)}
    for effect in effects:
        planted = to_qwen2(qwen)
        plant(planted, windows[:2], effect=effect)
        log.print(name := f"planted, effect {effect:g}")
        models[name] = compare(planted, windows, compared, log.print)
    return apart, models


# What is printed


def simulation_table(rows: list[dict]) -> Table:
    made = Table(title="KL of attention rows, nats", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    made.add_column("key quantiser")
    for name in ("bits", *BANDS):
        made.add_column(name if name in ("bits", "no bias") else f"{name} freq.", justify="right")
    for row in rows:
        made.add_row(row["quantiser"], str(row["bits"]), *(f"{row[band]:.2g}" for band in BANDS))
    return made


def perplexity_table(models: Mapping[str, Mapping[str, Perplexity]], title: str) -> Table:
    """A line a way; for every model its perplexity with an exact cache in bfloat16, and changes to that ± one standard
    error over the windows."""
    made = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    made.add_column("KV cache")
    for name in models:
        made.add_column(name.replace(", ", ",\n"), justify="right", no_wrap=True)
    for way in max(models.values(), key=len):
        made.add_row(way, *(_cell(found, way) for found in models.values()))
    return made


def _cell(found: Mapping[str, Perplexity], way: str) -> str:
    if way not in found:
        return "-"
    change, error = found[way].change(found[BASE])
    return f"ppl {found[way].ppl:.3f}" if way == BASE else f"{100 * change:+.2f}% ± {100 * error:.2f}"


def facts(models: Mapping[str, Mapping[str, Perplexity]]) -> dict[str, Any]:
    """The same for JSON, with the loss of every window."""
    made: dict[str, Any] = {}
    for name, found in models.items():
        for way, result in found.items():
            change, error = result.change(found[BASE])
            row = {"ppl": result.ppl, "change": change, "change_error": None if math.isnan(error) else error}
            made.setdefault(name, {})[way] = row | {"tokens": result.tokens, "losses": result.losses}
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all numbers there, as JSON")
    parser.add_argument("--only", choices=("simulation", "perplexity"), help="one of the two")
    parser.add_argument("--context", type=int, default=384, help="tokens of a window (default %(default)s)")
    parser.add_argument("--windows", type=int, default=6, help="how many (default %(default)s)")
    parser.add_argument("--residual", type=int, default=32, help="newest tokens held exact (default %(default)s)")
    parser.add_argument(
        "--effect", type=float, nargs="+", default=[1.0, 4.0], help="a planted model each (default 1 4)"
    )
    args = parser.parse_args(arguments)
    console = Console()
    result: dict[str, Any] = {"vlmaccel": vlmaccel.__version__}
    if args.only != "perplexity":
        result["simulation"] = simulate()
        console.print(simulation_table(result["simulation"]))
    if args.only != "simulation":
        try:
            llama, tokenizer = load(str(default_directory()), "float32")
        except ValueError:
            print("vlmaccel: no SmolLM2 here: python -m vlmaccel.evals.smollm2 gets it", file=sys.stderr)
            return 1
        windows = cut(tokens_of(tokenizer, text_source()), args.context, args.windows)
        compared = ways(args.residual, is_optimum_quanto_available())
        apart, models = planted_and_not(llama, windows, compared, args.effect)
        methods = {name: repr(way.method) for name, way in compared.items() if way.method is not None}
        settings = {key: getattr(args, key) for key in ("context", "windows", "residual", "effect")}
        settings |= {"norms": list(NORMS.values()), "turns": TURNS, "methods": methods}
        result |= {"settings": settings, "machine": machine(llama), "logits_apart": apart, "perplexity": facts(models)}
        scored = models[SMOLLM2][BASE].tokens
        title = f"Perplexity of {scored} tokens behind {args.context - scored}, {args.windows} windows"
        console.print(perplexity_table(models, title))
        if STAND_IN in compared:
            console.print(f"{STAND_IN}: its window, groups and axis; pip install 'vlmaccel[quanto]' for itself")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
