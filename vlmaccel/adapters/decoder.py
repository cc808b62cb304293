"""The hooks in a decoder: call the methods at their hook points and hand each layer its view."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache as cache_result
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from vlmaccel.adapters.base import Adapter, Parts, by_name
from vlmaccel.adapters.decode import DecodeAttention
from vlmaccel.adapters.entries import Entries
from vlmaccel.adapters.patches import PatchHooks
from vlmaccel.adapters.scores import CacheScores, LayerScores
from vlmaccel.adapters.sparse import SparseAttention, sparse_call
from vlmaccel.adapters.view import View, apply_view, layer_view, renumbered
from vlmaccel.adapters.watched_attention import WatchedAttention
from vlmaccel.cache import PrunedLayer, PrunedSlidingLayer, kv_bytes_by_layer, prunable, pruned_layer
from vlmaccel.hooks import Attention, CacheEntries, DecoderLayer, Method, VisualTokens, check_fits
from vlmaccel.reduction import Reduction, gather
from vlmaccel.run import Run, Stage, TokenMap, padding_of


class Local(threading.local):
    """State of the forward pass that this thread is in: threads and replicas never see each other's."""

    call: dict[str, Any] | None = None
    tokens: TokenMap | None = None
    run: Run | None = None
    attending: DecodeAttention | SparseAttention | WatchedAttention | None = None
    watched: WatchedAttention | None = None
    entries: Entries | None = None


@dataclass(frozen=True, eq=False)
class Finished:
    """What the last prefill did. kv_bytes, kv_bytes_full: of the cache after it, layer by layer, and of an unpatched one.
    kv_bytes_peak: the most that was held at a time. transient: the largest copy of a layer that a decode step makes.
    attended: (B,) by layer, share of the (row, key) pairs of causal attention that was computed, where it was not all."""

    tokens: TokenMap
    stages: tuple[Stage, ...]
    past: int
    kv_bytes: tuple[int, ...]
    kv_bytes_full: tuple[int, ...]
    kv_bytes_peak: int
    transient: int
    attended: dict[int, Tensor]


class DecoderHooks:
    """The hooks in the decoder of one patched model.

    Hooks are bound methods, so that `deepcopy` and `pickle` of the model take their own along; tensors of a forward pass
    live in `Local`, never here. torch.compile runs the hooks as they are, between compiled layers: it would lose what
    they write into `Local`.
    """

    def __init__(
        self, parts: Parts, adapter: Adapter, methods: Sequence[Method], patches: PatchHooks | None = None
    ) -> None:
        self.parts, self.adapter, self.methods, self.patches = parts, adapter, tuple(methods), patches
        self.depth = len(self.parts.layers)
        self.last: Finished | None = None
        self._local = Local()
        self._before = [method for method in methods if "visual_tokens" in method.hook_points()]
        for method in methods:
            if parts.axes > 1 and method.positions == "renumber":
                raise NotImplementedError(
                    f"{method!r} renumbers positions, and in {type(parts.base).__name__} a token has {parts.axes} of them (time, "
                    'row, column), of which no order is left; use positions="keep"'
                )
            method.check_decoder(parts.config.hidden_size, parts.base.config.model_type)
        points = ("decoder_layers", "attention_layers", "sparse_layers", "cache_layers")
        self._at = {point: self._acting(point) for point in points}
        sparse = {method for acting in self._at["sparse_layers"].values() for method in acting}
        if len(sparse) > 1:
            raise ValueError(
                f"only one method can take the place of attention, not {' and '.join(sorted(map(repr, sparse)))}"
            )

    def _acting(self, point: str) -> dict[int, list[Method]]:
        """Which methods act at each decoder layer; raises ValueError for a layer that is not there."""
        acting: dict[int, list[Method]] = {}
        for method in self.methods:
            for layer in getattr(method, point)(self.depth):
                if not 0 <= layer < self.depth:
                    raise ValueError(
                        f"{method!r} acts at decoder layer {layer}, but this model has layers 0 to {self.depth - 1}"
                    )
                acting.setdefault(layer, []).append(method)
        return acting

    def install(self, model: nn.Module) -> list[Any]:
        """Put the hooks in, `model` being what the user calls, and return their handles."""
        handles: list[Any] = []

        def before(module: nn.Module, hook: Any) -> None:
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

        before(model, self._on_call)
        if self.parts.base is not self.parts.text:
            before(self.parts.base, self._on_base)
        before(self.parts.text, self._on_text)
        for i, layer in enumerate(self.parts.layers):
            before(layer, partial(self._on_layer, i))
            before(layer.self_attn, self._before_attention)
            handles.append(layer.self_attn.register_forward_hook(self._leave_attention, always_call=True))
            if i < self.parts.deepstack:
                handles.append(layer.register_forward_hook(self._whole_again))
            if i in self._at["attention_layers"]:
                hook = partial(self._on_attention, i)
                handles.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
            if i in self._at["cache_layers"]:
                hook = partial(self._on_entries, i)
                handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        if self._at["cache_layers"]:
            before(self.parts.rotary, self._on_rotary)
        before(self.parts.norm, self._on_norm)
        handles.append(self.parts.text.register_forward_hook(self._after_text, with_kwargs=True))
        return handles

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=Local())

    # ---- one forward pass, from the outside in

    @torch.compiler.disable
    def _on_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._local.__dict__.clear()  # whatever a forward that failed has left
        self._local.call = kwargs

    @torch.compiler.disable
    def _on_base(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        inputs = by_name(module, args, kwargs) if args else kwargs
        with align_module_device(module):  # what accelerate offloaded comes only inside the module's own forward
            inputs, self._local.tokens = self.adapter.encode(module, inputs)
        return (), inputs

    @torch.compiler.disable
    def _on_text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = by_name(module, args, kwargs) if args else kwargs
        given = inputs.get("inputs_embeds")
        given = inputs["input_ids"] if given is None else given
        cache, call = cache_of(inputs), self._local.call or {}
        if cache is not None and not hasattr(cache, "get_seq_length"):
            raise NotImplementedError(
                f"a patched model does not do continuous batching ({type(cache).__name__}), which packs requests into one row: "
                "call model.generate, or vlmaccel.unpatch(model) first"
            )
        past = 0 if cache is None else int(cache.get_seq_length())
        tokens = self._local.tokens or TokenMap.text(given.shape[0], given.shape[1], given.device)
        self._local.call = self._local.tokens = None
        mask = inputs.get("attention_mask")
        run = self._local.run = Run(tokens, past, padding=padding_of(mask), multimodal=self.adapter.multimodal)
        run.mask_known = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
        run.keeps_modality = bool(self._at["cache_layers"])
        if run.length > 1 and self._can_prune(cache):
            run.may_reduce = True
            run.prepare(mask, call.get("labels"), call.get("logits_to_keep", 0))
            if self.patches is not None:
                run.find_patches = cache_result(partial(self.patches.find, tokens, given))

    def _can_prune(self, cache: Any) -> bool:
        if cache is None or prunable(cache):
            return True
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        warnings.warn(
            f"this KV cache ({', '.join(kinds)}{', offloaded' if getattr(cache, 'offloading', False) else ''}) cannot hold fewer "
            "tokens than the sequence has: nothing is dropped. Use the default dynamic cache, not offloaded, to drop tokens",
            stacklevel=2,
        )
        return False

    @torch.compiler.disable
    def _on_layer(self, i: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        run = self._local.run
        if run is None:
            return None
        hidden, cache = (args[0] if args else kwargs["hidden_states"]), cache_of(kwargs)
        held = cache.layers[i] if cache is not None and i < len(cache.layers) else None
        if run.index is not None and 0 < i <= self.parts.deepstack:
            hidden = remaining(hidden, run)
        if run.may_reduce:
            hidden = self._reduce(run, i, module, hidden, kwargs, held)
            if i in self._at["attention_layers"]:
                run.views["attention"] = layer_view(run, self.parts, kwargs, held, hidden)
                self._local.attending = self._local.watched = WatchedAttention()
        keeps = run.reduction is not None or (run.may_reduce and i in self._at["cache_layers"])
        if keeps and cache is not None:
            held = pruned_layer(cache, i)
        if isinstance(held, PrunedSlidingLayer):
            held.waits = i in self._at["cache_layers"]  # for the methods to see all that its tokens saw
        if isinstance(held, PrunedLayer) and self._attends(run, held):
            held.announce_attend(run.padding)
            self._local.attending = DecodeAttention(held)
            return args, {
                **kwargs,
                "attention_mask": None,
                "position_embeddings": self._embedding(run, kwargs, held, hidden),
            }
        sparse = run.may_reduce and i in self._at["sparse_layers"]
        if not keeps and not sparse and not _needs_mask(run, held, kwargs):
            # the common decode step: only positions may differ, and the cache counts its slots by itself
            if not isinstance(held, PrunedLayer) or held.removed is None:
                return None
            return args, {**kwargs, "position_embeddings": self._embedding(run, kwargs, held, hidden)}
        view = layer_view(run, self.parts, kwargs, held, hidden)
        if isinstance(held, PrunedLayer):
            held.expect(view.columns, run.length)
        if sparse:
            view, self._local.attending = sparse_call(run, self.parts, i, view, self._at["sparse_layers"][i][0])
        kwargs = apply_view(view, kwargs, run.reduction is not None)
        if args:
            return (hidden, *args[1:]), kwargs
        return (), {**kwargs, "hidden_states": hidden}

    def _attends(self, run: Run, held: PrunedLayer) -> bool:
        """Whether the new token's attention is computed straight from the cache layer."""
        alone = run.length == 1 and run.mask_known and not torch.is_grad_enabled()
        return alone and held.reduced and held.can_attend and not held.calibrated and self._sdpa

    @property
    def _sdpa(self) -> bool:
        return self.parts.config._attn_implementation == "sdpa"

    def _embedding(self, run: Run, kwargs: dict[str, Any], held: PrunedLayer, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the new tokens where nothing is dropped in this forward."""
        if held.removed is None:
            return kwargs["position_embeddings"]
        return renumbered(run, self.parts, kwargs, held.removed, hidden)

    @torch.compiler.disable
    def _before_attention(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._local.attending is not None:
            self._local.attending.__enter__()

    @torch.compiler.disable
    def _leave_attention(self, module: nn.Module, args: tuple, output: Any) -> None:
        attending, self._local.attending = self._local.attending, None
        if attending is not None:
            attending.__exit__(None, None, None)

    @torch.compiler.disable
    def _whole_again(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """What is left of the sequence at its places in the whole, for the features that the decoder adds there; the next
        layer takes it out again."""
        run = self._local.run
        if run is None or run.index is None:
            return None
        run.views["output"] = output  # inserted rows have no place in the whole
        return run.whole(output)

    @torch.compiler.disable
    def _on_rotary(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        run = self._local.run
        if run is not None and run.positions is None:
            run.positions = args[1] if len(args) > 1 else kwargs["position_ids"]

    def _reduce(self, run: Run, i: int, module: nn.Module, hidden: Tensor, kwargs: dict[str, Any], held: Any) -> Tensor:
        """Let the methods of layer `i` act on its input."""
        if i == 0:
            for method in self._before:
                hidden = self._apply(run, i, method, method.visual_tokens(VisualTokens(run, hidden)), hidden)
                insertion = method.insert(VisualTokens(run, hidden))
                if insertion is not None:
                    hidden, reduction = insertion.into(hidden)
                    run.reduce(i, reduction)
        for method in self._at["decoder_layers"].get(i, ()):
            scores = Later(self.parts, run, module, hidden, kwargs, held)
            at = DecoderLayer(run, hidden, i, self.depth, scores)
            hidden = self._apply(run, i, method, method.decoder_layer(at), hidden)
        return hidden

    def _apply(self, run: Run, i: int, method: Method, reduction: Reduction | None, hidden: Tensor) -> Tensor:
        if reduction is None:
            return hidden
        check_fits(method, reduction, hidden)
        if reduction.keep.shape == reduction.group.shape and bool((reduction.size == 1).all()):
            return hidden
        hidden = method.merged(VisualTokens(run, hidden), reduction)
        weighed = method.prop_attn is None or method.prop_attn
        run.reduce(i, reduction, self._renumbers(method), weighed, method.positions == "calibrated")
        return hidden

    def _renumbers(self, method: Method) -> bool:
        return method.positions == "renumber" or (method.positions is None and self.parts.axes == 1)

    @torch.compiler.disable
    def _on_attention(self, i: int, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        run = self._local.run
        if run is None or not run.may_reduce:
            return
        hidden, cache = (args[0] if args else kwargs["hidden_states"]), cache_of(kwargs)
        view: View = run.views.pop("attention")
        # a sliding-window layer has forgotten keys by now, and is asked to project them once more
        keys = None
        if cache is not None and view.window is None:
            held = cache.layers[i]
            keys = held.dense()[0] if isinstance(held, PrunedLayer) else held.keys
        watched, self._local.watched = self._local.watched, None
        scores = LayerScores(module, hidden, view, run.past, keys, watched)
        for method in self._at["attention_layers"][i]:
            method.attention(Attention(run, hidden, i, self.depth, scores))

    @torch.compiler.disable
    def _on_entries(self, i: int, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        run, cache = self._local.run, cache_of(kwargs)
        if run is None or cache is None:
            return
        if self._local.entries is None:  # once a forward, not at every layer of a decode step
            if not (run.may_reduce or (run.length == 1 and prunable(cache))):
                return
            self._local.entries = Entries(self._at["cache_layers"])
        hidden = args[0] if args else kwargs["hidden_states"]
        held = pruned_layer(cache, i)
        layer = lambda: cache.layers[i]  # noqa: E731  # methods may replace it
        scores = CacheScores(module, run, hidden, kwargs["position_embeddings"], layer, self.parts.rotary)
        decoding = run.length == 1 or run.verifying
        with torch.no_grad():
            self._local.entries.layer(CacheEntries(run, i, self.depth, held, decoding, scores), cache)
            if isinstance(held, PrunedSlidingLayer):
                held.trim()

    @torch.compiler.disable
    def _on_norm(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        run = self._local.run
        if run is None or run.reduction is None:
            return None
        if run.last_only and not run.reduction.inserts:  # else the last row may be none of a token
            return None
        labels, group = run.labels, run.reduction.group
        if labels is not None and labels.shape == group.shape and bool(((labels != -100) & (group < 0)).any()):
            raise ValueError("a token that has a label was dropped; only tokens with the label -100 may be")
        if self.parts.deepstack == self.depth:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        return (run.whole(hidden), *args[1:]), {}

    @torch.compiler.disable
    def _after_text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        run, self._local.run = self._local.run, None
        entries, self._local.entries = self._local.entries, None
        if entries is not None:
            with torch.no_grad():
                entries.finish(self.methods)
        if run is None or run.length == 1 or run.verifying:
            return
        cache = cache_of(output)
        held, full = ((), ()) if cache is None else kv_bytes_by_layer(cache)
        peak = max(sum(held), 0 if entries is None else entries.peak)
        layers = [] if cache is None else cache.layers
        transient = max((layer.transient for layer in layers if isinstance(layer, PrunedLayer)), default=0)
        self.last = Finished(run.tokens, tuple(run.stages), run.past, held, full, peak, transient, run.attended)


class Later:
    """The attention scores of a layer's own input, worked out only if a method asks for them."""

    def __init__(self, *what: Any) -> None:
        self._what = what
        self._scores: LayerScores | None = None

    @torch.no_grad()
    def rows(self, rows: Tensor) -> Tensor:
        """See `vlmaccel.hooks.Scores.rows`."""
        return self._made().rows(rows)

    @torch.no_grad()
    def received(self, counts: Tensor) -> Tensor:
        """See `vlmaccel.hooks.Scores.received`."""
        return self._made().received(counts)

    @torch.no_grad()
    def keys(self) -> Tensor:
        """See `vlmaccel.hooks.Scores.keys`."""
        return self._made().keys()

    @torch.no_grad()
    def turned(self, rows: Tensor) -> Tensor:
        """See `vlmaccel.hooks.Scores.turned`."""
        return self._made().turned(rows)

    def _made(self) -> LayerScores:
        if self._scores is None:
            parts, run, module, hidden, kwargs, held = self._what
            view = layer_view(run, parts, kwargs, held, hidden)
            self._scores = LayerScores(module.self_attn, module.input_layernorm(hidden), view, run.past)
        return self._scores


def remaining(whole: Tensor, run: Run) -> Tensor:
    """(B, n, D) hidden states of what is left of the whole sequence (B, length, D); inserted rows as the layer before left them."""
    assert run.reduction is not None
    hidden = gather(whole, run.reduction.keep)
    if not run.reduction.inserts:
        return hidden
    inserted = run.reduction.inserted.to(whole.device)[..., None]
    return torch.where(inserted, run.views["output"].to(whole.device), hidden)


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among a call's keywords or a model's outputs: `cache`, until transformers 5.23 `past_key_values`."""
    cache = arguments.get("cache")
    return arguments.get("past_key_values") if cache is None else cache


def _needs_mask(run: Run, held: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a layer needs a mask over what it holds although nothing is dropped in this forward."""
    if not isinstance(held, PrunedLayer):
        return False
    if kwargs.get("attention_mask") is not None or held.masked:
        return True
    window = getattr(held, "sliding_window", None)
    return window is not None and run.past + run.length > window
