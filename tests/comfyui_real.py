"""The real ComfyUI, for tests by hand: COMFYUI_PATH=... pytest tests/integration/test_comfyui.py."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from tests.tiny.builders import normal

CPU = torch.device("cpu")


def prepare(path: str) -> None:
    """Make ComfyUI's modules importable, on the CPU."""
    sys.path.insert(0, path)
    from comfy import cli_args, options

    options.enable_args_parsing(False)
    cli_args.args.cpu = True
    import comfy.model_base
    import comfy.model_patcher
    import comfy.samplers
    import comfy.supported_models  # noqa: F401 - models are made of it


def model(flow: bool) -> Any:
    """Return a model patcher with a small U-Net, of noise or of flow matching."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    torch.manual_seed(0)
    config = comfy.supported_models.SD15(
        {
            "image_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "num_res_blocks": [1, 1],
            "channel_mult": [1, 2],
            "transformer_depth": [0, 1],
            "transformer_depth_output": [0, 0, 1, 1],
            "transformer_depth_middle": 1,
            "num_heads": 2,
            "num_head_channels": -1,
            "use_spatial_transformer": True,
            "context_dim": 16,
            "legacy": False,
            "use_linear_in_transformer": False,
            "adm_in_channels": None,
            "use_temporal_attention": False,
            "dtype": torch.float32,
        }
    )
    config.set_inference_dtype(torch.float32, None)
    kind = comfy.model_base.ModelType.FLOW if flow else comfy.model_base.ModelType.EPS
    made = comfy.model_base.BaseModel(config, model_type=kind, device=CPU).eval()
    for name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5 if "transformer_blocks" in name or "proj_out" in name else 0.1)
    return comfy.model_patcher.ModelPatcher(made, load_device=CPU, offload_device=CPU)


def sample(
    sampler: Any,
    model: Any,
    steps: int,
    noise: Tensor,
    latent: Tensor,
    begins: float | None,
    mask: Tensor | None,
    callback: Any,
    cond: dict[str, Any],
) -> Tensor:
    """Sample as SamplerCustom does."""
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    positive = [[normal(1, 6, 16, seed=2), dict(cond)]]
    if begins is not None:
        share = next(p / 1000 for p in range(1000) if sampling.percent_to_sigma(p / 1000) <= begins)
        positive.append([normal(1, 6, 16, seed=4), {"start_percent": share, "end_percent": 1.0}])
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, [[normal(1, 6, 16, seed=3), {}]])
    guider.set_cfg(3.0)
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    with torch.inference_mode():
        made: Tensor = guider.sample(noise, latent, sampler, sigmas, mask, callback=callback, disable_pbar=True, seed=3)
    return made.clone()
