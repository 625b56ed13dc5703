"""A network between leader and workers that delays, drops and is cut, in two network namespaces; `make test-faults`.

Skipped, with the reason, where this user may not make network namespaces and TUN devices.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.two_machines import SCENARIOS

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

UNSHARE = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> None:
    try:
        tried = subprocess.run(
            [*UNSHARE, "ip", "tuntap", "add", "drp0", "mode", "tun"], capture_output=True, text=True, timeout=30
        )
    except FileNotFoundError as error:
        pytest.skip(f"no network namespaces here: {error}")
    if tried.returncode:
        pytest.skip(f"no network namespaces here: {tried.stderr.strip()}")


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_network_between_two_machines(name: str) -> None:
    command = [*UNSHARE, sys.executable, "-m", "tests.two_machines", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
