"""Flux, Chroma, Qwen-Image and Z-Image, and what was made of them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxTransformer2DModel,
    QwenImageControlNetModel,
)

from tests.pipelines import IMAGE, MASK, PICTURE
from tests.tiny import Case
from tests.tiny.builders import FLUX, flow, flux, normal, prompts, qwen, vae, z_image

TEXT = {"prompt_embeds": normal(1, 6, 8), "pooled_prompt_embeds": normal(1, 8), **IMAGE}
AGAIN = {**PICTURE, "strength": 0.7}
FILLED = {**PICTURE, **MASK}
CONTROL = {"control_image": PICTURE["image"]}


def parts(channels: int = 16, **more: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    made = flux()
    config = {**{k: v for k, v in made.transformer.config.items() if not k.startswith("_")}, "in_channels": channels}
    decoder = vae()
    decoder.register_to_config(shift_factor=0.1)
    return {
        "transformer": FluxTransformer2DModel(**{**config, "out_channels": 16}).eval(),
        "vae": decoder,
        "scheduler": made.scheduler,
        **more,
    }


def controlnet() -> Any:
    torch.manual_seed(2)
    made = FluxControlNetModel(**FLUX, pooled_projection_dim=8)
    for block in (*made.controlnet_blocks, *made.controlnet_single_blocks, made.controlnet_x_embedder):
        torch.nn.init.normal_(block.weight, std=0.3)
    return made.eval()


def chroma() -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        **FLUX,
        approximator_hidden_dim=16,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    decoder = vae()
    decoder.register_to_config(shift_factor=0.1)
    transformer.register_to_config(guidance_embeds=False)  # One of the pipelines looks for it.
    return {"transformer": transformer.eval(), "vae": decoder, "scheduler": FlowMatchEulerDiscreteScheduler()}


def qwen_parts(**more: Any) -> dict[str, Any]:
    made = qwen()
    made.vae.register_to_config(latents_mean=[0.1] * 4, latents_std=[1.1] * 4)
    return {"transformer": made.transformer, "vae": made.vae, "scheduler": made.scheduler, **more}


def qwen_control() -> Any:
    torch.manual_seed(2)
    made = QwenImageControlNetModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(8, 4, 4),
    )
    for block in (*made.controlnet_blocks, made.controlnet_x_embedder):
        torch.nn.init.normal_(block.weight, std=0.3)
    return made.eval()


def z_parts() -> dict[str, Any]:
    made = z_image()
    made.vae.register_to_config(shift_factor=0.1)
    return {"transformer": made.transformer, "vae": made.vae, "scheduler": flow()}


CHROMA = {
    **prompts(1, 6, 8),
    **IMAGE,
    "prompt_attention_mask": torch.ones(1, 6),
    "negative_prompt_attention_mask": torch.ones(1, 6),
}
QWEN = {
    **prompts(1, 6, 8),
    **IMAGE,
    "prompt_embeds_mask": torch.ones(1, 6).long(),
    "negative_prompt_embeds_mask": torch.ones(1, 6).long(),
    "true_cfg_scale": 3.0,
}
Z = {**prompts(2, 6, 8, lists=True), **IMAGE, "guidance_scale": 3.0}

CASES: dict[str, Case] = {
    "FluxPipeline": Case(parts, TEXT),
    "FluxImg2ImgPipeline": Case(parts, {**TEXT, **AGAIN}),
    "FluxInpaintPipeline": Case(parts, {**TEXT, **FILLED, "strength": 0.8}),
    "FluxControlPipeline": Case(lambda: parts(32), {**TEXT, **CONTROL}),
    "FluxControlImg2ImgPipeline": Case(lambda: parts(32), {**TEXT, **CONTROL, **AGAIN}),
    "FluxControlInpaintPipeline": Case(lambda: parts(32), {**TEXT, **CONTROL, **FILLED}),
    "FluxFillPipeline": Case(lambda: parts(48), {**TEXT, **FILLED}),
    "FluxKontextPipeline": Case(parts, {**TEXT, **PICTURE, "max_area": 256, "_auto_resize": False}),
    "FluxKontextInpaintPipeline": Case(parts, {**TEXT, **FILLED, "max_area": 256, "_auto_resize": False}),
    "FluxControlNetPipeline": Case(lambda: parts(controlnet=controlnet()), {**TEXT, **CONTROL}),
    "FluxControlNetImg2ImgPipeline": Case(lambda: parts(controlnet=controlnet()), {**TEXT, **CONTROL, **AGAIN}),
    "FluxControlNetInpaintPipeline": Case(lambda: parts(controlnet=controlnet()), {**TEXT, **CONTROL, **FILLED}),
    "ChromaPipeline": Case(chroma, CHROMA),
    "ChromaImg2ImgPipeline": Case(chroma, {**CHROMA, **AGAIN}),
    "ChromaInpaintPipeline": Case(chroma, {**CHROMA, **FILLED, "strength": 0.8}),
    "QwenImagePipeline": Case(qwen_parts, QWEN),
    "QwenImageImg2ImgPipeline": Case(qwen_parts, {**QWEN, **AGAIN}),
    "QwenImageInpaintPipeline": Case(qwen_parts, {**QWEN, **FILLED}),
    "QwenImageControlNetPipeline": Case(lambda: qwen_parts(controlnet=qwen_control()), {**QWEN, **CONTROL}),
    "ZImagePipeline": Case(z_parts, Z),
    "ZImageImg2ImgPipeline": Case(z_parts, {**Z, **AGAIN}),
    "ZImageInpaintPipeline": Case(z_parts, {**Z, **FILLED, "strength": 0.8}),
}
