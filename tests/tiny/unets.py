"""Pipelines of images whose denoisers are U-Nets other than Stable Diffusion's: cascades, an upscaler, and pixels."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    EulerDiscreteScheduler,
    StableCascadeUNet,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.pipelines import MASK, PICTURE, TEXT
from tests.tiny import Case
from tests.tiny.builders import ddim, normal, pooled, prompts, unet, vae
from tests.tiny.stable_diffusion import SIZE


def cascade(prior: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    blocks = ["SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"]
    denoiser = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(blocks, blocks),
        clip_text_in_channels=8 if prior else None,
        clip_text_pooled_in_channels=8,
        clip_image_in_channels=8 if prior else None,
        effnet_in_channels=None if prior else 4,
        switch_level=(False,),
        dropout=(0.0, 0.0),
    ).eval()
    for parameter in denoiser.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.1)
    parts: dict[str, Any] = {"prior" if prior else "decoder": denoiser, "scheduler": DDPMWuerstchenScheduler()}
    if prior:  # which asks the text encoder for its dtype, and does not call it
        encoder: Any = CLIPTextModelWithProjection
        sizes: dict[str, Any] = {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
        }
        parts["text_encoder"] = encoder(CLIPTextConfig(vocab_size=8, **sizes)).eval()
    return parts


def pixels() -> Any:
    torch.manual_seed(0)
    return UNet2DModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


def deep_floyd(channels: int = 3, **more: Any) -> dict[str, Any]:
    return {
        "unet": unet(channels, out_channels=6, **more.pop("unet", {})),  # the noise and its variance
        "scheduler": DDPMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2", variance_type="learned_range"),
        "requires_safety_checker": False,
        **more,
    }


LATENTS = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(7))

PAIR = {"image_embeds": normal(1, 8), "negative_image_embeds": normal(1, 8, seed=2)}


def upscaler() -> dict[str, Any]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        act_fn="gelu",
        attention_head_dim=8,
        norm_num_groups=None,
        block_out_channels=[32, 32, 64, 64],
        time_cond_proj_dim=136,  # 64 numbers of the noise level, twice, and the pooled prompt
        conv_in_kernel=1,
        conv_out_kernel=1,
        cross_attention_dim=8,
        down_block_types=("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 3),
        in_channels=8,
        mid_block_type=None,
        only_cross_attention=False,
        out_channels=5,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        up_block_types=(*["KCrossAttnUpBlock2D"] * 3, "KUpBlock2D"),
    )
    return {"unet": unet.eval(), "vae": vae(), "scheduler": EulerDiscreteScheduler(prediction_type="sample")}


def kandinsky(channels: int = 4) -> dict[str, Any]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=channels,
        out_channels=8,  # the noise and its variance
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=8,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=8,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    movq = VQModel(
        block_out_channels=[32, 32],  # whose norms have 32 groups
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    return {"unet": unet.eval(), "movq": movq.eval(), "scheduler": ddim()}


KANDINSKY = {**PAIR, **SIZE, "output_type": "pt"}

CASES: dict[str, Case] = {
    "StableCascadeDecoderPipeline": Case(
        lambda: cascade(False),
        {
            "image_embeddings": LATENTS,
            "prompt_embeds": normal(1, 6, 8),
            "prompt_embeds_pooled": normal(1, 1, 8),
            "negative_prompt_embeds": normal(1, 6, 8, seed=2),
            "negative_prompt_embeds_pooled": normal(1, 1, 8, seed=2),
            "guidance_scale": 2.0,
            "output_type": "latent",
        },
    ),
    "StableCascadePriorPipeline": Case(
        lambda: cascade(True),
        {
            "prompt_embeds": normal(1, 6, 8),
            "prompt_embeds_pooled": normal(1, 1, 8),
            "negative_prompt_embeds": normal(1, 6, 8, seed=2),
            "negative_prompt_embeds_pooled": normal(1, 1, 8, seed=2),
            "height": 168,
            "width": 168,
            "output_type": "pt",
        },
    ),
    "DDIMPipeline": Case(lambda: {"unet": pixels(), "scheduler": ddim()}, {"output_type": "pt"}),
    "DDPMPipeline": Case(lambda: {"unet": pixels(), "scheduler": DDPMScheduler()}, {"output_type": "pt"}),
    "IFPipeline": Case(deep_floyd, {**prompts(1, 6, 8), "output_type": "pt", "height": 8, "width": 8}),
    "IFImg2ImgPipeline": Case(
        deep_floyd, {**prompts(1, 6, 8), "image": torch.rand(1, 3, 8, 8), "output_type": "pt", "strength": 0.7}
    ),
    "StableDiffusionLatentUpscalePipeline": Case(upscaler, {**TEXT, **pooled(), "image": normal(1, 4, 8, 8, seed=7)}),
    "KandinskyV22Pipeline": Case(kandinsky, KANDINSKY),
    "KandinskyV22Img2ImgPipeline": Case(kandinsky, {**KANDINSKY, **PICTURE, "strength": 0.7}),
    "KandinskyV22InpaintPipeline": Case(lambda: kandinsky(9), {**KANDINSKY, **PICTURE, **MASK}),
    "IFInpaintingPipeline": Case(
        deep_floyd,
        {
            **prompts(1, 6, 8),
            "image": torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(7)),
            "mask_image": (torch.arange(8) < 4).float().expand(1, 1, 8, 8),
            "output_type": "pt",
        },
    ),
}
