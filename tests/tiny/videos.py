"""Pipelines that make videos, from text, images and other videos."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AnyFlowTransformer3DModel,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FlowMapEulerDiscreteScheduler,
    LatteTransformer3DModel,
    MotionAdapter,
    WanTransformer3DModel,
)
from PIL import Image

from tests.pipelines import PIPELINES, TEXT
from tests.tiny import Case
from tests.tiny.builders import WAN, cogvideo, ddim, ltx, parts, prompts, vae, wan
from tests.tiny.stable_diffusion import SIZE, control, sd, without

VIDEO = {**prompts(1, 6, 8), "output_type": "latent", "height": 16, "width": 16}


def latte() -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=8,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=1,
    )
    return {"transformer": transformer.eval(), "vae": vae(), "scheduler": DDIMScheduler(clip_sample=False)}


def wan_image(channels: int, **more: Any) -> dict[str, Any]:
    made = wan()
    config = {name: value for name, value in made.transformer.config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**{**config, "in_channels": channels}).eval()
    decoder = made.vae
    decoder.register_to_config(latents_mean=[0.1] * 4, latents_std=[1.1] * 4)
    return {"transformer": transformer, "vae": decoder, "scheduler": made.scheduler, **more}


LTX = PIPELINES["LTX-Video"][1]

IMAGE_OF_VIDEO = {"image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(7))}

LARGER = {"image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(7)) * 2 - 1}

FRAMES = [Image.new("RGB", (16, 16), (40 * i, 90, 200)) for i in range(2)]


def animated(**more: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    motion = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=4
    )
    for parameter in motion.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.1)  # A fresh one adds nothing.
    return {**without(sd(), "requires_safety_checker"), "scheduler": ddim(), "motion_adapter": motion.eval(), **more}


def cogvideo_image() -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=6,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
    )
    decoder = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    return {"transformer": transformer.eval(), "vae": decoder.eval(), "scheduler": scheduler}


def any_flow() -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = AnyFlowTransformer3DModel(**WAN, cross_attn_norm=True, gate_value=0.25, deltatime_type="r")
    scheduler = FlowMapEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0)
    return {"transformer": transformer.eval(), "vae": wan().vae, "scheduler": scheduler}


ANIMATED = {**TEXT, "guidance_scale": 3.0}

CASES: dict[str, Case] = {
    "LattePipeline": Case(latte, {**VIDEO, "video_length": 1, "negative_prompt": None}),
    "WanPipeline": Case(lambda: parts(wan()), {**VIDEO, "num_frames": 5}),
    "WanVideoToVideoPipeline": Case(lambda: wan_image(4), {**VIDEO, "video": torch.rand(1, 5, 3, 16, 16)}),
    "WanImageToVideoPipeline": Case(
        lambda: wan_image(4, expand_timesteps=True), {**VIDEO, **IMAGE_OF_VIDEO, "num_frames": 5}
    ),
    "WanImageToVideoPipeline, Wan 2.1": Case(lambda: wan_image(12), {**VIDEO, **IMAGE_OF_VIDEO, "num_frames": 5}),
    "LTXPipeline": Case(lambda: parts(ltx()), LTX),
    "LTXImageToVideoPipeline": Case(lambda: parts(ltx()), {**LTX, **LARGER}),
    "LTXConditionPipeline": Case(lambda: parts(ltx()), {**LTX, **LARGER}),
    "CogVideoXPipeline": Case(lambda: parts(cogvideo()), PIPELINES["CogVideoX"][1]),
    "AnimateDiffPipeline": Case(animated, {**ANIMATED, **SIZE, "num_frames": 2}),
    "AnimateDiffControlNetPipeline": Case(
        lambda: animated(controlnet=control()), {**ANIMATED, **SIZE, "num_frames": 2, "conditioning_frames": FRAMES}
    ),
    "AnimateDiffVideoToVideoPipeline": Case(animated, {**ANIMATED, "video": FRAMES}),
    "AnimateDiffVideoToVideoControlNetPipeline": Case(
        lambda: animated(controlnet=control()), {**ANIMATED, "video": FRAMES, "conditioning_frames": FRAMES}
    ),
    "CogVideoXImageToVideoPipeline": Case(cogvideo_image, {**VIDEO, **IMAGE_OF_VIDEO, "num_frames": 9}),
    "AnyFlowPipeline": Case(any_flow, {**VIDEO, "num_frames": 9, "guidance_scale": 3.0}),
}
