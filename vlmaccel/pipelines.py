"""transformers pipelines with a method in them: importing this module registers the task "vlmaccel".

import vlmaccel.pipelines
from transformers import pipeline

pipe = pipeline("vlmaccel", model="llava-hf/llava-1.5-7b-hf", method="fastv", options={"ratio": 0.25})

Other tasks (text-generation, image-classification, ...) take a model that `vlmaccel.patch` patched.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForImageTextToText
from transformers.pipelines import PIPELINE_REGISTRY, ImageTextToTextPipeline

from vlmaccel.patching import MethodLike, is_patched, patch

TASK = "vlmaccel"


class PatchedImageTextToTextPipeline(ImageTextToTextPipeline):
    """The "image-text-to-text" pipeline of transformers, over a model that it patches.

    method, options: as `vlmaccel.patch(model, method, **options)` takes them. Without a method, a model that is patched already
    stays as it is, and another gets the default of its family. All else is as in "image-text-to-text".

    Raises what `vlmaccel.patch` raises, with the model left as it was.
    """

    def __init__(
        self, *args: Any, method: MethodLike = None, options: dict[str, object] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if method is not None or options or not is_patched(self.model):
            patch(self.model, method, **(options or {}))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As "image-text-to-text". Raises TypeError for a method: it belongs to the pipeline, not to one call."""
        if given := sorted({"method", "options"} & set(kwargs)):
            raise TypeError(f"{' and '.join(given)} go into pipeline({TASK!r}, ...), not into a call of it")
        return super().__call__(*args, **kwargs)


PIPELINE_REGISTRY.register_pipeline(
    TASK,
    pipeline_class=PatchedImageTextToTextPipeline,
    pt_model=AutoModelForImageTextToText,
    type="multimodal",
)

__all__ = ["TASK", "PatchedImageTextToTextPipeline"]
