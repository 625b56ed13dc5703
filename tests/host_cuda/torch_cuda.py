"""The functions of torch.cuda on devices that are the host. Everything is finished before a call returns."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

from tests.host_cuda import LIBRARY

UUIDS = tuple(f"0000000{index}-0000-0000-0000-000000000000" for index in range(4))


def load() -> ModuleType:
    """Load the device into torch, which asks once, when it is imported, whether there is CUDA."""
    if "host_cuda" not in sys.modules:
        ctypes.CDLL(str(LIBRARY))
        import torch  # noqa: F401  # what the module below is made with

        spec = importlib.util.spec_from_file_location("host_cuda", LIBRARY)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["host_cuda"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["host_cuda"])
    return sys.modules["host_cuda"]


native: Any = load()

import torch  # noqa: E402  # after the device is registered
from torch import Tensor  # noqa: E402
from torch.cuda import nvtx  # noqa: E402


def index_of(device: Any) -> int:
    """Return the index that an argument of torch.cuda means."""
    index = device if isinstance(device, int | None) else torch.device(device).index
    return int(native.device() if index is None else index)


class Stream:
    """A stream that has always finished."""

    cuda_stream = 0

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device_index = index_of(device)
        self.device = torch.device("cuda", self.device_index)

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return True


class Event:
    """An event that has always happened."""

    def __init__(self, **options: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


class CurrentDevice(AbstractContextManager[None]):
    """What torch.cuda.device is."""

    def __init__(self, device: Any) -> None:
        self._index = index_of(device)

    def __enter__(self) -> None:
        self._before = native.set_device(self._index)

    def __exit__(self, *_: object) -> None:
        native.set_device(self._before)


def _properties(device: Any = None) -> Any:
    index = index_of(device)
    return SimpleNamespace(
        name="host", uuid=UUIDS[index], major=9, minor=0, total_memory=1 << 37, multi_processor_count=132,
        pci_domain_id=0, pci_bus_id=index, pci_device_id=0,
    )  # fmt: skip


def _clone(storage: Any) -> Any:
    if storage.device.type != "cuda":
        return _clone_on_host(storage)
    copy: Any = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).clone()
    return copy.untyped_storage()


_clone_on_host: Any = torch.UntypedStorage.clone


def install() -> None:
    """Replace the functions of torch.cuda in this process."""
    generators = tuple(native.generator(index) for index in range(native.COUNT))
    # What torch has replaces what a build without CUDA lacks.
    vars(torch.cuda).update(
        _initialized=True,
        _lazy_init=lambda: None,
        init=lambda: None,
        is_initialized=lambda: True,
        is_available=lambda: True,
        device_count=lambda: native.COUNT,
        current_device=native.device,
        set_device=lambda device: native.set_device(index_of(device)),
        device=CurrentDevice,
        Stream=Stream,
        Event=Event,
        current_stream=Stream,
        default_stream=Stream,
        stream=lambda stream: nullcontext(),
        set_stream=lambda stream: None,
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
        ipc_collect=lambda: None,
        mem_get_info=lambda device=None: (1 << 36, 1 << 37),
        memory_allocated=lambda device=None: 0,
        max_memory_allocated=lambda device=None: 0,
        reset_peak_memory_stats=lambda device=None: None,
        get_device_name=lambda device=None: "host",
        get_device_capability=lambda device=None: (9, 0),
        get_device_properties=_properties,
        can_device_access_peer=lambda device, peer: True,
        is_bf16_supported=lambda including_emulation=True: True,
        is_current_stream_capturing=lambda: False,
        default_generators=generators,
        get_rng_state=lambda device=None: generators[index_of(device)].get_state(),
        set_rng_state=lambda state, device=None: generators[index_of(device)].set_state(state),
        manual_seed=lambda seed: generators[native.device()].manual_seed(seed),
        manual_seed_all=lambda seed: [generator.manual_seed(seed) for generator in generators],
    )
    vars(torch._C).update(
        _cuda_getCurrentRawStream=lambda device: 0,
        _cuda_getDevice=native.device,
        _cuda_setDevice=native.set_device,
        _cuda_exchangeDevice=native.set_device,
        _cuda_maybeExchangeDevice=native.set_device,
        _cuda_getDeviceCount=lambda: native.COUNT,
        _cuda_isCurrentStreamCapturing=lambda: False,
    )
    vars(nvtx)["_nvtx"] = SimpleNamespace(
        rangePushA=lambda message: 0, rangePop=lambda: 0, markA=lambda message: None,
        rangeStartA=lambda message: 0, rangeEnd=lambda number: None,
    )  # fmt: skip
    vars(torch.version)["cuda"] = "13.0"
    torch.UntypedStorage.clone = _clone  # type: ignore[method-assign]
    Tensor.record_stream = lambda self, s: None  # type: ignore[method-assign]
