"""Pipelines of further families: transformers, cascades, pixels, and video."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    CogView4Transformer2DModel,
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    LatteTransformer3DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    SanaTransformer2DModel,
    SCMScheduler,
    StableCascadeUNet,
    UNet2DModel,
    WanTransformer3DModel,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.pipelines import IMAGE, PIPELINES
from tests.tiny import Case
from tests.tiny.builders import cogvideo, ddim, dit, ltx, normal, pixart, prompts, sana, unet, vae, wan

MASKED = {**prompts(1, 6, 8, mask=True), **IMAGE}
VIDEO = {**prompts(1, 6, 8), "output_type": "latent", "height": 16, "width": 16}


def parts(made: Any, **more: Any) -> dict[str, Any]:
    """Return what a pipeline is made of, to make another of it."""
    known = {name: each for name, each in made.components.items() if each is not None}
    return {**known, **more}


def lumina() -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = LuminaNextDiT2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        learn_sigma=True,
        qk_norm=True,
        cross_attention_dim=8,
    )
    return {"transformer": transformer.eval(), "vae": vae(), "scheduler": FlowMatchEulerDiscreteScheduler()}


def lumina2() -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=8,
    )
    return {"transformer": transformer.eval(), "vae": vae(), "scheduler": FlowMatchEulerDiscreteScheduler()}


def aura() -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=8,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return {"transformer": transformer.eval(), "vae": vae(), "scheduler": FlowMatchEulerDiscreteScheduler()}


def hunyuan_dit() -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = HunyuanDiT2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=4,
        hidden_size=16,
        activation_fn="gelu-approximate",
        text_len=6,
        text_len_t5=6,
    )
    scheduler = DDPMScheduler(clip_sample=False, prediction_type="v_prediction")
    return {"transformer": transformer.eval(), "vae": vae(), "scheduler": scheduler}


def cogview4() -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True)
    return {"transformer": transformer.eval(), "vae": vae(), "scheduler": scheduler}


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


def sprint() -> dict[str, Any]:
    made = sana()
    config = {name: value for name, value in made.transformer.config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(**{**config, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"})
    return parts(made, transformer=transformer.eval(), scheduler=SCMScheduler())


def wan_image(channels: int, **more: Any) -> dict[str, Any]:
    made = wan()
    config = {name: value for name, value in made.transformer.config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**{**config, "in_channels": channels}).eval()
    decoder = made.vae
    decoder.register_to_config(latents_mean=[0.1] * 4, latents_std=[1.1] * 4)
    return {"transformer": transformer, "vae": decoder, "scheduler": made.scheduler, **more}


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


PIXART = PIPELINES["PixArt"][1]
SANA = PIPELINES["Sana"][1]
LTX = PIPELINES["LTX-Video"][1]
IMAGE_OF_VIDEO = {"image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(7))}
LARGER = {"image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(7)) * 2 - 1}
LATENTS = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(7))
HUNYUAN = {
    **prompts(1, 6, 8),
    "prompt_embeds_2": normal(1, 6, 8, seed=3),
    "negative_prompt_embeds_2": normal(1, 6, 8, seed=4),
    **dict.fromkeys(
        [f"{sign}prompt_attention_mask{number}" for sign in ("", "negative_") for number in ("", "_2")],
        torch.ones(1, 6).long(),
    ),
    **IMAGE,
    "use_resolution_binning": False,
}

CASES: dict[str, Case] = {
    "PixArtAlphaPipeline": Case(lambda: parts(pixart()), PIXART),
    "PixArtSigmaPipeline": Case(lambda: parts(pixart()), PIXART),
    "PixArtSigmaPAGPipeline": Case(lambda: parts(pixart(), pag_applied_layers="blocks.1"), PIXART),
    "SanaPipeline": Case(lambda: parts(sana()), SANA),
    "SanaPAGPipeline": Case(lambda: parts(sana(), pag_applied_layers="blocks.1"), SANA),
    "SanaSprintPipeline": Case(
        sprint,
        {
            "prompt_embeds": normal(1, 6, 8),
            "prompt_attention_mask": torch.ones(1, 6).long(),
            "output_type": "latent",
            "height": 256,
            "width": 256,
            "use_resolution_binning": False,
            "intermediate_timesteps": None,
        },
    ),
    "DiTPipeline": Case(lambda: parts(dit()), {"class_labels": [3, 1], "output_type": "pt"}),
    "LuminaPipeline": Case(lumina, MASKED),
    "Lumina2Pipeline": Case(lumina2, MASKED),
    "AuraFlowPipeline": Case(aura, MASKED),
    "HunyuanDiTPipeline": Case(hunyuan_dit, HUNYUAN),
    "HunyuanDiTPAGPipeline": Case(lambda: {**hunyuan_dit(), "pag_applied_layers": "1"}, HUNYUAN),
    "CogView4Pipeline": Case(cogview4, {**prompts(1, 6, 8), **IMAGE}),
    "LattePipeline": Case(latte, {**VIDEO, "video_length": 1, "negative_prompt": None}),
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
}
