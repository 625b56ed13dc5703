"""How small pipelines of many families are called, and what a drafted call is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from drp.diffusers import CallReport, Workers, parallelize, reference
from tests.tiny.builders import (
    SD,
    cogvideo,
    controlnet,
    ddim,
    dit,
    flux,
    ltx,
    normal,
    pixart,
    pooled,
    prompts,
    qwen,
    sana,
    scheduler,
    sd3,
    sd15,
    sd21,
    sdxl,
    unet,
    vae,
    wan,
    z_image,
)

STEPS = 7
IMAGE = {"output_type": "latent", "height": 16, "width": 16}

PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "SD 1.5": (sd15, {**prompts(1, 6, 8), **IMAGE}),
    "SD 2.1": (sd21, {**prompts(1, 6, 8), **IMAGE, "guidance_rescale": 0.7}),
    "SDXL": (sdxl, {**prompts(1, 6, 8), **pooled(), **IMAGE}),
    "SD 3": (sd3, {**prompts(1, 6, 8), **pooled(), **IMAGE}),
    "Flux": (flux, {"prompt_embeds": normal(1, 6, 8), "pooled_prompt_embeds": normal(1, 8), **IMAGE}),
    "Flux, true CFG": (flux, {**prompts(1, 6, 8), **pooled(), **IMAGE, "true_cfg_scale": 3.0}),
    "PixArt": (
        pixart,
        {**prompts(1, 6, 8, mask=True), **IMAGE, "negative_prompt": None, "use_resolution_binning": False},
    ),
    "Sana": (
        sana,
        {
            **prompts(1, 6, 8, mask=True),
            "output_type": "latent",
            "height": 256,
            "width": 256,
            "negative_prompt": None,
            "use_resolution_binning": False,
        },
    ),
    "DiT": (dit, {"class_labels": [3, 1], "output_type": "pt"}),
    "Qwen-Image": (
        qwen,
        {
            **prompts(1, 6, 8),
            **IMAGE,
            "prompt_embeds_mask": torch.ones(1, 6).long(),
            "negative_prompt_embeds_mask": torch.ones(1, 6).long(),
            "true_cfg_scale": 3.0,
        },
    ),
    "Z-Image": (z_image, {**prompts(2, 6, 8, lists=True), **IMAGE, "guidance_scale": 3.0}),
    "Wan": (wan, {**prompts(1, 6, 8), "output_type": "latent", "height": 16, "width": 16, "num_frames": 5}),
    "LTX-Video": (
        ltx,
        {**prompts(1, 6, 8, mask=True), "output_type": "latent", "height": 32, "width": 32, "num_frames": 9},
    ),
    "CogVideoX": (cogvideo, {**prompts(1, 6, 8), "output_type": "latent", "height": 16, "width": 16, "num_frames": 5}),
}


def image_to_image() -> Any:
    return StableDiffusionImg2ImgPipeline(vae=vae(), unet=unet(), scheduler=ddim(), **SD)


def inpaint(channels: int) -> Any:
    made = StableDiffusionInpaintPipeline(vae=vae(), unet=unet(channels), scheduler=ddim(), **SD)
    made.set_progress_bar_config(disable=True)
    return made


def controlled() -> Any:
    return StableDiffusionControlNetPipeline(
        vae=vae(), unet=unet(), controlnet=controlnet(), scheduler=scheduler(EulerDiscreteScheduler), **SD
    )


def wan22() -> Any:
    made = wan()
    torch.manual_seed(5)
    second = WanTransformer3DModel(**{k: v for k, v in made.transformer.config.items() if not k.startswith("_")})
    return WanPipeline(
        transformer=made.transformer,
        transformer_2=second.eval(),
        boundary_ratio=0.8,
        vae=made.vae,
        scheduler=made.scheduler,
        text_encoder=None,
        tokenizer=None,
    )


PICTURE = {"image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(7))}

MASK = {"mask_image": (torch.arange(16) < 8).float().expand(1, 1, 16, 16)}

TEXT = {**prompts(1, 6, 8), "output_type": "latent"}

VARIANTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "image to image": (image_to_image, {**TEXT, **PICTURE, "strength": 0.7, "num_inference_steps": 10}),
    "inpaint, 9 channels": (lambda: inpaint(9), {**TEXT, **PICTURE, **MASK, **IMAGE, "strength": 1.0}),
    "inpaint, 4 channels": (lambda: inpaint(4), {**TEXT, **PICTURE, **MASK, **IMAGE, "strength": 1.0}),
    "ControlNet": (controlled, {**TEXT, **PICTURE}),
    "two in a batch, no guidance": (sd15, {**prompts(2, 6, 8), **IMAGE, "guidance_scale": 1.0}),
    "wider than high": (sdxl, {**prompts(1, 6, 8), **pooled(), **IMAGE, "width": 32, "num_images_per_prompt": 2}),
    "the first part of the steps": (sdxl, {**prompts(1, 6, 8), **pooled(), **IMAGE, "denoising_end": 0.7}),
}


def run(pipe: Any, options: dict[str, Any], steps: int = STEPS, seed: int = 0) -> torch.Tensor:
    """Call a pipeline; return what it makes as a tensor."""
    pipe.set_progress_bar_config(disable=True)
    made = pipe(**{"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed), **options})
    first = next(iter(made.values()))
    return torch.as_tensor(first)


def drafted(report: CallReport) -> None:
    """Check that a call was drafted from its first step on."""
    assert not report.sequential, str(report)
    assert report.rounds < report.steps, str(report)


def check_bits(pipe: Any, options: dict[str, Any], workers: Workers, devices: str) -> None:
    """Check that workers have the bits of one process, which counts as `devices`, and with one draft the pipeline's."""
    untouched = run(pipe, options)
    with reference(pipe, devices=devices, mode="aggressive"):
        expected = run(pipe, options)
    with parallelize(pipe, workers, "aggressive") as parallel:
        assert torch.equal(run(pipe, options), expected)
    drafted(parallel.report.calls[0])
    with parallelize(pipe, workers, drafts=1) as parallel:
        assert torch.equal(run(pipe, options), untouched)
    assert not parallel.report.calls[0].sequential
