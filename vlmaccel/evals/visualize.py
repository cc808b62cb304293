"""What a method does to a picture: groups it merges in the vision tower, patches that survive in the decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

import vlmaccel
from vlmaccel.evals import vqa
from vlmaccel.evals.classifiers import ASSETS, LOCAL_DIR, TINY_VIT, Processed
from vlmaccel.evals.image_data import need
from vlmaccel.evals.samples import VQASample
from vlmaccel.plots import Panel, survivors
from vlmaccel.plots_groups import enlarged, groups_plot, merged_groups
from vlmaccel.run import Modality
from vlmaccel.stats import Stats, TowerStats

PROMPT = "Describe the picture."


class Ready(NamedTuple):
    """A model, what runs it on the picture, and the picture as the model sees it."""

    model: nn.Module
    run: Callable[[], object]
    seen: Image.Image


def visualize(
    model: str,
    image: Path,
    method: str = "tome",
    options: Mapping[str, Any] | None = None,
    blocks: Sequence[int] | None = None,
    prompt: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> Figure:
    """Run a model, patched with a method, on a picture, and draw what became of the patches.

    model: "tiny-vit", which comes with vlmaccel; "timm:NAME", also "timm:local-dir:PATH"; "open_clip:ARCHITECTURE" or
        "open_clip:ARCHITECTURE@WEIGHTS"; or a directory or hub id for transformers, of a ViT or a VLM.
    blocks: of the vision tower, 0-based; default: see `vlmaccel.plots_groups.default_blocks`.
    prompt: for a vision-language model; default `PROMPT`. dtype: one of `vqa.DTYPES`; "auto" is the checkpoint's for
        transformers, and float32. device: the GPU if there is one, else the CPU.

    Raises ValueError for a model, method or block that does not exist, and if the method dropped and merged nothing;
    TypeError for an unknown option; NotImplementedError for a method that the model has no place for; OSError for a
    picture that cannot be read.
    """
    if dtype not in vqa.DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose from {', '.join(vqa.DTYPES)}")
    with Image.open(image) as file:
        picture = file.convert("RGB")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        ready = _ready(model, picture, prompt, dtype, device)
    except RuntimeError as error:  # what timm and open_clip raise for a name that does not exist
        raise ValueError(f"cannot load {model}: {error}") from error
    vlmaccel.patch(ready.model, method, **(options or {}))
    with torch.inference_mode():
        ready.run()
    named = ", ".join([method, *(f"{key}={value}" for key, value in (options or {}).items())])
    return draw(vlmaccel.stats(ready.model), ready.seen, blocks, f"{Path(model).name}: {named}")


def draw(stats: Stats | TowerStats, seen: Image.Image, blocks: Sequence[int] | None = None, title: str = "") -> Figure:
    """A row for the groups in the vision tower, one for the patches left in the decoder, of a batch's first picture.

    seen: the picture as the model saw it. Raises ValueError if there is neither, and as `merged_groups` does.
    """
    rows = []
    tower = stats if isinstance(stats, TowerStats) else stats.tower
    if tower is not None:
        merged = [
            Panel(f"block {i}: {tower.tokens[i + 1]} tokens", p) for i, p in merged_groups(tower, seen, 0, blocks)
        ]
        whole = enlarged(seen, tower.tokens[0] - tower.prefix, tower.image)
        rows.append((f"{title}, in the vision tower", [Panel("as the model sees it", whole), *merged]))
    elif blocks is not None:
        raise ValueError("blocks are of a vision tower, and the method does nothing there")
    if isinstance(stats, Stats) and stats.stages:
        tokens = stats.token_map
        first = (tokens.modality[0] == Modality.IMAGE) & (tokens.image[0] == 0) & (tokens.grid[0, :, 0] == 0)
        whole = enlarged(seen, int(first.sum()))
        left = [
            Panel(f"from layer {layer} on: {stats.visual_tokens[layer]:.0f} tokens", pixels)
            for layer, pixels in survivors(stats, Image.fromarray(whole))
        ]
        rows.append((f"{title}, in the decoder", [Panel("as the model sees it", whole), *left]))
    if not rows:
        raise ValueError("the method dropped and merged nothing")
    return groups_plot(rows)


def _ready(name: str, picture: Image.Image, prompt: str | None, dtype: str, device: str) -> Ready:
    library, colon, rest = (f"timm:{LOCAL_DIR}{ASSETS / TINY_VIT}" if name == TINY_VIT else name).partition(":")
    path = rest.removeprefix(LOCAL_DIR) if colon else name
    if (rest.startswith(LOCAL_DIR) or path.startswith((".", "/", "~"))) and not Path(path).expanduser().is_dir():
        raise ValueError(f"there is no model directory {path}")
    if colon and library in ("timm", "open_clip"):
        model, transform = (_timm if library == "timm" else _open_clip)(rest)
        model.to(torch.float32 if dtype == "auto" else vqa.DTYPES[dtype])
        norm = transform.transforms[-1]
        mean, std = norm.mean, norm.std
    else:
        import transformers as hf

        if type(hf.AutoConfig.from_pretrained(name)) in hf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return _asked(name, picture, prompt or PROMPT, dtype, device)
        model = hf.AutoModel.from_pretrained(name, dtype=vqa.DTYPES[dtype])
        processor = hf.AutoImageProcessor.from_pretrained(name)
        transform, (mean, std) = Processed(processor), _normalised(processor)
    if prompt is not None:
        raise ValueError(f"a prompt is for a vision-language model, and {name} is none")
    model.to(device).eval()
    pixels = transform(picture)
    batch = pixels[None].to(device, next(model.parameters()).dtype)
    # of a model with a text tower, the vision tower only
    run = getattr(model, "get_image_features", None) or getattr(model, "encode_image", None) or model
    return Ready(model, lambda: run(batch), _picture(pixels, mean, std))


def _timm(name: str) -> tuple[nn.Module, Any]:
    timm, data = need("timm", "vit"), need("timm.data", "vit")
    model = timm.create_model(name, pretrained=True)
    return model, data.create_transform(**data.resolve_model_data_config(model), is_training=False)


def _open_clip(name: str) -> tuple[nn.Module, Any]:
    # names of directories and of the hub come without a tag, and may have an @ of their own
    architecture, _, weights = (name, "", "") if name.startswith((LOCAL_DIR, "hf-hub:")) else name.partition("@")
    model, _, transform = need("open_clip", "vit").create_model_and_transforms(architecture, weights or None)
    return model, transform


def _asked(name: str, picture: Image.Image, prompt: str, dtype: str, device: str) -> Ready:
    """A vision-language model that reads the picture and the prompt, and answers nothing."""
    model, processor = vqa.load(name, dtype, device)
    (batch,) = vqa.prepare(processor, [VQASample("", picture, prompt, ())], 1)
    inputs = {
        key: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for key, value in batch.inputs.items()
        if isinstance(value, Tensor)
    }
    pixels = inputs["pixel_values"]
    first = pixels.flatten(0, -4)[0]  # of the pieces of a picture, the first is the whole one
    return Ready(model, lambda: model(**inputs), _picture(first, *_normalised(processor.image_processor)))


def _normalised(processor: Any) -> tuple[Any, Any]:
    """Mean and standard deviation, a number a channel, of pixels from 0 to 1."""
    return (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)


def _picture(pixels: Tensor, mean: Any, std: Any) -> Image.Image:
    """Normalised pixels (3, H, W) as the picture that they show."""
    mean, std = (torch.as_tensor(x, dtype=torch.float)[:, None, None] for x in (mean, std))
    shown = (pixels.float().cpu() * std + mean).clamp(0, 1) * 255
    return Image.fromarray(shown.round().byte().permute(1, 2, 0).numpy())
