"""Pipelines of images whose denoisers are transformers, other than Flux and its relatives."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    AutoencoderKLFlux2,
    CogView4Transformer2DModel,
    CosmosTransformer3DModel,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    HunyuanDiT2DControlNetModel,
    HunyuanDiT2DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    SanaTransformer2DModel,
    SCMScheduler,
)
from PIL import Image
from torch import nn

from tests.pipelines import IMAGE, PICTURE, PIPELINES
from tests.tiny import Case
from tests.tiny.builders import dit, normal, parts, pixart, prompts, sana, vae, wan
from tests.tiny.sound import SMALL

MASKED = {**prompts(1, 6, 8, mask=True), **IMAGE}


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


def sprint() -> dict[str, Any]:
    made = sana()
    config = {name: value for name, value in made.transformer.config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(**{**config, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"})
    return parts(made, transformer=transformer.eval(), scheduler=SCMScheduler())


PIXART = PIPELINES["PixArt"][1]

SANA = PIPELINES["Sana"][1]

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


class Unchecked(nn.Module):
    """Takes the place of a checker of prompts and pictures, without which Cosmos refuses to run."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def cosmos() -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=8,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return {
        "transformer": transformer.eval(),
        "vae": wan().vae,
        "scheduler": scheduler,
        "safety_checker": Unchecked(),
    }


def hunyuan_control() -> dict[str, Any]:
    made = hunyuan_dit()
    config = made["transformer"].config
    torch.manual_seed(2)
    controlnet = HunyuanDiT2DControlNetModel(
        transformer_num_layers=config.num_layers,
        **{
            name: config[name]
            for name in (
                "sample_size",
                "patch_size",
                "attention_head_dim",
                "num_attention_heads",
                "in_channels",
                "cross_attention_dim",
                "cross_attention_dim_t5",
                "pooled_projection_dim",
                "hidden_size",
                "activation_fn",
                "text_len",
                "text_len_t5",
            )
        },
    )
    for block in controlnet.controlnet_blocks:
        torch.nn.init.normal_(block.weight, std=0.3)
    return {**made, "controlnet": controlnet.eval()}


def flux2() -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        timestep_guidance_channels=32,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=False,
    )
    decoder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return {"transformer": transformer.eval(), "vae": decoder.eval(), "scheduler": FlowMatchEulerDiscreteScheduler()}


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
    "Cosmos2TextToImagePipeline": Case(cosmos, {**prompts(1, 6, 8), **SMALL}),
    "HunyuanDiTControlNetPipeline": Case(hunyuan_control, {**HUNYUAN, "control_image": PICTURE["image"]}),
    "Flux2KleinPipeline": Case(flux2, {**prompts(1, 6, 8), "height": 8, "width": 8, "output_type": "latent"}),
    "Flux2KleinKVPipeline": Case(
        flux2,
        {
            "prompt_embeds": normal(1, 6, 8),
            "image": Image.new("RGB", (64, 64), (40, 90, 200)),
            "height": 8,
            "width": 8,
            "output_type": "latent",
        },
    ),
}
