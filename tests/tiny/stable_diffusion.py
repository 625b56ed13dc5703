"""Stable Diffusion 1.5, XL and 3, and what was made of them: other inputs, ControlNets, adapters, PAG."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    SD3ControlNetModel,
    T2IAdapter,
)

from tests.pipelines import MASK, PICTURE, TEXT
from tests.tiny import Case
from tests.tiny.builders import normal, pooled, scheduler, sd3, unet, vae

SIZE = {"height": 16, "width": 16}
XL = {**TEXT, **pooled()}
ADAPTED = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
XL_UNET = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 8,
}


def sd(channels: int = 4, **more: Any) -> dict[str, Any]:
    options = more.pop("unet", {})
    return {
        "vae": vae(),
        "unet": unet(channels, **options),
        "scheduler": scheduler(EulerDiscreteScheduler),
        "requires_safety_checker": False,
        **more,
    }


def without(parts: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in parts.items() if key != name}


def xl(channels: int = 4, **more: Any) -> dict[str, Any]:
    options = {**XL_UNET, **more.pop("unet", {})}
    return without(sd(channels, unet=options, **more), "requires_safety_checker")


def control(kind: Any = ControlNetModel, **options: Any) -> Any:
    torch.manual_seed(2)
    made = kind.from_unet(unet(**options), **({"conditioning_embedding_out_channels": (8, 16)}))
    for block in (*made.controlnet_down_blocks, made.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.3)
    return made.eval()


def adapter(kind: str) -> Any:
    torch.manual_seed(2)
    return T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type=kind).eval()


def sd3_parts(**more: Any) -> dict[str, Any]:
    made = sd3()
    made.vae.register_to_config(shift_factor=0.1)
    return {"transformer": made.transformer, "vae": made.vae, "scheduler": made.scheduler, **more}


def sd3_control(extra: int = 0) -> Any:
    torch.manual_seed(2)
    made = SD3ControlNetModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        extra_conditioning_channels=extra,
    )
    for block in made.controlnet_blocks:
        torch.nn.init.normal_(block.weight, std=0.3)
    return made.eval()


AGAIN = {**PICTURE, "strength": 0.7}
CONTROL = {"control_image": PICTURE["image"]}
FILLED = {**PICTURE, **MASK}
UPSCALING = {"num_class_embeds": 1000}
FIRST_PART = {"adapter_conditioning_factor": 0.5}
PAG = {"pag_applied_layers": "blocks.0"}
LCM_UNET = {"time_cond_proj_dim": 8}

CASES: dict[str, Case] = {
    "StableDiffusionPipeline": Case(sd, {**TEXT, **SIZE}),
    "StableDiffusionImg2ImgPipeline": Case(sd, {**TEXT, **AGAIN}),
    "StableDiffusionInpaintPipeline": Case(lambda: sd(9), {**TEXT, **FILLED, **SIZE}),
    "StableDiffusionInstructPix2PixPipeline": Case(lambda: sd(8), {**TEXT, **PICTURE}),
    "StableDiffusionUpscalePipeline": Case(
        lambda: without(sd(7, unet=UPSCALING, low_res_scheduler=scheduler(DDPMScheduler)), "requires_safety_checker"),
        {**TEXT, **PICTURE},
    ),
    "StableDiffusionControlNetPipeline": Case(lambda: sd(controlnet=control()), {**TEXT, **PICTURE}),
    "StableDiffusionControlNetImg2ImgPipeline": Case(lambda: sd(controlnet=control()), {**TEXT, **AGAIN, **CONTROL}),
    "StableDiffusionControlNetInpaintPipeline": Case(
        lambda: sd(9, controlnet=control()), {**TEXT, **FILLED, **CONTROL, **SIZE}
    ),
    "StableDiffusionAdapterPipeline": Case(
        lambda: sd(adapter=adapter("full_adapter"), unet=ADAPTED), {**TEXT, **PICTURE, **SIZE}
    ),
    "StableDiffusionPAGPipeline": Case(sd, {**TEXT, **SIZE}),
    "StableDiffusionPAGImg2ImgPipeline": Case(sd, {**TEXT, **AGAIN}),
    "StableDiffusionPAGInpaintPipeline": Case(lambda: sd(9), {**TEXT, **FILLED, **SIZE}),
    "StableDiffusionControlNetPAGPipeline": Case(lambda: sd(controlnet=control()), {**TEXT, **PICTURE}),
    "StableDiffusionControlNetPAGInpaintPipeline": Case(
        lambda: sd(9, controlnet=control()), {**TEXT, **FILLED, **CONTROL, **SIZE}
    ),
    "LatentConsistencyModelPipeline": Case(
        lambda: sd(unet=LCM_UNET, scheduler=scheduler(LCMScheduler)),
        {"prompt_embeds": normal(1, 6, 8), "output_type": "latent", **SIZE},
    ),
    "LatentConsistencyModelImg2ImgPipeline": Case(
        lambda: sd(unet=LCM_UNET, scheduler=scheduler(LCMScheduler)),
        {"prompt_embeds": normal(1, 6, 8), "output_type": "latent", **AGAIN},
    ),
    "StableDiffusionXLPipeline": Case(xl, {**XL, **SIZE}),
    "StableDiffusionXLImg2ImgPipeline": Case(xl, {**XL, **AGAIN}),
    "StableDiffusionXLInpaintPipeline": Case(lambda: xl(9), {**XL, **FILLED, **SIZE, "strength": 0.9}),
    "StableDiffusionXLInstructPix2PixPipeline": Case(lambda: xl(8), {**XL, **PICTURE, **SIZE}),
    "StableDiffusionXLControlNetPipeline": Case(lambda: xl(controlnet=control(**XL_UNET)), {**XL, **PICTURE}),
    "StableDiffusionXLControlNetImg2ImgPipeline": Case(
        lambda: xl(controlnet=control(**XL_UNET)), {**XL, **AGAIN, **CONTROL}
    ),
    "StableDiffusionXLControlNetInpaintPipeline": Case(
        lambda: xl(9, controlnet=control(**XL_UNET)), {**XL, **FILLED, **CONTROL, **SIZE}
    ),
    "StableDiffusionXLAdapterPipeline": Case(
        lambda: xl(adapter=adapter("full_adapter"), unet=ADAPTED), {**XL, **PICTURE, **SIZE, **FIRST_PART}
    ),
    "StableDiffusionXLPAGPipeline": Case(xl, {**XL, **SIZE}),
    "StableDiffusionXLPAGImg2ImgPipeline": Case(xl, {**XL, **AGAIN}),
    "StableDiffusionXLPAGInpaintPipeline": Case(lambda: xl(9), {**XL, **FILLED, **SIZE}),
    "StableDiffusionXLControlNetPAGPipeline": Case(lambda: xl(controlnet=control(**XL_UNET)), {**XL, **PICTURE}),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": Case(
        lambda: xl(controlnet=control(**XL_UNET)), {**XL, **AGAIN, **CONTROL}
    ),
    "StableDiffusion3Pipeline": Case(sd3_parts, {**XL, **SIZE}),
    "StableDiffusion3Img2ImgPipeline": Case(sd3_parts, {**XL, **AGAIN, **SIZE}),
    "StableDiffusion3ControlNetPipeline": Case(lambda: sd3_parts(controlnet=sd3_control()), {**XL, **CONTROL, **SIZE}),
    "StableDiffusion3ControlNetInpaintingPipeline": Case(
        lambda: sd3_parts(controlnet=sd3_control(1)),
        {**XL, "control_image": PICTURE["image"], "control_mask": MASK["mask_image"], **SIZE},
    ),
    "StableDiffusion3PAGPipeline": Case(lambda: sd3_parts(**PAG), {**XL, **SIZE}),
    "StableDiffusion3PAGImg2ImgPipeline": Case(lambda: sd3_parts(**PAG), {**XL, **AGAIN, **SIZE}),
}
