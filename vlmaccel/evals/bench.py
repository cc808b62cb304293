"""What a method gains in time and memory on a model of a real shape, against the same model without it.

What is timed is the **decoder**: the picture is encoded once, beforehand, and both ways start from the same
encoded picture (`include_tower=True` starts from pixels instead). "prefill" is then the time to the first
token without the vision tower, and "decode" that of each later token, with all that `generate` does around.

*Efficiency* = measured speed-up of the prefill / ratio of FLOPs (unpatched / patched): 1 means that every
saved FLOP saved its share of time. FLOPs are counted while the model runs, the method's own scoring included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import vlmaccel
from vlmaccel.evals.bench_result import BenchResult, Phase, render
from vlmaccel.evals.shapes import build, get_shape, prompt
from vlmaccel.evals.timing import (
    Spread,
    clock_for,
    machine,
    measure_in_turn,
    peak_memory,
    time_generate,
)
from vlmaccel.flops import count_flops
from vlmaccel.methods import make

__all__ = ["BenchResult", "Phase", "encode", "first_logits", "render", "run_bench"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_bench(
    shape: str = "llava-1.5-7b",
    method: str | Any | Sequence[Any] | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    depth: int = 4,
    vision_depth: int = 2,
    text_tokens: int = 64,
    batch: int = 1,
    new_tokens: int = 8,
    dtype: str | None = None,
    device: str = "cpu",
    attn_implementation: str = "sdpa",
    repeats: int = 5,
    warmup: int = 1,
    keep_all: bool = False,
    include_tower: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> BenchResult:
    """Build the shape with random weights and measure it patched against unpatched, in turn, in one run.

    shape: a name of `vlmaccel.evals.shapes.SHAPES`. method, options: as for `vlmaccel.patch`.
    depth, vision_depth: layers of the decoder and of the vision tower (at most the published number).
    dtype: float32, bfloat16 or float16; by default float32 on a CPU, bfloat16 elsewhere.
    keep_all: give the method (a name, or None) ratio 1, so that it drops nothing: what is left is the
        overhead of being patched.
    progress: called with a short text before each step.
    Raises ValueError for an unknown shape, method or dtype, a wrong value, or a depth that the shape does not
    have; TypeError for an unknown option.
    """
    say = progress or (lambda text: None)
    vision = get_shape(shape).vision is not None
    dtype = dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    options = dict(options or {})
    if keep_all:
        if method is not None and not isinstance(method, str):
            raise ValueError(f"keep_all needs the name of one method, or None, not {method!r}")
        options = {k: v for k, v in options.items() if k != "ratios"} | {"ratio": 1.0}
    if isinstance(method, str):
        make(method, **options)  # a mistake in it shows before a large model is built
    say(f"building {shape} with {depth} layers")
    model = build(
        shape,
        depth,
        DTYPES[dtype],
        vision_depth if vision else None,
        device=device,
        attn_implementation=attn_implementation,
        seed=seed,
    )
    inputs: dict[str, Any] = prompt(model, shape, text_tokens, batch, seed)
    if vision and not include_tower:
        inputs = encode(model, inputs)
    patched = lambda: vlmaccel.patched(model, method, **options)  # noqa: E731

    say("measuring memory and counting FLOPs")
    flops: list[int] = []
    peaks: list[int] = []
    logits: list[Tensor] = []
    for switch in (nullcontext, patched):
        with switch():
            peaks.append(peak_memory(lambda: logits.append(first_logits(model, inputs)), device))
            flops.append(count_flops(lambda: first_logits(model, inputs)))
            if switch is patched:
                stats = vlmaccel.stats(model)
    assert isinstance(stats, vlmaccel.Stats)  # every shape here has a decoder

    generate = lambda: time_generate(model, inputs, new_tokens)  # noqa: E731
    measured = measure_in_turn(
        {"unpatched": generate, "patched": generate},
        repeats,
        contexts={"patched": patched},
        warmup=warmup,
        device=device,
        progress=lambda way, turn: say(f"turn {turn + 1} of {repeats}, {way}" if turn >= 0 else f"warm-up, {way}"),
    )
    clock = clock_for(device)

    def phase(name: str) -> Phase:
        return Phase(
            measured.speedup("patched", "unpatched", name, clock),
            measured.speedup("patched", "unpatched", name, "wall"),
            measured.time("unpatched", name, "wall"),
            measured.time("patched", name, "wall"),
            measured.time("unpatched", name, "cpu"),
            measured.time("patched", name, "cpu"),
        )

    prefill, ratio = phase("prefill"), flops[0] / flops[1]
    return BenchResult(
        shape=shape,
        method=" + ".join(stats.methods),
        options=options,
        keep_all=keep_all,
        include_tower=include_tower and vision,
        depth=depth,
        vision_depth=vision_depth if vision else 0,
        batch=batch,
        text_tokens=text_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        clock=clock,
        machine=machine(model),
        prefill=prefill,
        decode=phase("decode") if new_tokens > 1 else None,
        efficiency=Spread(*(x / ratio for x in (prefill.speedup.median, prefill.speedup.low, prefill.speedup.high))),
        flops_unpatched=flops[0],
        flops_patched=flops[1],
        flops_ratio_closed=1 / stats.flops_ratio,
        peak_unpatched=peaks[0],
        peak_patched=peaks[1],
        kv_unpatched=stats.kv_bytes_full,
        kv_patched=stats.kv_bytes,
        tokens_nominal=inputs["input_ids"].shape[1],
        visual_tokens_nominal=stats.nominal_visual_tokens,
        tokens=list(stats.tokens),
        visual_tokens=list(stats.visual_tokens),
        max_logit_difference=(logits[0].float() - logits[1].float()).abs().max().item(),
    )


@torch.no_grad()
def encode(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs with the pictures encoded and projected, as `generate` hands them to the decoder."""
    pixels = {key: inputs[key] for key in ("pixel_values", "image_sizes", "image_grid_thw") if key in inputs}
    features = model.get_image_features(**pixels, return_dict=True)
    # grids of patches tell positions too
    return {key: value for key, value in inputs.items() if key not in pixels or key == "image_grid_thw"} | {
        "mm_encoder_outputs": {"image": features}
    }


@torch.no_grad()
def first_logits(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """A prefill with a KV cache: the logits (batch, vocabulary) of the first token."""
    copied = {k: dict(v) if k == "mm_encoder_outputs" else v for k, v in inputs.items()}
    return model(**copied, use_cache=True, logits_to_keep=1).logits[:, -1]
