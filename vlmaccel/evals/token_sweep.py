"""Which methods that drop or merge visual tokens are compared, at shares of the tokens that can be.

Those "before the decoder" leave a share of the tokens for all of it. The others see them all in the decoder's first layers:
those that drop once leave the share from layer `LAYER` on, and those in stages what gives the same mean over the layers.
Baselines are in both groups. Every method runs with its own positions and, as far as it knows positions, calibrated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

from vlmaccel.evals.budgets import KEPT, LAYER, SEEDS, mean_kept, pyramid_ratio, ratio_for
from vlmaccel.evals.sweep import Candidate
from vlmaccel.hooks import Method
from vlmaccel.methods import (
    AttentionSum,
    CDPruner,
    DivPrune,
    FastV,
    Magnitude,
    NeighbourCosine,
    Pool,
    PyramidDrop,
    Random,
    Registers,
    SparseVLM,
    SparseVLMPlus,
    ToMeDecoder,
    Uniform,
    VisionZip,
    VisPruner,
)

BEFORE, INSIDE = "before the decoder", f"from layer {LAYER} on"


def baselines(layer: int, share: float) -> list[Method]:
    """Random selection, once for each seed, uniform selection and pooling."""
    return [
        *(Random(layer=layer, ratio=share, seed=seed) for seed in SEEDS),
        Uniform(layer=layer, ratio=share),
        Pool(layer=layer, ratio=share),
    ]


def before(share: float) -> list[Method]:
    """Methods that leave this share of the tokens before the decoder."""
    return [
        *baselines(0, share),
        Magnitude(layer=0, ratio=share),
        NeighbourCosine(layer=0, ratio=share),
        ToMeDecoder(layer=0, ratio=share),
        DivPrune(ratio=share),
        CDPruner(ratio=share),
        VisionZip(ratio=share),
        VisPruner(ratio=share),
    ]


def inside(share: float, depth: int, visual: int) -> list[Method]:
    """Methods that leave as much, the mean over layers, as this share of the tokens from `LAYER` on.

    depth: decoder layers. visual: tokens of a picture. Clusters that SparseVLM makes come on top.
    """
    mean = mean_kept({LAYER: share}, depth)

    def sparse(method: type[SparseVLM]) -> SparseVLM:
        shape = [count / method.counts[192][0] for count in method.counts[192]]

        def ratios(first: float) -> tuple[float, ...]:
            return tuple(first * part for part in shape)

        first = ratio_for(mean, lambda ratio: method(ratios=ratios(ratio)).stages(depth), depth)
        return method(ratios=ratios(first))

    return [
        *baselines(LAYER, share),
        AttentionSum(layer=LAYER, ratio=share),
        FastV(layer=LAYER, ratio=share),
        PyramidDrop(ratio=pyramid_ratio(mean, depth)),
        sparse(SparseVLM),
        sparse(SparseVLMPlus),
        Registers(registers=round(visual * share), layer=LAYER),
    ]


def candidates(depth: int, visual: int, shares: Sequence[float] = KEPT) -> list[Candidate]:
    """Every method at every share."""
    return [
        Candidate(name, share, method, group)
        for share in shares
        for group, methods in ((BEFORE, before(share)), (INSIDE, inside(share, depth, visual)))
        for plain in methods
        for name, method in with_calibration(plain)
    ]


def with_calibration(method: Method) -> Iterator[tuple[str, Method]]:
    """The method with its name, and again with calibrated positions."""
    yield method.name, method
    if "positions" in {field.name for field in fields(method)}:  # type: ignore[arg-type]
        yield f"{method.name}, calibrated", replace(method, positions="calibrated")  # type: ignore[type-var]
