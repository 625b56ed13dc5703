"""Small pipelines and parts of them, with random weights. Prompts are embeddings: there is no tokenizer here."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    ControlNetModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet(channels: int = 4, **options: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        **{
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "sample_size": 8,
            "in_channels": channels,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 8,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            **options,
        }
    ).eval()


def vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=[8, 8],
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
    ).eval()


def controlnet() -> ControlNetModel:
    torch.manual_seed(2)
    made = ControlNetModel.from_unet(unet(), conditioning_embedding_out_channels=(8, 16))
    for block in (*made.controlnet_down_blocks, made.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.3)  # A fresh ControlNet adds nothing.
    return made.eval()


class MixingConv(torch.nn.Module):
    """A layer in which the samples of a batch are not on their own."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.inner(x + x.flip(0))
        return mixed


SD = {"safety_checker": None, "feature_extractor": None, "text_encoder": None, "tokenizer": None}

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def scheduler(kind: type = DDIMScheduler, **options: Any) -> Any:
    return kind(**BETAS, **options)


def ddim(**options: Any) -> Any:
    return scheduler(DDIMScheduler, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **options)


def sd15() -> Any:
    return StableDiffusionPipeline(
        vae=vae(), unet=unet(), scheduler=scheduler(PNDMScheduler, skip_prk_steps=True, steps_offset=1), **SD
    )


def sd21() -> Any:
    return StableDiffusionPipeline(vae=vae(), unet=unet(), scheduler=ddim(prediction_type="v_prediction"), **SD)


def sdxl(**options: Any) -> Any:
    denoiser = unet(
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 8,
        **options,
    )
    none = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    return StableDiffusionXLPipeline(
        vae=vae(), unet=denoiser, scheduler=scheduler(EulerDiscreteScheduler, timestep_spacing="leading"), **none
    )


def flow() -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def sd3() -> Any:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=8,
        pooled_projection_dim=8,
    )
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    return StableDiffusion3Pipeline(vae=vae(), transformer=transformer.eval(), scheduler=flow(), **dict.fromkeys(names))


FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "axes_dims_rope": [4, 4, 8],
}
"""The sizes of transformers like Flux's."""


def flux() -> Any:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(**FLUX, pooled_projection_dim=8, guidance_embeds=True)
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    return FluxPipeline(
        vae=vae(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        **dict.fromkeys(names),
    )


def pixart() -> Any:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=8,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(
        vae=vae(),
        transformer=transformer.eval(),
        scheduler=scheduler(DPMSolverMultistepScheduler),
        text_encoder=None,
        tokenizer=None,
    )


def sana() -> Any:
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
        timestep_scale=0.001,
    )
    return SanaPipeline(
        vae=None,
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        text_encoder=None,
        tokenizer=None,
    )


def dit() -> Any:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return DiTPipeline(transformer=transformer.eval(), vae=vae(), scheduler=ddim())


def qwen() -> Any:
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(8, 4, 4),
    )
    decoder = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True]
    )
    return QwenImagePipeline(
        transformer=transformer.eval(), vae=decoder.eval(), scheduler=flow(), text_encoder=None, tokenizer=None
    )


def z_image() -> Any:
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[8, 4, 4],
        axes_lens=[64, 32, 32],
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # Its padding tokens are left uninitialised.
    return ZImagePipeline(
        transformer=transformer.eval(), vae=vae(), scheduler=flow(), text_encoder=None, tokenizer=None
    )


WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 32,
    "ffn_dim": 16,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}


def wan() -> Any:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**WAN)
    decoder = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return WanPipeline(
        transformer=transformer.eval(),
        vae=decoder.eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        text_encoder=None,
        tokenizer=None,
    )


def ltx() -> Any:
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=8,
    )
    decoder = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        encoder_causal=True,
        decoder_causal=False,
    )
    return LTXPipeline(
        transformer=transformer.eval(), vae=decoder.eval(), scheduler=flow(), text_encoder=None, tokenizer=None
    )


def cogvideo() -> Any:
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=8,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=5,
        patch_size=2,
        max_text_seq_length=6,
    )
    return CogVideoXPipeline(
        transformer=transformer.eval(),
        vae=None,
        scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        text_encoder=None,
        tokenizer=None,
    )


def prompts(*shape: int, mask: bool = False, lists: bool = False) -> dict[str, Any]:
    """Embeddings of a prompt and of a negative one."""
    both = {"prompt_embeds": normal(*shape), "negative_prompt_embeds": normal(*shape, seed=2)}
    if lists:
        return {name: list(value) for name, value in both.items()}
    if mask:
        ones = torch.ones(shape[:2], dtype=torch.int64)
        ones[:, -2:] = 0
        both |= {"prompt_attention_mask": ones, "negative_prompt_attention_mask": torch.ones_like(ones)}
    return both


def pooled(width: int = 8) -> dict[str, Any]:
    return {"pooled_prompt_embeds": normal(1, width, seed=3), "negative_pooled_prompt_embeds": normal(1, width, seed=4)}


def parts(made: Any, **more: Any) -> dict[str, Any]:
    """Return what a pipeline is made of, to make another of it."""
    known = {name: each for name, each in made.components.items() if each is not None}
    return {**known, **more}
