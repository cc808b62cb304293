"""Image classifiers of timm, transformers and open_clip, by name, each with its library's own preprocessing.

Models with a text tower classify zero-shot: a class is the mean of the features of its name in several sentences.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from vlmaccel.evals.image_data import need
from vlmaccel.evals.vqa import DTYPES

TINY_VIT = "tiny-vit"
ASSETS = Path(__file__).parents[1] / "assets"
LOCAL_DIR = "local-dir:"
SCHEMES = (LOCAL_DIR, "hf-hub:")  # of names that timm and open_clip load weights by, without a tag
# the subset of CLIP's 80 templates that its authors found to do best together (notebook on prompt engineering)
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
PROMPT_BATCH = 256


@dataclass(frozen=True, eq=False)
class Classifier:
    """A model that tells classes apart.

    name: as the user gave it. model: what is patched; in eval mode. classes: how many it tells apart.
    transform: RGB picture -> (3, H, W) float32; can be pickled, for worker processes.
    logits: pixels (B, 3, H, W), on the model's device in its dtype -> (B, classes), in the order of the data's classes.
    """

    name: str
    model: nn.Module
    classes: int
    transform: Callable[[Image.Image], Tensor]
    logits: Callable[[Tensor], Tensor]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype


def load_classifier(
    name: str, classes: Sequence[str], dtype: str = "auto", device: torch.device | str = "cpu"
) -> Classifier:
    """A classifier for data with these class names.

    name: "tiny-vit", which comes with vlmaccel and knows easy-VQA's pictures; "timm:NAME" with one of timm's names, also "timm:local-dir:PATH"; "open_clip:ARCHITECTURE@WEIGHTS" with a tag
        of open_clip or a file, also "open_clip:local-dir:PATH"; or a directory or hub id for transformers, which is used
        zero-shot if it is a CLIP or SigLIP.
    classes: of the data. A model that names its classes in another order is put in this order; zero-shot, these are what
        is looked for, after names for ImageNet's classes (n01440764, ...) were looked up.
    dtype: one of `DTYPES`; "auto" is float32, and the checkpoint's for transformers.

    Raises ValueError for a name that does not exist, a model that has no classifier, or one for another number of
    classes; ImportError if the library is not there.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    if name == TINY_VIT:
        shipped = load_classifier(f"timm:{LOCAL_DIR}{ASSETS / TINY_VIT}", classes, dtype, device)
        return replace(shipped, name=TINY_VIT)
    library, colon, rest = name.partition(":")
    load = {"timm": _timm, "open_clip": _open_clip}.get(library) if colon else None
    if load is None:
        return _transformers(name, classes, DTYPES[dtype], device)
    if not rest:
        raise ValueError(f"{name!r} names no model: {library}: is followed by its name")
    if rest.startswith(LOCAL_DIR):
        rest = LOCAL_DIR + _directory(rest.removeprefix(LOCAL_DIR))
    return load(rest, classes, torch.float32 if dtype == "auto" else DTYPES[dtype], device)


def in_order(
    name: str, labels: Sequence[str] | None, count: int, classes: Sequence[str], logits: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """`logits` with its `count` columns in the order of `classes`: by name, if the model's labels are the same names.

    Raises ValueError if there are more or fewer.
    """
    if count != len(classes):
        raise ValueError(f"{name} tells {count} classes apart, but the data has {len(classes)}")
    if labels is None or list(labels) == list(classes) or len(set(labels)) < count or set(labels) != set(classes):
        return logits
    order = [list(labels).index(label) for label in classes]
    return lambda pixels: logits(pixels)[:, order]


@torch.inference_mode()
def zero_shot(
    image_features: Callable[[Tensor], Tensor],
    text_features: Callable[[list[str]], Tensor],
    classes: Sequence[str],
    scale: float,
) -> Callable[[Tensor], Tensor]:
    """Logits that are `scale` times the cosine of a picture's features (B, D) and those of each class, in float32."""
    prompts = [template.format(label) for label in prompt_names(classes) for template in TEMPLATES]
    batches = [prompts[i : i + PROMPT_BATCH] for i in range(0, len(prompts), PROMPT_BATCH)]
    features = torch.cat([normalize(text_features(batch).float(), dim=-1) for batch in batches])
    means = normalize(features.unflatten(0, (len(classes), len(TEMPLATES))).mean(1), dim=-1)
    return lambda pixels: scale * normalize(image_features(pixels).float(), dim=-1) @ means.T


def prompt_names(classes: Sequence[str]) -> list[str]:
    """Words for the classes: OpenAI's names where they are ImageNet's numbers (n01440764), else without underscores."""
    if not all(re.fullmatch(r"n\d{8}", label) for label in classes):
        return [label.replace("_", " ") for label in classes]
    numbers: list[str] = need("timm.data", "vit").ImageNetInfo("imagenet-1k").label_names()
    names = dict(zip(numbers, need("open_clip", "vit").IMAGENET_CLASSNAMES, strict=True))
    if unknown := [label for label in classes if label not in names]:
        raise ValueError(f"{unknown[0]} is none of the 1000 classes of ImageNet: its name is not known")
    return [names[label] for label in classes]


def _timm(name: str, classes: Sequence[str], dtype: torch.dtype, device: torch.device | str) -> Classifier:
    timm, data = need("timm", "vit"), need("timm.data", "vit")
    with _errors("timm", name):
        model = timm.create_model(name, pretrained=True).to(device, dtype).eval()
    transform = data.create_transform(**data.resolve_model_data_config(model), is_training=False)
    labels = model.pretrained_cfg.get("label_names")
    logits = in_order(f"timm:{name}", labels, model.num_classes, classes, model)
    return Classifier(f"timm:{name}", model, len(classes), transform, logits)


def _open_clip(name: str, classes: Sequence[str], dtype: torch.dtype, device: torch.device | str) -> Classifier:
    open_clip = need("open_clip", "vit")
    architecture, _, weights = name.partition("@")
    if name.startswith(SCHEMES):
        architecture, weights = name, ""
    elif not weights:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none known to open_clip"
        raise ValueError(f"open_clip:{name} names no weights: open_clip:{name}@TAG or @FILE does; its tags: {tags}")
    with _errors("open_clip", name):
        model, _, transform = open_clip.create_model_and_transforms(architecture, weights or None, device=device)
        tokenizer = open_clip.get_tokenizer(architecture)
    model.eval()
    scale = model.logit_scale.exp().item()
    logits = zero_shot(model.encode_image, lambda texts: model.encode_text(tokenizer(texts).to(device)), classes, scale)
    return Classifier(f"open_clip:{name}", model.to(dtype), len(classes), transform, logits)


def _transformers(name: str, classes: Sequence[str], dtype: Any, device: torch.device | str) -> Classifier:
    import transformers as hf

    if name.startswith((".", "/", "~")):
        name = _directory(name)
    config = hf.AutoConfig.from_pretrained(name)
    has_head = any("ForImageClassification" in kind for kind in config.architectures or ())
    contrastive = type(config) in hf.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING and not has_head
    if not contrastive and type(config) not in hf.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(f"{name} is neither an image classifier nor a CLIP or SigLIP: {type(config).__name__}")
    kind = hf.AutoModelForZeroShotImageClassification if contrastive else hf.AutoModelForImageClassification
    model, info = kind.from_pretrained(name, dtype=dtype, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{name} has no weights for {', '.join(missing)}: it was not trained to classify")
    model.to(device).eval()
    transform = Processed(hf.AutoImageProcessor.from_pretrained(name))
    if not contrastive:
        labels = [config.id2label[i] for i in range(config.num_labels)]
        logits = in_order(name, labels, config.num_labels, classes, lambda pixels: model(pixel_values=pixels).logits)
        return Classifier(name, model, len(classes), transform, logits)
    tokenizer = hf.AutoTokenizer.from_pretrained(name)
    # SigLIP was trained on texts padded to the full length, not masked, and reads its features off the last token
    siglip = "siglip" in config.model_type
    padding = {"padding": "max_length" if siglip else True, "return_attention_mask": not siglip}
    length = config.text_config.max_position_embeddings

    def text_features(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, truncation=True, max_length=length, return_tensors="pt", **padding)
        return model.get_text_features(**tokens.to(device)).pooler_output

    scale = model.logit_scale.exp().item()
    logits = zero_shot(lambda x: model.get_image_features(pixel_values=x).pooler_output, text_features, classes, scale)
    return Classifier(name, model, len(classes), transform, logits)


@dataclass(frozen=True)
class Processed:
    """An image processor of transformers as a transform of one picture."""

    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


def _directory(path: str) -> str:
    if not Path(path).expanduser().is_dir():
        raise ValueError(f"there is no model directory {path}")
    return str(Path(path).expanduser())


@contextmanager
def _errors(library: str, name: str) -> Iterator[None]:
    """A name that does not exist is a RuntimeError in both libraries."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(f"{library} cannot load {name}: {error}") from error
