"""The node for ComfyUI: with a double of what it uses, or with ComfyUI itself where COMFYUI_PATH names a checkout."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from tests.comfyui import CONTROL, PATH, Comfy, spy

# Warnings of ComfyUI and of what it imports are its own.
pytestmark = [
    pytest.mark.filterwarnings("ignore" if PATH else "error"),
]

NAMES = ("euler", "heun", "dpmpp_2m", "euler_ancestral")


@pytest.fixture(scope="module")
def comfy() -> Comfy:
    return Comfy()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_one_draft_has_the_samplers_own_bits(comfy: Comfy, name: str, flow: bool) -> None:
    model = comfy.model(flow)
    untouched = comfy.sample(comfy.sampler(name), model)
    (drafted,) = comfy.node.get_sampler(comfy.sampler(name), 1, "aggressive")
    assert torch.equal(comfy.sample(drafted, model), untouched)


@pytest.mark.parametrize(("drafts", "rounds"), [(2, 13), (4, 7), (8, 4)])
def test_drafts_save_rounds(comfy: Comfy, drafts: int, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = comfy.model(), spy(comfy.module, monkeypatch)
    untouched = comfy.sample(comfy.sampler("euler"), model)
    (drafted,) = comfy.node.get_sampler(comfy.sampler("euler"), drafts, "aggressive")
    made = comfy.sample(drafted, model)
    assert (runs[0].calls, runs[0].rounds, runs[0].reason) == (24, rounds, "")
    assert 0 < apart(made, untouched) < 0.05


def test_the_default_rule_and_stride_depend_on_the_samplers_noise(
    comfy: Comfy, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, runs = comfy.model(), spy(comfy.module, monkeypatch)

    def distance(rule: str, **options: float) -> float:
        sampler = comfy.sampler("euler_ancestral", **options)
        (drafted,) = comfy.node.get_sampler(sampler, 4, "window", rule)
        return apart(comfy.sample(drafted, model), comfy.sample(sampler, model))

    assert distance("default") < 0.8 * distance("damped")
    assert distance("default", eta=0.0) == distance("damped", eta=0.0)
    assert distance("default", s_noise=0.0) == distance("damped", s_noise=0.0)
    # A window of 4 drafts moves on by 2.5 steps if the sampler adds noise, by 3 otherwise.
    assert [run.rounds for run in runs] == [11, 11, 9, 9, 9, 9]


@pytest.mark.parametrize(("name", "mode"), [*((name, "window") for name in NAMES), ("euler", "conservative")])
def test_samples_approach_the_sequential_ones(
    comfy: Comfy, name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, runs = comfy.model(), spy(comfy.module, monkeypatch)
    distances = []
    for steps in (12, 48):
        (drafted,) = comfy.node.get_sampler(comfy.sampler(name), 3, mode)
        made = comfy.sample(drafted, model, steps)
        distances.append(apart(made, comfy.sample(comfy.sampler(name), model, steps)))
    assert distances[1] < 0.6 * distances[0]
    assert all(not run.reason and run.rounds < 0.7 * run.calls for run in runs)


def test_callbacks_come_for_every_step_in_order(comfy: Comfy) -> None:
    model, seen = comfy.model(), []

    def note(step: int, denoised: torch.Tensor, x: torch.Tensor, steps: int) -> None:
        seen.append((step, steps, denoised.shape == x.shape))

    (drafted,) = comfy.node.get_sampler(comfy.sampler("euler"), 4, "window")
    comfy.sample(drafted, model, callback=note)
    assert seen == [(i, 24, True) for i in range(24)]


def test_an_interrupt_ends_the_run_before_the_next_round(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, asked = spy(comfy.module, monkeypatch), []

    def check() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise InterruptedError("the user has pressed cancel")

    monkeypatch.setattr(comfy.management, "throw_exception_if_processing_interrupted", check)
    (drafted,) = comfy.node.get_sampler(comfy.sampler("euler"), 4, "aggressive")
    with pytest.raises(InterruptedError, match="pressed cancel"):
        comfy.sample(drafted, comfy.model())
    assert runs[0].rounds == 2


def test_what_a_callback_raises_is_passed_on(comfy: Comfy) -> None:
    def stop(step: int, *_: Any) -> None:
        if step == 5:
            raise InterruptedError("between two steps")

    (drafted,) = comfy.node.get_sampler(comfy.sampler("euler"), 4, "aggressive")
    with pytest.raises(InterruptedError, match="between two steps"):
        comfy.sample(drafted, comfy.model(), callback=stop)


def test_a_batch_holds_only_drafts_with_the_same_conditions(comfy: Comfy) -> None:
    """ComfyUI asks the first noise level of a batch which conditions are active."""
    model = comfy.model()
    samples = []
    for batch in (True, False):
        (drafted,) = comfy.node.get_sampler(comfy.sampler("euler"), 4, "aggressive", batch=batch)
        samples.append(comfy.sample(drafted, model, begins=5.0))
    assert apart(*samples) < 1e-5
    assert apart(samples[0], comfy.sample(drafted, model)) > 1e-3  # without the second condition


@pytest.mark.parametrize("batch", [1, 2])
def test_inpainting_keeps_what_is_masked(comfy: Comfy, batch: int) -> None:
    model, mask = comfy.model(), torch.ones(1, 1, 8, 8)
    mask[..., :4] = 0
    untouched = comfy.sample(comfy.sampler("euler"), model, batch=batch, mask=mask)
    (drafted,) = comfy.node.get_sampler(comfy.sampler("euler"), 4, "window")
    made = comfy.sample(drafted, model, batch=batch, mask=mask)
    assert apart(made[..., :4], untouched[..., :4]) < 1e-5
    assert 0 < apart(made[..., 4:], untouched[..., 4:]) < 0.05


def test_a_copy_of_the_model_on_each_device_has_the_bits_of_one(comfy: Comfy) -> None:
    model = comfy.model()
    before = {name: value.clone() for name, value in getattr(model, "model", model).state_dict().items()}
    samples = []
    for options in ({"batch": False}, {"devices": "cpu, cpu, cpu"}):
        (drafted,) = comfy.node.get_sampler(comfy.sampler("heun"), 4, "window", **options)
        samples.append(comfy.sample(drafted, model, begins=5.0, batch=2))
    assert torch.equal(*samples)
    after = getattr(model, "model", model).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.skipif(bool(PATH), reason="a stand-in of a ControlNet, which ComfyUI itself would call")
def test_what_cannot_be_copied_is_evaluated_on_one_device(comfy: Comfy, caplog: pytest.LogCaptureFixture) -> None:
    model = comfy.model()
    (alone,) = comfy.node.get_sampler(comfy.sampler("euler"), 3, "window")
    (drafted,) = comfy.node.get_sampler(comfy.sampler("euler"), 3, "window", devices="cpu,cpu")
    with caplog.at_level(logging.WARNING):
        made = comfy.sample(drafted, model, control=CONTROL)
    assert "on one device: ControlNets" in caplog.text
    assert torch.equal(made, comfy.sample(alone, model))


def sample_by_what_it_sees(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any, **_: Any) -> Any:
    """Choose the length of each step by the denoised latents."""
    sigma = float(sigmas[0])
    while sigma > 0.1:
        denoised = model(x, torch.full((len(x),), sigma), **extra_args)
        after = sigma * (0.7 + 0.1 * float(torch.tanh(denoised.mean())))
        x, sigma = x + (x - denoised) / sigma * (after - sigma), after
    return x


def sample_with_a_memory(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any, **options: Any) -> Any:
    """Do something else each time that it is called."""
    options["memory"].append(1)
    shift = 1e-3 * len(options["memory"])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i].expand(len(x)), **extra_args)
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i]) + shift
    return x


def sample_with_other_options(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any, **_: Any) -> Any:
    """Put an option of its own into the model's, as samplers that want the unguided prediction do."""
    extra_args = {**extra_args, "model_options": {**extra_args["model_options"], "own": 1}}
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i].expand(len(x)), **extra_args)
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (sample_by_what_it_sees, "chooses its noise levels"),
        (sample_with_a_memory, "does not do the same"),
        (sample_with_other_options, "changes the model's options"),
    ],
)
def test_samplers_that_cannot_be_drafted_run_as_they_are(
    comfy: Comfy, function: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, model = spy(comfy.module, monkeypatch), comfy.model()
    kind = comfy.module.comfy.samplers.KSAMPLER
    options = {"memory": [1]} if function is sample_with_a_memory else {}  # which has then run before
    untouched = comfy.sample(kind(function, options, {}), model)
    if options:
        options["memory"].clear()  # The dry run that counts the calls comes first.
    (drafted,) = comfy.node.get_sampler(kind(function, options, {}), 3, "aggressive")
    made = comfy.sample(drafted, model)
    assert reason in runs[0].reason
    assert runs[0].rounds == runs[0].calls
    assert torch.equal(made, untouched)


def test_unsuited_samplers_are_left_and_named(comfy: Comfy, caplog: pytest.LogCaptureFixture) -> None:
    def sample_lcm(*_: Any, **__: Any) -> None:
        raise AssertionError

    sampler = comfy.module.comfy.samplers.KSAMPLER(sample_lcm)
    assert comfy.node.get_sampler(sampler, 4, "window") == (sampler,)
    assert "sample_lcm is left as it is: it makes new noise" in caplog.text


def test_devices_that_there_are_not_are_refused(comfy: Comfy) -> None:
    with pytest.raises(ValueError, match="devices has 'tpu:0'"):
        comfy.node.get_sampler(comfy.sampler("euler"), 4, "window", devices="cpu,tpu:0")


def test_the_inputs_are_as_comfyui_describes_them(comfy: Comfy) -> None:
    inputs = comfy.node.INPUT_TYPES()
    assert inputs["required"]["sampler"] == ("SAMPLER",)
    assert comfy.node.RETURN_TYPES == ("SAMPLER",)
    defaults = {name: given[1].get("default") for name, given in inputs["optional"].items()}
    (made,) = comfy.node.get_sampler(comfy.sampler("euler"), 4, "window", devices=defaults["devices"])
    assert type(made) is type(comfy.sampler("euler"))
