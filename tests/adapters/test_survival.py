"""A patched model lives through what people do to models: copies, files, devices, dtypes, compilers, threads."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import cpu_offload, dispatch_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

import vlmaccel
from tests.support.drops import FixedDrop, KeepAll, assert_like_reference, decode, make_plan, policy, reference_traces
from tests.support.lifecycle import GREEDY, MODELS, anatomy, drop, outcome, same
from tests.support.models import DEPTH, IMAGE, KINDS, QWEN, build, inputs
from vlmaccel.methods import DivPrune, FastV, PyramidDrop, Registers, ToMe, ToMeDecoder

VLM = "llava-clip-llama"


@pytest.mark.parametrize("kind", MODELS)
def test_deepcopy_is_independent(kind: str) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    before, clean = outcome(model, batch), anatomy(model)
    vlmaccel.patch(model, drop(kind, batch))
    right = outcome(model, batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():  # the twin must not read the original's weights
        for parameter in model.parameters():
            parameter.mul_(0)
    assert same(outcome(twin, batch), right)
    vlmaccel.unpatch(model)
    assert same(outcome(twin, batch), right)
    vlmaccel.unpatch(twin)
    assert anatomy(twin) == clean
    assert same(outcome(twin, batch), before)


# a LLaVA that has run cannot be pickled, patched or not: transformers keeps a local function among its hooks
@pytest.mark.parametrize(("kind", "used"), [("llama", False), ("llama", True), ("llava-clip-llama", False)])
@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_pickle_round_trip(kind: str, how: str, used: bool) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    before = outcome(build(kind), batch)
    vlmaccel.patch(model, "uniform", layer=1, ratio=0.5)
    right = outcome(model, batch) if used else None
    if how == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    right = right or outcome(model, batch)
    assert not same(right, before)
    vlmaccel.unpatch(model)
    assert same(outcome(again, batch), right)
    assert same(outcome(vlmaccel.unpatch(again), batch), before)


@pytest.mark.parametrize("kind", ["llama", "llava-clip-llama"])
def test_save_pretrained_writes_an_ordinary_checkpoint(kind: str, tmp_path: Path) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    before, clean = outcome(model, batch), anatomy(model)
    model.save_pretrained(tmp_path / "plain")
    vlmaccel.patch(model, drop(kind, batch))
    outcome(model, batch)
    model.save_pretrained(tmp_path / "patched")
    names = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert sorted(p.name for p in (tmp_path / "patched").iterdir()) == names
    for name in names:
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    load = LlavaForConditionalGeneration if kind.startswith("llava") else AutoModelForCausalLM
    again = load.from_pretrained(tmp_path / "patched")
    assert same(outcome(again, batch), before)
    assert {k: v[2] for k, v in anatomy(again).items() if isinstance(v, tuple)} == {
        k: v[2] for k, v in clean.items() if isinstance(v, tuple)
    }


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_another_dtype(kind: str, dtype: torch.dtype) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    method = drop(kind, batch)
    early = vlmaccel.patch(model, method).to(dtype)
    late = vlmaccel.patch(build(kind).to(dtype), method)
    assert same(outcome(early, batch), outcome(late, batch))
    assert early(**batch).logits.dtype == dtype
    assert not same(outcome(early, batch), outcome(vlmaccel.unpatch(late), batch))


@pytest.mark.parametrize("kind", ["llama", "llava-clip-llama", "llava-next", "qwen3-vl"])
@pytest.mark.parametrize("order", ["patch first", "patch last"])
@pytest.mark.parametrize("how", ["cpu_offload", "dispatch_model"])
@torch.no_grad()
def test_accelerate(kind: str, order: str, how: str, tmp_path: Path) -> None:
    batch = inputs(kind, 3, pad=True)
    method = drop(kind, batch)
    right = outcome(vlmaccel.patch(build(kind), method), batch)
    model = build(kind)
    if order == "patch first":
        vlmaccel.patch(model, method)
    if how == "cpu_offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        text = "model" if kind == "llama" else "model.language_model"
        tops = [f"model.{name}" for name, _ in model.model.named_children() if f"model.{name}" != text]
        tops += [f"{text}.{name}" for name in ("embed_tokens", "norm", "rotary_emb") if f"{text}.{name}" not in tops]
        homes = dict.fromkeys([*(t for t in tops if t != f"{text}.layers"), "lm_head"], "cpu")
        homes |= {f"{text}.layers.{k}": "disk" if k % 2 else "cpu" for k in range(DEPTH)}
        homes |= {name: "cpu" for name, _ in model.named_parameters() if name.endswith("image_newline")}
        dispatch_model(model, homes, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    if order == "patch last":
        vlmaccel.patch(model, method)
    logits = model(**batch).logits * batch["attention_mask"][..., None]
    assert torch.equal(logits, right[0])
    if not (kind == "llava-next" and how == "cpu_offload"):  # unpatched, generate fails on the offloaded image_newline
        assert torch.equal(model.generate(**batch, **GREEDY), right[1])


def shallow(kind: str) -> Any:
    """Only two decoder layers, which compile faster; three where the tower's features go into that many."""
    model: Any = build(kind)
    text = getattr(model.model, "language_model", model.model)
    depth = 3 if kind == "qwen3-vl" else 2
    text.layers = text.layers[:depth]
    text.config.num_hidden_layers = depth
    return model


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("llama", "wrapped"),
        ("llava-clip-llama", "decoder"),
        pytest.param("llama", "decoder", marks=pytest.mark.slow),
        pytest.param("llama", "model", marks=pytest.mark.slow),
        pytest.param("qwen3-vl", "decoder", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_torch_compile(kind: str, part: str) -> None:
    """Patched and unpatched after a compiled call: the hooks that count are those of now."""
    batch = inputs(kind, 3, pad=True)
    real = batch["attention_mask"][..., None]
    method = FixedDrop(make_plan(batch["attention_mask"], (1,)), policy(kind, "renumber"))
    later = torch.full((3, 1), 7)
    plain = decode(shallow(kind), batch, later)
    right = decode(vlmaccel.patch(shallow(kind), method), batch, later)
    model = shallow(kind)
    torch._dynamo.reset()
    if part == "wrapped":
        model = torch.compile(model, backend="eager")
    else:
        whole_or_part = model if part == "model" else getattr(model.model, "language_model", model.model)
        whole_or_part.compile(backend="eager")

    def agrees(want: tuple[Tensor, Tensor]) -> bool:
        prompt, steps = decode(model, batch, later)
        return float(((prompt - want[0]) * real).abs().max()) < 2e-5 and float((steps - want[1]).abs().max()) < 2e-5

    try:
        assert agrees(plain)
        assert vlmaccel.patch(model, method) is model
        assert agrees(right)
        vlmaccel.unpatch(model)
        assert agrees(plain)
    finally:
        torch._dynamo.reset()


LEARNING: dict[str, Any] = {
    "pyramiddrop": PyramidDrop(ratio=0.5),
    "fastv": FastV(layer=2, ratio=0.4),
    "divprune": DivPrune(ratio=0.5),
    "tome-decoder": ToMeDecoder(layer=1, ratio=0.5),
    "registers": Registers(registers=3, layer=2),
    "tower": ToMe(r=2, after="carry"),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("kind", ["llava-clip-llama", "qwen3-vl"])
def test_gradient_checkpointing_changes_no_gradient(kind: str, name: str, reentrant: bool) -> None:
    if kind != VLM and name == "tower":
        return
    model, batch = build(kind), inputs(kind, 3, pad=True)
    labels = batch["input_ids"].clone()
    labels[:, :-4] = -100
    for weight, parameter in model.named_parameters():
        parameter.requires_grad_("language_model" in weight or "projector" in weight or name == "tower")
    model.train()
    if reentrant:  # which sees gradients of arguments only
        model.enable_input_require_grads()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        model(**batch, labels=labels).loss.backward()
        return {weight: p.grad for weight, p in model.named_parameters() if p.grad is not None}

    with vlmaccel.patched(model, LEARNING[name]):
        plain = gradients()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        again = gradients()
        stats = vlmaccel.stats(model)
    assert stats.stages or stats.tower
    assert plain.keys() == again.keys() and any(gradient.abs().sum() > 0 for gradient in plain.values())
    for weight, gradient in plain.items():
        assert torch.allclose(again[weight], gradient, atol=1e-6), weight


@pytest.mark.parametrize("kind", ["llama", "llava-clip-llama"])
def test_a_cache_that_cannot_shrink_keeps_everything_and_says_so_once(kind: str) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    static = dict(**GREEDY, cache_implementation="static")
    with torch.no_grad():
        right = model.generate(**batch, **static)
    vlmaccel.patch(model, drop(kind, batch))
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("default")
        got = model.generate(**batch, **static)
        model.generate(**batch, **static)
    assert torch.equal(got, right)
    told = [str(w.message) for w in caught if "StaticLayer" in str(w.message)]
    assert len(told) == 1
    assert "nothing is dropped" in told[0]


# Qwen-VL tells positions by ids: a caller without them has to give positions, see test_qwen_vl.py
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in QWEN])
@torch.no_grad()
def test_embeddings_instead_of_ids(kind: str) -> None:
    """`inputs_embeds` alone: with the placeholders' embeddings and pictures, or (as some callers do) all filled in."""
    model, batch = build(kind), inputs(kind, 3, pad=True)
    mask, method = batch["attention_mask"], drop(kind, batch)
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    embeds = model.get_input_embeddings()(batch["input_ids"])
    plain = outcome(model, batch)
    right = outcome(vlmaccel.patch(model, method), batch)
    logits = model(inputs_embeds=embeds, **rest).logits * mask[..., None]
    assert torch.equal(logits, right[0])
    said = model.generate(inputs_embeds=embeds, **rest, **GREEDY)
    assert torch.equal(said, right[1][:, mask.shape[1] :])
    if "pixel_values" in batch:
        names = {k: v for k, v in batch.items() if k in ("pixel_values", "image_sizes", "batch_num_images")}
        features = torch.cat(list(model.get_image_features(**names).pooler_output))
        filled = embeds.clone()
        filled[batch["input_ids"] == IMAGE] = features
        logits = model(inputs_embeds=filled, attention_mask=mask).logits * mask[..., None]
        assert torch.equal(logits, right[0])
        # what a token is cannot be told any more: the default recipe drops nothing and the answers stay right
        vlmaccel.patch(vlmaccel.unpatch(model))
        logits = model(inputs_embeds=filled, attention_mask=mask).logits * mask[..., None]
        assert torch.equal(logits, plain[0])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@torch.no_grad()
def test_hidden_states_can_be_asked_for(kind: str, positions: str) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    method = drop(kind, batch, positions)
    mask = batch["attention_mask"]
    plain = model(**batch, output_hidden_states=True)
    with vlmaccel.patched(model, KeepAll(tuple(range(DEPTH)), "selection")):
        same_ones = model(**batch, output_hidden_states=True)
    real = mask.bool()
    for a, b in zip(plain.hidden_states, same_ones.hidden_states, strict=True):
        assert torch.equal(a[real], b[real])
    with vlmaccel.patched(model, method):
        out = model(**batch, output_hidden_states=True)
        said = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_hidden_states=True)
    assert len(out.hidden_states) == len(said.hidden_states[0]) == DEPTH + 1
    traces = reference_traces(model, batch, mask.new_zeros(3, 0), method.plan, method.positions or "renumber")
    assert_like_reference(traces, mask, out.logits, None)
    for b, trace in enumerate(traces):
        start = int((mask[b] == 0).sum())
        # Qwen3-VL adds features of the pictures behind what it shows
        shown = (batch["input_ids"][b, start:] != IMAGE) | (kind not in QWEN)
        assert (out.hidden_states[1][b, start:] - trace.inputs[1])[shown].abs().max() < 2e-5


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_the_same_in_a_thread(kind: str) -> None:
    """Two threads use one patched model at the same time; neither sees the other's tokens."""
    model, small, large = build(kind), inputs(kind, 2), inputs(kind, 3, pad=True)
    vlmaccel.patch(model, "uniform", layer=1, ratio=0.5, target=None)
    right = [outcome(model, small), outcome(model, large)]

    def work(which: int) -> bool:
        return all(same(outcome(model, (small, large)[which]), right[which]) for _ in range(3))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, (0, 1)))


@torch.no_grad()
def test_a_decode_after_the_patch_came_and_went() -> None:
    """A cache filled by the unpatched model is continued by a patched one."""
    kind = "llava-clip-mistral"
    model, batch = build(kind), inputs(kind, 3, pad=True)
    later = torch.randint(2, 110, (3, 8), generator=torch.Generator().manual_seed(5))
    plain = decode(model, batch, later)
    out = model(**batch, use_cache=True)
    with vlmaccel.patched(model, KeepAll((0, 3), "selection")):
        seen = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
        step = model(later[:, :1], attention_mask=seen, past_key_values=out.past_key_values)
    assert torch.equal(step.logits[:, -1], plain[1][:, 0])


def test_continuous_batching_is_refused(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("ContinuousBatchingLogger")
    monkeypatch.setattr(logger, "propagate", True)
    model = build("llama")
    config = hf.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = hf.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)

    def answers() -> list[list[int]]:
        prompts = [list(range(5, 25)), list(range(30, 40))]
        done = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
        return [answer.generated_tokens for answer in done.values()]

    plain = answers()
    with vlmaccel.patched(model, "fastv", layer=1, ratio=0.5):
        assert answers() == [[], []]
    assert "does not do continuous batching" in caplog.text
    assert answers() == plain != [[], []]
