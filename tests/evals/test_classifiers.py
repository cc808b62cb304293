import json
import math
import sys

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn.functional import cosine_similarity, normalize

import vlmaccel
from vlmaccel.evals.classifiers import TEMPLATES, in_order, load_classifier, prompt_names
from vlmaccel.methods import ToMe

timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")

CLASSES = ("cat", "dog", "red_circle", "eel")
SIDE = 32
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": SIDE, "patch_size": 8}


def pictures(count=3):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(count)]


def fill(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            wide = 1.2 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.1
            parameter.add_(wide * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save_timm(path, labels=CLASSES):
    args = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 4}
    cfg = {"input_size": (3, SIDE, SIDE), "mean": (0.5, 0.4, 0.3), "crop_pct": 0.9, "num_classes": 4}
    model = fill(timm.create_model("vit_tiny_patch16_224", pretrained_cfg=cfg, **args))
    timm.models.save_for_hf(model, str(path), model_config={"label_names": list(labels)}, safe_serialization=True)
    return model


def save_image_processor(path):
    hf.CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=[0.4] * 3
    ).save_pretrained(path)


def save_vit(path, labels=CLASSES):
    named = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    model = fill(hf.ViTForImageClassification(hf.ViTConfig(**VISION, **named)))
    model.save_pretrained(path)
    save_image_processor(path)
    return model


def word_tokenizer():
    words = (
        " ".join(TEMPLATES).replace("{}", " ").replace(".", " . ").split() + " ".join(CLASSES).replace("_", " ").split()
    )
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<pad>", "<unk>", *map(str.lower, words), "</s>"]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end = ("</s>", vocabulary["</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_contrastive(path, kind):
    tokenizer = word_tokenizer()
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    if kind == "clip":
        text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, "bos_token_id": None}
        model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
    else:
        model = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=VISION))
    model = fill(model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    save_image_processor(path)
    return model, tokenizer


@torch.no_grad()
def logits(classifier, images):
    pixels = torch.stack([classifier.transform(image) for image in images])
    assert pixels.shape[1:] == (3, SIDE, SIDE) and pixels.dtype == torch.float32
    return classifier.logits(pixels.to(classifier.device, classifier.dtype))


def test_timm(tmp_path):
    model = save_timm(tmp_path)
    classifier = load_classifier(f"timm:local-dir:{tmp_path}", CLASSES)
    config = timm.data.resolve_model_data_config(model)
    assert config["mean"] == (0.5, 0.4, 0.3)
    transform = timm.data.create_transform(**config)
    with torch.no_grad():
        expected = model(torch.stack([transform(image) for image in pictures()]))
    torch.testing.assert_close(logits(classifier, pictures()), expected)
    assert classifier.classes == 4 and not classifier.model.training
    assert load_classifier(f"timm:local-dir:{tmp_path}", CLASSES, "bfloat16").dtype == torch.bfloat16


def test_the_model_that_ships():
    from vlmaccel.evals.image_data import read_data

    data = read_data("easy-vqa").spread(40)
    classifier = load_classifier("tiny-vit", data.classes)
    assert classifier.name == "tiny-vit"
    pixels = torch.stack([classifier.transform(data.picture(i)) for i in range(len(data))])
    with torch.no_grad():
        right = classifier.logits(pixels).argmax(-1) == torch.tensor(data.targets)
    assert right.float().mean() > 0.9


def test_transformers_classifier(tmp_path):
    model = save_vit(tmp_path)
    classifier = load_classifier(str(tmp_path), CLASSES)
    inputs = hf.AutoImageProcessor.from_pretrained(tmp_path)(images=pictures(), return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(logits(classifier, pictures()), model(**inputs).logits)
    assert load_classifier(str(tmp_path), CLASSES, "bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_classes_of_another_order_are_found_by_name(tmp_path, library):
    (save_timm if library == "timm" else save_vit)(tmp_path)
    name = f"timm:local-dir:{tmp_path}" if library == "timm" else str(tmp_path)
    straight, turned = load_classifier(name, CLASSES), load_classifier(name, CLASSES[::-1])
    assert torch.equal(logits(turned, pictures()), logits(straight, pictures()).flip(-1))


def test_classes_of_other_names_are_left_in_order():
    given = torch.tensor([[1.0, 2.0]])
    for labels in (None, ["a", "b"], ["x", "x"], ["y", "b"]):
        assert torch.equal(in_order("m", labels, 2, ("x", "y"), lambda x: x)(given), given)
    assert torch.equal(in_order("m", ["y", "x"], 2, ("x", "y"), lambda x: x)(given), given.flip(-1))


@torch.no_grad()
def by_hand(features, text_feature):
    """Cosines of pictures and classes, one prompt at a time. text_feature: one sentence -> (D,)."""
    columns = []
    for name in ("cat", "dog", "red circle", "eel"):
        of_class = torch.stack([normalize(text_feature(t.replace("{}", name)), dim=-1) for t in TEMPLATES]).mean(0)
        columns.append(cosine_similarity(features, of_class[None]))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_transformers_zero_shot(tmp_path, kind):
    model, tokenizer = save_contrastive(tmp_path, kind)
    padding = {"padding": "max_length", "max_length": 16} if kind == "siglip" else {}

    def text_feature(text):
        inputs = tokenizer([text], return_tensors="pt", **padding)
        return model.get_text_features(input_ids=inputs["input_ids"]).pooler_output[0]

    inputs = hf.AutoImageProcessor.from_pretrained(tmp_path)(images=pictures(), return_tensors="pt")
    with torch.no_grad():
        features = model.get_image_features(**inputs).pooler_output
    expected = model.logit_scale.exp().item() * by_hand(features, text_feature)
    found = logits(load_classifier(str(tmp_path), CLASSES), pictures())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(found.argsort(-1).unique(dim=0)) > 1 or found.std(0).min() > 1e-3


@pytest.fixture
def clip(tmp_path, monkeypatch):
    """A tiny open_clip architecture, known by name for the length of a test, and its weights in a file."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIDE, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (tmp_path / "tiny-open-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-open-clip.json")
    model = fill(open_clip.create_model("tiny-open-clip"))
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return tmp_path, model


@pytest.mark.parametrize("source", ["file", "directory"])
def test_open_clip(clip, source):
    path, model = clip
    rest = f"tiny-open-clip@{path}/open_clip_pytorch_model.bin" if source == "file" else f"local-dir:{path}"
    tokenizer = open_clip.get_tokenizer("tiny-open-clip")
    _, _, transform = open_clip.create_model_and_transforms("tiny-open-clip")
    with torch.no_grad():
        features = model.encode_image(torch.stack([transform(image) for image in pictures()]))
    expected = model.logit_scale.exp().item() * by_hand(features, lambda text: model.encode_text(tokenizer([text]))[0])
    classifier = load_classifier(f"open_clip:{rest}", CLASSES)
    torch.testing.assert_close(logits(classifier, pictures()), expected, rtol=1e-4, atol=1e-4)
    half = load_classifier(f"open_clip:{rest}", CLASSES, "bfloat16")
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(logits(half, pictures()), expected, rtol=0.1, atol=1)


def test_all_kinds_can_be_patched(clip, tmp_path):
    path, _ = clip
    save_timm(tmp_path / "timm")
    save_vit(tmp_path / "vit")
    save_contrastive(tmp_path / "clip", "clip")
    save_contrastive(tmp_path / "siglip", "siglip")
    directories = [str(tmp_path / name) for name in ("vit", "clip", "siglip")]
    for name in [f"timm:local-dir:{tmp_path / 'timm'}", f"open_clip:local-dir:{path}", *directories]:
        classifier = load_classifier(name, CLASSES)
        plain = logits(classifier, pictures())
        with vlmaccel.patched(classifier.model, ToMe(r=3)):
            merged = logits(classifier, pictures())
            tokens = vlmaccel.stats(classifier.model).tokens
        assert [tokens[0] - count for count in tokens] == [0, 3, 6, 9]
        assert not torch.allclose(merged, plain)
        assert torch.equal(logits(classifier, pictures()), plain)


def test_prompt_names():
    assert prompt_names(["n01440764", "n02123045"]) == ["tench", "tabby cat"]
    assert prompt_names(["n01440764", "big_cat"]) == ["n01440764", "big cat"]
    with pytest.raises(ValueError, match="n99999999 is none of the 1000 classes"):
        prompt_names(["n01440764", "n99999999"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:", "'timm:' names no model"),
        ("timm:vit_enormous", "timm cannot load vit_enormous: Unknown model"),
        ("timm:local-dir:/no/where", "there is no model directory /no/where"),
        ("./nowhere", "there is no model directory ./nowhere"),
        ("open_clip:ViT-B-32", r"names no weights: open_clip:ViT-B-32@TAG or @FILE does; its tags: .*laion2b"),
        ("open_clip:ViT-Z@openai", "open_clip cannot load ViT-Z@openai: .*ViT-Z"),
        ("open_clip:ViT-B-32@nothing", "open_clip cannot load ViT-B-32@nothing"),
    ],
)
def test_names_that_do_not_exist(name, message):
    with pytest.raises(ValueError, match=message):
        load_classifier(name, CLASSES)


def test_unknown_dtype():
    with pytest.raises(ValueError, match="unknown dtype 'fp8'; choose from"):
        load_classifier("tiny-vit", CLASSES, "fp8")


def test_another_number_of_classes(tmp_path):
    save_timm(tmp_path / "timm")
    save_vit(tmp_path / "vit")
    for name in (f"timm:local-dir:{tmp_path / 'timm'}", str(tmp_path / "vit")):
        with pytest.raises(ValueError, match="tells 4 classes apart, but the data has 3"):
            load_classifier(name, CLASSES[:3])


def test_models_that_do_not_classify(tmp_path):
    hf.ViTModel(hf.ViTConfig(**VISION)).save_pretrained(tmp_path / "backbone")
    save_image_processor(tmp_path / "backbone")
    with pytest.raises(ValueError, match=r"has no weights for classifier\.bias, classifier\.weight"):
        load_classifier(str(tmp_path / "backbone"), ("a", "b"))
    config = hf.LlamaConfig(**SIZES, vocab_size=8)
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="is neither an image classifier nor a CLIP or SigLIP: LlamaConfig"):
        load_classifier(str(tmp_path / "text"), CLASSES)


@pytest.mark.parametrize(
    ("name", "module"), [("timm:vit_tiny_patch16_224", "timm"), ("open_clip:ViT-B-32@x", "open_clip")]
)
def test_missing_libraries_name_the_fix(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module} is not installed: pip install 'vlmaccel\[vit\]'"):
        load_classifier(name, CLASSES)
