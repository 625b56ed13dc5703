"""Workers that Ray places on the machines of its cluster, as a leader's `devices`."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from drp.leader.devices import parse_emulated
from drp.leader.remote import RemoteWorkers
from drp.limits import MAX_WORKERS, check_whole
from drp.protocol.dial import WorkerKeys
from drp.protocol.keys import Keys

ACTOR_MODULE = "drp.workers.ray_actor"


def on_ray(
    address: str | None = "auto",
    *,
    workers: int,
    device: str | None = None,
    threads: int = 1,
    strategy: str = "PACK",
    timeout: float = 60.0,
) -> RayWorkers:
    """Connect to a Ray cluster, and return workers for a leader's `devices`, which Ray places on its machines.

        with drp.Leader("digits", devices=drp.on_ray(workers=8, device="cuda")) as leader:
            print(leader.devices)

    Ray starts and watches the processes; drafts do not pass through Ray. Lost workers are started again. drp and the
    model must be importable on every machine, with the same weights.

    Args:
        address: the cluster's address, as of `ray.init`; not used if this program is connected to one.
        workers: the number of workers.
        device: "cuda", a GPU for each worker; "cpu", `threads` cores for each; or an emulated device, "emulated:20ms".
            By default "cuda" if the cluster has GPUs, else "cpu".
        threads: the number of torch threads of each worker.
        strategy: Ray's placement strategy, such as "PACK" or "SPREAD".
        timeout: seconds within which the cluster must have room for all workers.

    Raises ImportError without Ray, ConnectionError if there is no cluster, ValueError for other arguments.
    """
    workers = check_whole("workers", workers, 1, MAX_WORKERS)
    if device is not None and device.startswith("emulated:"):
        parse_emulated(device, 0)
    elif device not in ("cpu", "cuda", None):
        raise ValueError(f"device is {device!r}; give 'cuda', 'cpu' or 'emulated:TIME'")
    ray = _import_ray()
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    if device is None:
        device = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
    listen = f"tcp://{ray.util.get_node_ip_address()}:*"
    return RayWorkers(workers, listen, device=device, threads=threads, strategy=strategy, timeout=timeout)


@dataclass(frozen=True)
class RayWorkers(RemoteWorkers):
    """Workers that Ray places; see `on_ray`, which makes these. Each has its own key, generated when it is started."""

    device: str = "cuda"
    threads: int = 1
    strategy: str = "PACK"
    timeout: float = 60.0

    def __post_init__(self) -> None:
        """Check nothing more: `on_ray` has."""

    def read_keys(self) -> Keys:
        return Keys.generate()

    def make_launcher(self) -> RayLauncher:
        return RayLauncher(self)


class RayLauncher:
    """Starts workers as actors of Ray, each in a bundle of one placement group."""

    def __init__(self, source: RayWorkers) -> None:
        self._ray, self._source = _import_ray(), source
        gpus = int(source.device == "cuda")
        self._resources = {"num_cpus": source.threads, "num_gpus": gpus}
        bundle = {"CPU": source.threads} | ({"GPU": 1} if gpus else {})
        self._group = self._ray.util.placement_group([bundle] * source.count, strategy=source.strategy)
        self._actors: dict[int, Any] = {}
        if not self._group.wait(source.timeout):
            self.close()
            raise RuntimeError(
                f"Ray has no room for {source.count} workers with {bundle} each within {source.timeout:g} s; its "
                f"machines have {self._ray.cluster_resources()}"
            )

    def launch(self, number: int, keys: WorkerKeys, address: str, on_end: Callable[[str], None]) -> None:
        workers, strategies = (importlib.import_module(n) for n in (ACTOR_MODULE, "ray.util.scheduling_strategies"))
        bundle = number % self._source.count  # The numbers of these workers follow one another.
        place = strategies.PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        dialed = importlib.import_module("drp.workers.dialed")
        config = dialed.DialConfig(address, keys, self._source.device, threads=self._source.threads)
        try:
            actor = self._ray.remote(workers.RayActor).options(
                max_restarts=0, scheduling_strategy=place, **self._resources
            )
            self._actors[number] = actor.remote()
            served = self._actors[number].serve.remote(config)
        except Exception as error:  # of many kinds
            raise OSError(f"Ray cannot start an actor: {error}") from error
        served.future().add_done_callback(lambda future: on_end(_describe(future.exception())))

    def kill(self, number: int) -> None:
        actor = self._actors.pop(number, None)
        if actor is not None:
            with contextlib.suppress(Exception):  # of many kinds, such as after ray.shutdown(), which ends all actors
                self._ray.kill(actor)

    def close(self) -> None:
        for number in list(self._actors):
            self.kill(number)
        with contextlib.suppress(Exception):  # likewise
            self._ray.util.remove_placement_group(self._group)


def _describe(error: BaseException | None) -> str:
    """Describe how an actor has ended."""
    return "has ended" if error is None else f"was lost by Ray: {type(error).__name__}: {error}"


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'draft-refine[ray]'") from None
