"""The options of a leader: checked before workers start; the same by name, as an object and as flags."""

from __future__ import annotations

import platform
import re
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import drp
from drp.cli import main
from drp.cli.leader_options import make_leader_options
from drp.leader import ExecutionOptions, Leader, LeaderOptions
from drp.leader.options import LeaderArguments
from drp.leader.scheduling.policies import Hedged, LoadAdaptive


def test_the_keyword_arguments_are_the_fields() -> None:
    assert [*LeaderArguments.__annotations__] == [field.name for field in fields(LeaderOptions)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"start_timeout": 0.0}, "start_timeout is 0.0; give seconds above 0"),
        ({"draft_timeout": float("nan")}, "draft_timeout is nan; give seconds above 0"),
        ({"drafts_per_device": 0}, "drafts_per_device is 0; give a whole number, 1 to"),
        ({"drafts_per_device": True}, "drafts_per_device is True; give a whole number, 1 to"),
        ({"policy": "fast"}, "unknown policy 'fast'; choose one of barrier"),
        ({"policy": 3}, "unknown policy 3; choose one of barrier"),
        ({"devices": "tpu"}, "device 'tpu' does not exist"),
        ({"start_timeout": "5"}, "start_timeout is '5'; give seconds above 0"),
        ({"execution": "async"}, "execution is 'async'; give a drp.ExecutionOptions"),
        (
            {"policy": "hedged", "execution": ExecutionOptions(dispatch="async")},
            'hedge is 1.25, but with dispatch="async" no draft is sent twice',
        ),
    ],
)
def test_an_invalid_option_is_refused_with_value_and_remedy(arguments: dict[str, Any], words: str) -> None:
    for call in (Leader, drp.sample):
        with pytest.raises(ValueError, match=re.escape(words)):
            call("digits", **arguments)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="unknown option 'devcies'; did you mean 'devices'"):
        Leader("digits", devcies=2)  # type: ignore[call-arg]  # what is tested
    with pytest.raises(TypeError, match="unknown option 'devcies'; did you mean 'devices'"):
        drp.sample("digits", devcies=2)  # type: ignore[call-arg]  # likewise
    with pytest.raises(ValueError, match=r"options is 2; give a drp\.LeaderOptions, or options by name: devices=2"):
        Leader("digits", 2)  # type: ignore[arg-type]  # likewise


def test_numbers_of_numpy_are_numbers() -> None:
    assert type(LeaderOptions(drafts_per_device=np.int64(2)).drafts_per_device) is int  # type: ignore[arg-type]


def test_arguments_take_precedence_over_options() -> None:
    options = LeaderOptions(devices="cpu:99999", policy="hedged")
    with pytest.raises(ValueError, match="cpu:99999"):
        Leader("digits", options)
    with pytest.raises(ValueError, match="cpu:88888"):
        Leader("digits", options, devices="cpu:88888")
    assert options.scheduling_policy == Hedged()


def test_dispatch_is_synchronous_where_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ExecutionOptions().allows_async == (platform.machine() in ("x86_64", "AMD64"))
    assert not ExecutionOptions(dispatch="sync").allows_async
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert not ExecutionOptions().allows_async


def test_the_command_line_has_the_same_options() -> None:
    given = {
        "devices": "2xcpu",
        "ray": None,
        "threads": None,
        "drafts_per_device": 3,
        "policy": "run-affinity",
        "hedge": None,
        "dispatch": "sync",
        "start_timeout": 5.0,
        "draft_timeout": None,
    }
    options = make_leader_options(given)
    assert options.drafts == 6
    assert (options.threads, options.start_timeout, options.execution.dispatch) == (1, 5.0, "sync")
    assert make_leader_options({**given, "policy": "load-adaptive", "hedge": 1.5}).policy == LoadAdaptive(hedge=1.5)


@pytest.mark.parametrize("command", ["sample", "serve"])
def test_the_help_lists_options_by_group(command: str) -> None:
    text = CliRunner().invoke(main, [command, "--help"]).output
    leader = text[text.index("Leader options:") : text.index("Execution options:")]
    assert all(f"--{name}" in leader for name in ("devices", "threads", "policy", "hedge", "draft-timeout"))
    assert "--dispatch" in text[text.index("Execution options:") :]
    assert text.count("  -d, --devices") == 1
    assert text.count("[MODEL]") == 1  # in the usage line, not among the options
