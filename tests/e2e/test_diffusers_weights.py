"""Pipelines whose denoiser is compiled, quantized, cast, offloaded or writes to its buffers, on cores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drp.diffusers import Workers, parallelize, reference
from tests.pipelines import IMAGE, PIPELINES, run
from tests.tiny.builders import flux, prompts, sd15, vae
from tests.writing import ExchangingLayer

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # Inductor's own


@pytest.fixture
def workers(pipeline_workers: Workers) -> Workers:
    return pipeline_workers


def drafts(pipe: Any, options: dict[str, Any], workers: Workers) -> None:
    """See that one draft has the untouched pipeline's bits, and two workers those of one process."""
    untouched = run(pipe, options)
    with parallelize(pipe, workers, drafts=1) as parallel:
        assert torch.equal(run(pipe, options), untouched)
    assert not parallel.report.calls[0].sequential
    with reference(pipe, devices=2, mode="aggressive"):
        expected = run(pipe, options)
    with parallelize(pipe, workers, "aggressive") as parallel:
        assert torch.equal(run(pipe, options), expected)
    assert parallel.report.calls[0].rounds < parallel.report.calls[0].steps
    assert torch.equal(run(pipe, options), untouched)


@pytest.mark.diffusers
@pytest.mark.timeout(600)  # Inductor compiles C++ for a minute, in three processes.
@pytest.mark.parametrize("how", ["compile", "compile_repeated_blocks", "torch.compile"])
def test_workers_compile_what_was_compiled(how: str, workers: Workers) -> None:
    name = "Flux" if how == "compile_repeated_blocks" else "DiT"
    make, options = PIPELINES[name]
    pipe = make()
    if how == "torch.compile":
        pipe.transformer = torch.compile(pipe.transformer)
    else:
        getattr(pipe.transformer, how)()
    compiled = pipe.transformer
    drafts(pipe, options, workers)
    assert pipe.transformer is compiled
    blocks = [module for module in pipe.transformer.modules() if vars(module).get("_compiled_call_impl") is not None]
    assert len(blocks) == {"compile": 1, "torch.compile": 0, "compile_repeated_blocks": 2}[how]


def test_weights_that_torchao_has_quantized(workers: Workers) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    pipe = flux()
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())
    drafts(pipe, PIPELINES["Flux"][1], workers)


def test_weights_in_ggufs_blocks(workers: Workers) -> None:
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    pipe = flux()
    kind = gguf.GGMLQuantizationType.Q8_0
    for module in pipe.transformer.modules():
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and child.in_features % 32 == 0:
                made = GGUFLinear(child.in_features, child.out_features, child.bias is not None, torch.float32)
                packed = torch.from_numpy(gguf.quants.quantize(child.weight.detach().numpy(), kind))
                made.weight, made.bias = GGUFParameter(packed, quant_type=kind), child.bias
                setattr(module, name, made)
    assert any(isinstance(parameter, GGUFParameter) for parameter in pipe.transformer.parameters())
    drafts(pipe, PIPELINES["Flux"][1], workers)


def test_a_pipeline_whose_models_are_offloaded_holds_its_denoiser(workers: Workers) -> None:
    pipe = flux()
    pipe.text_encoder = vae()  # which runs before the denoiser, as far as accelerate is told
    pipe.enable_model_cpu_offload(device="cpu")
    options = PIPELINES["Flux"][1]
    hooks = [(hook.model, hook.hook.prev_module_hook) for hook in pipe._all_hooks]
    assert len(hooks) == 3
    drafts(pipe, options, workers)
    with parallelize(pipe, workers, "aggressive"):
        run(pipe, options)
        assert "_old_forward" not in vars(pipe.transformer)
        assert pipe.vae._hf_hook.prev_module_hook.model is pipe.text_encoder  # no longer the denoiser
    assert "_old_forward" in vars(pipe.transformer)
    assert pipe.vae._hf_hook.prev_module_hook.model is pipe.transformer
    assert "maybe_free_model_hooks" not in vars(pipe)


def test_a_pipeline_that_is_offloaded_layer_by_layer_is_refused_with_the_remedy() -> None:
    pipe = flux()
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match=r"offload whole models, by pipe\.enable_model_cpu_offload"):  # noqa: SIM117
        with parallelize(pipe, 2):
            pass
    pipe.remove_all_hooks()
    run(pipe, PIPELINES["Flux"][1])  # It is as it was.


def test_layerwise_casting_and_gradient_checkpointing_are_no_hindrance(workers: Workers) -> None:
    pipe = flux()
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    pipe.transformer.enable_gradient_checkpointing()
    drafts(pipe, PIPELINES["Flux"][1], workers)


def test_a_module_may_replace_a_buffer_by_an_equal_one(workers: Workers) -> None:
    pipe = sd15()
    pipe.unet.conv_in = ExchangingLayer(pipe.unet.conv_in)
    drafts(pipe, {**prompts(1, 6, 8), **IMAGE}, workers)
