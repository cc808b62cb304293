"""Perplexity of a causal language model on real text, with what a method has left of its KV cache."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlmaccel.adapters.decoder import cache_of
from vlmaccel.cache import kv_bytes
from vlmaccel.evals.smollm2 import default_directory
from vlmaccel.evals.vqa import DTYPES

SMOLLM2, PYDOC = "smollm2", "pydoc"


def load(model: str = SMOLLM2, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """A causal language model in eval mode and its tokenizer.

    model: a local directory, a hub id, or "smollm2": what `python -m vlmaccel.evals.smollm2` wrote to its default place.
    dtype: one of `vlmaccel.evals.vqa.DTYPES`; "auto" is that of the checkpoint. device: the GPU if there is one, else
    the CPU. Raises ValueError for a dtype or a directory that does not exist.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    place = str(default_directory()) if model == SMOLLM2 else model
    if model == SMOLLM2 and not Path(place).is_dir():
        raise ValueError(f"there is no model in {place}: python -m vlmaccel.evals.smollm2 gets it")
    if place.startswith((".", "/", "~")):
        place = str(Path(place).expanduser())
        if not Path(place).is_dir():
            raise ValueError(f"there is no model directory {place}")
    loaded = AutoModelForCausalLM.from_pretrained(place, dtype=DTYPES[dtype]).eval()
    loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return loaded, AutoTokenizer.from_pretrained(place)


def text_source(name: str = PYDOC) -> str:
    """The text: of a UTF-8 file, or, for "pydoc", Python's help topics, which come with every CPython (they differ a
    little from version to version). Raises ValueError if there is no such file or nothing in it."""
    if name == PYDOC:
        from pydoc_data.topics import topics

        return "\n\n".join(topics.values())
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no text file {name}; give one, or {PYDOC!r} for Python's help topics")
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(f"{name} is empty")
    return text


def tokens_of(tokenizer: Any, text: str) -> Tensor:
    """(N,) int64, the tokens of a text, without those that would mark its beginning or end."""
    # a text longer than the model's positions is meant here, and not worth the tokenizer's warning
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def cut(tokens: Tensor, context: int, count: int) -> Tensor:
    """(count, context) int64: the first so many windows of `context` tokens, one behind the other.

    Raises ValueError if the text is too short for them.
    """
    if context < 2 or count < 1:
        raise ValueError(f"one window or more of 2 tokens or more can be scored, not {count} of {context}")
    if len(tokens) < context * count:
        raise ValueError(f"the text has {len(tokens)} tokens, too few for {count} windows of {context}")
    return tokens[: context * count].view(count, context)


@dataclass(frozen=True)
class Perplexity:
    """losses: of every window, the mean negative log-likelihood (nats) of its scored tokens. tokens: scored in a window.

    kv_bytes, kv_bytes_full: of one window's cache after the prefill, as it is and as an unpatched model's; kv_bytes_end,
    kv_bytes_full_end: after its last token. All 0 without a prefill.
    """

    losses: tuple[float, ...]
    tokens: int
    kv_bytes: float = 0
    kv_bytes_full: float = 0
    kv_bytes_end: float = 0
    kv_bytes_full_end: float = 0

    @property
    def ppl(self) -> float:
        """exp of the mean loss."""
        return math.exp(statistics.fmean(self.losses))

    def change(self, base: Perplexity) -> tuple[float, float]:
        """ppl over that of `base` minus 1, and its standard error, both from the differences within each window; the
        error is NaN for one window."""
        differences = [ours - theirs for ours, theirs in zip(self.losses, base.losses, strict=True)]
        ratio, n = math.exp(statistics.fmean(differences)), len(differences)
        return ratio - 1, ratio * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.nan


@torch.inference_mode()
def perplexity(
    model: Any,
    windows: Tensor,
    prefill: float = 0.5,
    step: int = 1,
    batch_size: int = 8,
    tick: Callable[[int], object] | None = None,
) -> Perplexity:
    """Score the tokens of each window behind its first `prefill` share, given all that comes before them in the window.

    windows: (W, context) int64. prefill: the share is read in one forward, as a prompt, and the method compresses the
        cache it leaves; the rest follows over that cache. 0: the whole window in one forward without a cache, its first
        token not scored; for unpatched models, as a dropped token predicts nothing.
    step: tokens of a later forward. 1 is how a model decodes; more is faster, but methods take a forward of several
        tokens for another prompt, and may evict again. batch_size: windows at once.
    tick: called with a number of newly scored tokens, for a progress bar.
    Raises ValueError for a share or step that leaves nothing to do, and for windows longer than the model's positions.
    """
    context = windows.shape[1]
    first = round(prefill * context)
    if not 0 <= prefill < 1 or first >= context or (prefill > 0 and first < 1):
        raise ValueError(f"prefill is a share of the window's {context} tokens, from 0 to below 1, not {prefill}")
    if step < 1 or batch_size < 1:
        raise ValueError(f"step and batch_size are 1 or more, not {step} and {batch_size}")
    check_positions(model, context)
    report = tick or (lambda count: None)
    losses: list[float] = []
    total = [0, 0, 0, 0]
    for part in windows.to(model.device).split(batch_size if first else 1):
        if first:
            scored, held = _continuation(model, part, first, step, report)
            total = [old + new for old, new in zip(total, held, strict=True)]
        else:
            scored = _loss(model(part, use_cache=False).logits[:, :-1], part[:, 1:])
            report(scored.numel())
        losses += scored.double().mean(1).tolist()
    return Perplexity(tuple(losses), scored.shape[1], *(count / len(windows) for count in total))


def check_positions(model: Any, tokens: int) -> None:
    """Raise ValueError if the model was not made for so many tokens."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(f"{tokens} tokens are more than the model's {limit} positions")


def _continuation(
    model: Any, ids: Tensor, first: int, step: int, report: Callable[[int], object]
) -> tuple[Tensor, tuple[int, int, int, int]]:
    """(B, context - first) losses, and the bytes of the cache after the prefill and at the end."""
    # its name was `past_key_values` until transformers 5.23
    name = next(n for n in ("cache", "past_key_values") if n in inspect.signature(model.forward).parameters)
    out = model(ids[:, :first], use_cache=True, logits_to_keep=1)
    cache = cache_of(out)
    before = kv_bytes(cache)
    losses = [_loss(out.logits, ids[:, first : first + 1])]
    for start in range(first, ids.shape[1] - 1, step):
        stop = min(start + step, ids.shape[1] - 1)
        out = model(ids[:, start:stop], use_cache=True, **{name: cache})
        losses.append(_loss(out.logits, ids[:, start + 1 : stop + 1]))
        report(losses[-1].numel())
    report(losses[0].numel())
    return torch.cat(losses, 1), (*before, *kv_bytes(cache))


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, n) float32 negative log-likelihoods of targets (B, n) under logits (B, n, V)."""
    # flat, with the vocabulary last: along another dimension float32 sums of its terms lose the fourth digit
    losses = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets)
