"""A tiny random LLaVA that understands the demo's processor: 36 visual tokens, four decoder layers."""

from __future__ import annotations

import torch
import transformers as hf

from vlmaccel.training.demo_llava_model import IMAGE, PAD, VOCABULARY, build_processor, initialise

PIXELS, PATCH, DEPTH = 48, 8, 4
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
