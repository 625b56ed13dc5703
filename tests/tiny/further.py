"""Pipelines with motion modules, second schedulers, and families that call their denoisers unusually."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AnyFlowTransformer3DModel,
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    CosmosTransformer3DModel,
    EulerDiscreteScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    HunyuanDiT2DControlNetModel,
    MotionAdapter,
    UNet2DConditionModel,
    VQModel,
)
from PIL import Image
from torch import nn

from tests.pipelines import MASK, PICTURE, TEXT
from tests.tiny import Case
from tests.tiny.builders import WAN, ddim, normal, pooled, prompts, vae, wan
from tests.tiny.others import HUNYUAN, IMAGE_OF_VIDEO, VIDEO, deep_floyd, hunyuan_dit
from tests.tiny.sound import SMALL
from tests.tiny.stable_diffusion import SIZE, control, sd, without

FRAMES = [Image.new("RGB", (16, 16), (40 * i, 90, 200)) for i in range(2)]

PAIR = {"image_embeds": normal(1, 8), "negative_image_embeds": normal(1, 8, seed=2)}


class Unchecked(nn.Module):
    """Takes the place of a checker of prompts and pictures, without which Cosmos refuses to run."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def animated(**more: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    motion = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=4
    )
    for parameter in motion.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.1)  # A fresh one adds nothing.
    return {**without(sd(), "requires_safety_checker"), "scheduler": ddim(), "motion_adapter": motion.eval(), **more}


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


def any_flow() -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = AnyFlowTransformer3DModel(**WAN, cross_attn_norm=True, gate_value=0.25, deltatime_type="r")
    scheduler = FlowMapEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0)
    return {"transformer": transformer.eval(), "vae": wan().vae, "scheduler": scheduler}


ANIMATED = {**TEXT, "guidance_scale": 3.0}

KANDINSKY = {**PAIR, **SIZE, "output_type": "pt"}

CASES: dict[str, Case] = {
    "AnimateDiffPipeline": Case(animated, {**ANIMATED, **SIZE, "num_frames": 2}),
    "AnimateDiffControlNetPipeline": Case(
        lambda: animated(controlnet=control()), {**ANIMATED, **SIZE, "num_frames": 2, "conditioning_frames": FRAMES}
    ),
    "AnimateDiffVideoToVideoPipeline": Case(animated, {**ANIMATED, "video": FRAMES}),
    "AnimateDiffVideoToVideoControlNetPipeline": Case(
        lambda: animated(controlnet=control()), {**ANIMATED, "video": FRAMES, "conditioning_frames": FRAMES}
    ),
    "Cosmos2TextToImagePipeline": Case(cosmos, {**prompts(1, 6, 8), **SMALL}),
    "CogVideoXImageToVideoPipeline": Case(cogvideo_image, {**VIDEO, **IMAGE_OF_VIDEO, "num_frames": 9}),
    "HunyuanDiTControlNetPipeline": Case(hunyuan_control, {**HUNYUAN, "control_image": PICTURE["image"]}),
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
    "AnyFlowPipeline": Case(any_flow, {**VIDEO, "num_frames": 9, "guidance_scale": 3.0}),
}
