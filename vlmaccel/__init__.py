"""vlmaccel makes vision-language models faster and smaller at inference: `vlmaccel.patch(model)`."""

from vlmaccel import _version
from vlmaccel import methods as _methods  # noqa: F401  # the package, loaded before the function takes its name
from vlmaccel.adapters import base as _base  # noqa: F401
from vlmaccel.hooks import Method
from vlmaccel.patching import adapters, methods, patch, patched, stats, unpatch
from vlmaccel.reduction import Reduction
from vlmaccel.stats import Stats, TowerStats

__version__ = _version.__version__

__all__ = ["Method", "Reduction", "Stats", "TowerStats", "adapters", "methods", "patch", "patched", "stats", "unpatch"]
