"""A tiny random LLaVA and Qwen2-VL that understand the demo's processors: 36 visual tokens, four decoder layers."""

from __future__ import annotations

import torch
import transformers as hf

from vlmaccel.training import demo_qwen2_vl_model as qwen2_vl
from vlmaccel.training.demo_llava_model import IMAGE, PAD, VOCABULARY, build_processor
from vlmaccel.training.demo_stages import initialise

PIXELS, PATCH, DEPTH = 48, 8, 4  # of the LLaVA's pictures; the Qwen2-VL's are twice as large
SIDE = PIXELS // PATCH
TOKENS = SIDE * SIDE


def tiny_llava() -> tuple[hf.LlavaForConditionalGeneration, hf.LlavaProcessor]:
    """The same weights every time."""
    processor = build_processor()
    processor.image_processor.size = {"shortest_edge": PIXELS}
    processor.image_processor.crop_size = {"height": PIXELS, "width": PIXELS}
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = hf.CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=PIXELS, patch_size=PATCH)
    text = hf.LlamaConfig(**sizes, num_hidden_layers=DEPTH, vocab_size=len(VOCABULARY), pad_token_id=PAD)
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
    )
    model = hf.LlavaForConditionalGeneration(config)
    initialise(model)
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [IMAGE]  # which a random model might write
    return model.eval(), processor


def tiny_qwen2_vl() -> tuple[hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLProcessor]:
    """The same weights every time; pictures become 96 px, where they are square."""
    processor = qwen2_vl.build_processor()
    side = SIDE * qwen2_vl.TOKEN_SIZE
    processor.image_processor.size = {"shortest_edge": (side - 8) ** 2, "longest_edge": (side + 8) ** 2}
    torch.manual_seed(3)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = hf.Qwen2VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": DEPTH,
            "vocab_size": len(qwen2_vl.VOCABULARY),
            "pad_token_id": qwen2_vl.PAD,
            "bos_token_id": qwen2_vl.PAD,
            "eos_token_id": qwen2_vl.END,
            "rope_parameters": rope,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "mlp_ratio": 2,
            "num_heads": 4,
            "patch_size": PATCH,
        },
        image_token_id=qwen2_vl.IMAGE,
        video_token_id=qwen2_vl.VIDEO,
        vision_start_token_id=qwen2_vl.VISION_START,
        vision_end_token_id=qwen2_vl.VISION_END,
        tie_word_embeddings=False,
    )
    model = hf.Qwen2VLForConditionalGeneration(config)
    initialise(model)
    model.generation_config.pad_token_id = qwen2_vl.PAD
    model.generation_config.suppress_tokens = [qwen2_vl.IMAGE, qwen2_vl.VIDEO]
    return model.eval(), processor
