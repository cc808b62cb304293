"""The published methods, one file each, and how they are found by name."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points

from vlmaccel.hooks import Method
from vlmaccel.methods.adakv import AdaKV
from vlmaccel.methods.attention_sum import AttentionSum
from vlmaccel.methods.baselines import Random, Uniform
from vlmaccel.methods.block_sparse import BlockSparse
from vlmaccel.methods.cdpruner import CDPruner
from vlmaccel.methods.divprune import DivPrune
from vlmaccel.methods.duplicates import Duplicates
from vlmaccel.methods.entropy import EntropyEviction
from vlmaccel.methods.evs import EVS
from vlmaccel.methods.fastv import FastV
from vlmaccel.methods.flexprefill import FlexPrefill
from vlmaccel.methods.h2o import H2O
from vlmaccel.methods.hessian import HessianEviction
from vlmaccel.methods.look_m import LookM
from vlmaccel.methods.low_rank import LowRankKV
from vlmaccel.methods.magnitude import Magnitude
from vlmaccel.methods.mixed_precision import MixedPrecisionKV
from vlmaccel.methods.neighbour_cosine import NeighbourCosine
from vlmaccel.methods.pool import Pool
from vlmaccel.methods.pyramiddrop import PyramidDrop
from vlmaccel.methods.pyramidkv import PyramidKV
from vlmaccel.methods.quest import Quest
from vlmaccel.methods.random_eviction import RandomEviction
from vlmaccel.methods.registers import Registers
from vlmaccel.methods.selection import Selection, SingleStage
from vlmaccel.methods.sensitivity import Sensitivity
from vlmaccel.methods.snapkv import SnapKV
from vlmaccel.methods.sparsevlm import SparseVLM, SparseVLMPlus
from vlmaccel.methods.streaming_llm import StreamingLLM
from vlmaccel.methods.tome import ToMe
from vlmaccel.methods.tome_decoder import ToMeDecoder
from vlmaccel.methods.vertical_slash import VerticalSlash
from vlmaccel.methods.victor import Victor
from vlmaccel.methods.visionzip import VisionZip
from vlmaccel.methods.vispruner import VisPruner
from vlmaccel.methods.vl_cache import VLCache
from vlmaccel.methods.zipvl import ZipVL

BUILTIN: tuple[type[Method], ...] = (
    ToMe,
    ToMeDecoder,
    PyramidDrop,
    FastV,
    AttentionSum,
    Magnitude,
    NeighbourCosine,
    DivPrune,
    CDPruner,
    EVS,
    VisionZip,
    VisPruner,
    SparseVLM,
    SparseVLMPlus,
    Duplicates,
    Registers,
    Victor,
    Random,
    Uniform,
    Pool,
    RandomEviction,
    StreamingLLM,
    H2O,
    SnapKV,
    PyramidKV,
    AdaKV,
    VLCache,
    LookM,
    Sensitivity,
    HessianEviction,
    EntropyEviction,
    MixedPrecisionKV,
    LowRankKV,
    Quest,
    ZipVL,
    VerticalSlash,
    BlockSparse,
    FlexPrefill,
)


@cache
def registry() -> dict[str, type[Method]]:
    """Every method by its name: ours, and those of packages with the entry point group `vlmaccel.methods`."""
    external = [point.load() for point in entry_points(group="vlmaccel.methods")]
    return {method.name: method for method in (*BUILTIN, *external)}


def make(name: str, **options: object) -> Method:
    """The method of that name with these options; ValueError for a name, TypeError for an option it does not have."""
    known = registry()
    if name not in known:
        raise ValueError(f"there is no method {name!r}; there are {', '.join(sorted(known))}")
    check_options(known[name], options)
    return known[name](**options)


def check_options(method: type[Method], options: Iterable[str]) -> None:
    """Raise TypeError for a hyper-parameter that the method does not have."""
    fields = getattr(method, "__dataclass_fields__", {})
    if unknown := sorted(set(options) - set(fields)):
        raise TypeError(f"{method.name} has no option {', '.join(unknown)}; it has {', '.join(fields)}")


__all__ = [
    "EVS",
    "H2O",
    "AdaKV",
    "AttentionSum",
    "BlockSparse",
    "CDPruner",
    "DivPrune",
    "Duplicates",
    "EntropyEviction",
    "FastV",
    "FlexPrefill",
    "HessianEviction",
    "LookM",
    "LowRankKV",
    "Magnitude",
    "Method",
    "MixedPrecisionKV",
    "NeighbourCosine",
    "Pool",
    "PyramidDrop",
    "PyramidKV",
    "Quest",
    "Random",
    "RandomEviction",
    "Registers",
    "Selection",
    "Sensitivity",
    "SingleStage",
    "SnapKV",
    "SparseVLM",
    "SparseVLMPlus",
    "StreamingLLM",
    "ToMe",
    "ToMeDecoder",
    "Uniform",
    "VLCache",
    "VerticalSlash",
    "Victor",
    "VisPruner",
    "VisionZip",
    "ZipVL",
    "check_options",
    "make",
    "registry",
]
