"""Small pipelines with random weights, to run the scripts in this folder on any machine. Their images are noise."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

LENGTH = 32
"""The maximum number of tokens of a prompt, one per letter."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that makes each letter a token."""
    words = ["<pad>", "<unk>", "</s>", *map(chr, range(33, 127))]
    vocabulary = {word: i for i, word in enumerate([*words, *(f"##{word}" for word in words[3:])])}
    tokens = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=LENGTH
    )


def clip(kind: type = CLIPTextModelWithProjection) -> Any:
    """Return a CLIP text encoder."""
    config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_attention_heads=2,
        num_hidden_layers=3,
        vocab_size=256,
        max_position_embeddings=LENGTH,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=1,
    )
    return kind(config).eval()


def t5(config: type = T5Config, kind: type = T5EncoderModel) -> Any:
    """Return a T5 text encoder."""
    return kind(config(d_model=32, d_kv=8, d_ff=32, num_heads=2, num_layers=1, vocab_size=256)).eval()


def vae(channels: int) -> AutoencoderKL:
    """Return an image decoder that doubles each side."""
    return AutoencoderKL(
        block_out_channels=[8, 8],
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=channels,
        shift_factor=0.0,
    ).eval()


def sdxl() -> StableDiffusionXLPipeline:
    """Return a small StableDiffusionXLPipeline, whose U-Net is the largest of these networks."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(64, 128),
        layers_per_block=2,
        sample_size=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=(4, 8),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        norm_num_groups=8,
    )
    return StableDiffusionXLPipeline(
        vae=vae(4),
        text_encoder=clip(CLIPTextModel),
        text_encoder_2=clip(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
    )


def sd3() -> StableDiffusion3Pipeline:
    """Return a small StableDiffusion3Pipeline."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
    )
    return StableDiffusion3Pipeline(
        vae=vae(4),
        text_encoder=clip(),
        text_encoder_2=clip(),
        text_encoder_3=t5(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        tokenizer_3=tokenizer(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux() -> FluxPipeline:
    """Return a small FluxPipeline."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=[4, 4, 8],
    )
    return FluxPipeline(
        vae=vae(4),
        text_encoder=clip(CLIPTextModel),
        text_encoder_2=t5(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def wan() -> WanPipeline:
    """Return a small WanPipeline."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    decoder = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return WanPipeline(
        transformer=transformer.eval(),
        vae=decoder.eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        text_encoder=t5(UMT5Config, UMT5EncoderModel),
        tokenizer=tokenizer(),
    )
