"""A tiny image-text-to-text model that never trained, saved as transformers saves one."""

from __future__ import annotations

from pathlib import Path

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_image_text_model(folder: Path, language: Path, template: str | None = TEMPLATE) -> str:
    """Write a random LLaVA with its processor and return its address.

    Args:
        folder: where to.
        language: folder of a tokenizer, and of a language model's configuration.
        template: the processor's chat template; None for a processor without.
    """
    import torch
    from transformers import (
        AutoConfig,
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    text = AutoConfig.from_pretrained(language)
    text.vocab_size = len(tokenizer)
    text.initializer_range = 0.3  # else every prompt gives about the same answer
    vision = CLIPVisionConfig(
        hidden_size=20, intermediate_size=28, num_hidden_layers=3, num_attention_heads=2,
        image_size=16, patch_size=8, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(3)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_id)
    )
    with torch.no_grad():
        model.lm_head.weight[image_id] = 0  # a trained model does not say it either
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return str(folder)
