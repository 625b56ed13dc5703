"""`drp doctor`: examines what of this machine drp can use, and what does not work. It changes nothing."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from drp import doctor_peer
from drp.errors import ProtocolError
from drp.leader.devices import parse_devices
from drp.leader.gpus import ALLOCATOR, Gpu, find_gpus, parse_cores
from drp.leader.supervision.process import Process, find_interpreter
from drp.protocol.cuda import GpuMemory, is_inverted
from drp.protocol.handles import GpuHandle
from drp.protocol.memory import SharedMemory

State = Literal["", "good", "bad"]
CORES = Path("/sys/devices/system/node")
CGROUP = Path("/sys/fs/cgroup")
SHM = "/dev/shm"  # noqa: S108  # only its size is read
FILES = 16
"""The maximum number of descriptors that a leader needs for each worker."""
SEEN = "import os, sys; os.close(os.open(sys.argv[1], os.O_RDWR))"
PEER_BYTES = 1 << 20
PROBE = 4096
PEER_TIMEOUT = 120.0
"""Seconds within which a process on a GPU must answer."""
FIRST_NAMESPACE = "pid:[4026531836]"
"""The kernel's name of the initial process namespace (PROC_PID_INIT_INO)."""
Matrix = tuple[tuple[str, ...], ...]
"""The results of accesses between GPUs: a row for each GPU that has the memory, a column for each that reads it."""


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was examined, what was found, whether that is good or bad, and the remedy if bad."""

    about: str
    seen: str
    state: State = ""
    remedy: str = ""


@dataclass(frozen=True)
class DoctorReport:
    """The findings by section, and which GPUs can access each other: by copies, and between processes by CUDA IPC."""

    sections: dict[str, tuple[Finding, ...]]
    gpus: tuple[Gpu, ...]
    peers: Matrix
    ipc: Matrix

    @property
    def bad(self) -> list[Finding]:
        """The findings that prevent drp from working."""
        return [finding for findings in self.sections.values() for finding in findings if finding.state == "bad"]


def examine(find: Callable[[], tuple[Gpu, ...]] = find_gpus) -> DoctorReport:
    """Examine this machine; `find` returns its GPUs."""
    try:
        gpus, why = find(), ""
    except ValueError as error:
        gpus, why = (), str(error)
    reached = ipc(gpus)
    sections = {
        "software": (*_software(),),
        "GPUs": (*_gpus(gpus, why),),
        "shared memory and processes": (shared_memory(), *_kernel()),
        "cores": (*_cores(),),
        "limits": (*_limits(), _shm(bool(gpus))),
        "drp will use": (*_use(gpus, why, reached),),
    }
    return DoctorReport(sections, gpus, peers(gpus), reached)


def _software() -> list[Finding]:
    cuda = torch.version.cuda
    return [
        Finding("python", sys.version.split()[0]),
        Finding("torch", f"{torch.__version__}, {f'built for CUDA {cuda}' if cuda else 'built without CUDA'}"),
        Finding("pyzmq", version("pyzmq")),
        Finding("msgpack", version("msgpack")),
        Finding("driver", _driver()),
    ]


def _driver() -> str:
    """Describe the driver and its GPUs, by NVML."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return "not asked: pip install 'draft-refine[gpu]'"
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return f"none: {error}"
    try:
        devices = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        names = [
            f"{_text(nvml.nvmlDeviceGetName(each))} {_text(nvml.nvmlDeviceGetUUID(each))}"
            + (" (not for several processes: nvidia-smi -c DEFAULT)" if nvml.nvmlDeviceGetComputeMode(each) else "")
            for each in devices
        ]
        return f"{_text(nvml.nvmlSystemGetDriverVersion())}, with {', '.join(names) or 'no GPU'}"
    except nvml.NVMLError as error:
        return f"there, but: {error}"
    finally:
        nvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _gpus(gpus: Sequence[Gpu], why: str) -> list[Finding]:
    if not gpus:
        return [Finding("GPUs", f"none: {why}")]
    found = [
        Finding(
            f"cuda:{gpu.index}",
            f"{gpu.name}, {gpu.uuid}, {gpu.nbytes / 2**30:.1f} GiB, at {gpu.bus or 'an unknown place'}, "
            f"beside {_cores_text(gpu.cores) if gpu.cores else 'cores that the kernel does not name'}"
            + (f", NUMA node {gpu.node}" if gpu.node is not None else "")
            + ("; a MIG slice, without IPC to others" if " MIG " in gpu.name else ""),
            "good",
        )
        for gpu in gpus
    ]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        found.append(Finding("CUDA_VISIBLE_DEVICES", repr(visible)))
    return found + [Finding(name, repr(os.environ[name])) for name in ALLOCATOR if name in os.environ]


def peers(gpus: Sequence[Gpu]) -> Matrix:
    """Copy from each GPU to each and compare the data, since the driver's report of peer access does not prove it."""
    return tuple(tuple(_peer(source.index, target.index) for target in gpus) for source in gpus)


def _peer(source: int, target: int) -> str:
    try:
        sent = torch.arange(PEER_BYTES, device=f"cuda:{source}", dtype=torch.int64).to(torch.uint8)
        arrived = sent.to(f"cuda:{target}", copy=True)
        whole = torch.equal(arrived.cpu(), torch.arange(PEER_BYTES).to(torch.uint8))
    except RuntimeError as error:
        return f"fails: {str(error).splitlines()[0]}"
    if source == target:
        return "itself" if whole else "wrong"
    direct = "direct" if torch.cuda.can_device_access_peer(source, target) else "by way of the host"
    return f"copied, {direct}" if whole else f"WRONG, {direct}"


def ipc(gpus: Sequence[Gpu]) -> Matrix:
    """Have a process on each GPU access memory of this process on every GPU, as workers access a leader's."""
    if not gpus:
        return ()
    memories: list[GpuMemory] = []
    try:
        memories += [GpuMemory.create(PROBE, gpu.uuid, GpuMemory.free) for gpu in gpus]
        columns = [_reached(memories, target) for target in gpus]
    except (ProtocolError, MemoryError, RuntimeError) as error:  # a CudaError is a RuntimeError
        return tuple((f"fails: {error}",) * len(gpus) for _ in gpus)
    finally:
        for memory in memories:
            memory.close()
    return tuple(zip(*columns, strict=True))


def _reached(memories: Sequence[GpuMemory], target: Gpu) -> list[str]:
    """Start a process on a GPU that inverts these memories; return for each whether it did."""
    pattern = (torch.arange(PROBE) % 251).to(torch.uint8)
    handles = []
    for memory in memories:
        memory.tensor(0, (PROBE,), torch.uint8).copy_(pattern)
        memory.record_event()
        handles.append(memory.ipc_handles[1])
    answers = _ask_peer(target, handles)
    if isinstance(answers, str):
        return [answers] * len(memories)
    judged = zip(memories, answers, strict=True)
    return [f"fails: {why}" if why else "works" if is_inverted(memory, pattern) else "WRONG" for memory, why in judged]


def _ask_peer(target: Gpu, handles: Sequence[GpuHandle | None]) -> list[str] | str:
    """Start a process on a GPU as workers are started; return its error for each handle, or one for all."""
    results, theirs = Pipe(duplex=False)
    process: Process | None = None
    try:
        with theirs:
            process = Process(find_interpreter(), "doctor-peer", doctor_peer.main, (target.uuid, handles, theirs))
            process.start()
        if not results.poll(PEER_TIMEOUT):
            return f"could not be tried: no answer within {PEER_TIMEOUT:g} s"
        answers: list[str] | str = results.recv()
        return f"fails: {answers}" if isinstance(answers, str) else answers
    except (OSError, ValueError) as error:
        return f"could not be tried: {error}"
    except EOFError:
        assert process is not None
        process.join(PEER_TIMEOUT)
        return f"fails: the process there ended with exit code {process.exitcode}"
    finally:
        results.close()
        if process is not None and process.pid is not None:
            process.kill()
            process.join(PEER_TIMEOUT)
            process.close()


def shared_memory() -> Finding:
    """Have a child process open memory of this process, as a worker does."""
    about, memory = "memfd through /proc/PID/fd", SharedMemory.create(4096)
    path = f"/proc/{os.getpid()}/fd/{memory.handle.fd}"
    try:
        done = subprocess.run(  # noqa: S603  # this interpreter, and a line of our own
            [sys.executable, "-I", "-c", SEEN, path], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(about, f"could not be tried: {error}", "bad", "see that this interpreter can be started")
    finally:
        memory.close()
    if done.returncode == 0:
        return Finding(about, "a child opened it for reading and writing", "good")
    remedy = (
        "the leader must be allowed to be traced by its own user: same user, dumpable, /proc mounted without subset"
    )
    return Finding(about, f"a child could not open it: {_last_line(done.stderr)}", "bad", remedy)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def _kernel() -> list[Finding]:
    options = next((part.opts for part in psutil.disk_partitions(all=True) if part.mountpoint == "/proc"), "")
    hidden = next((option for option in options.split(",") if option.startswith("hidepid")), "hidepid is off")
    scope = _read(Path("/proc/sys/kernel/yama/ptrace_scope"))
    meaning = {"0": "open", "1": "children only", "2": "for root", "3": "off"}.get(scope or "", "")
    seen = f"{scope} ({meaning}); nothing of drp needs tracing" if scope else "no Yama"
    return [Finding("/proc", hidden), Finding("ptrace_scope", seen), Finding("process namespace", _namespace())]


def _namespace() -> str:
    """Describe the process namespace: memory is shared by process numbers, which are valid in one namespace only."""
    try:
        name = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return "the kernel does not say"
    whose = "the machine's own" if name == FIRST_NAMESPACE else "a container's: memory is shared within it only"
    return f"{name}, {whose}"


def _cores() -> list[Finding]:
    allowed = os.sched_getaffinity(0)
    found = [
        Finding("this process may use", f"{_cores_text(sorted(allowed))}, {len(allowed)} of {psutil.cpu_count()}"),
        Finding("physical cores", str(psutil.cpu_count(logical=False) or "the kernel does not say")),
    ]
    for node in sorted(CORES.glob("node[0-9]*")):
        text = _read(node / "cpulist")
        if text:
            mine = sorted(parse_cores(text) & allowed)
            found.append(Finding(f"NUMA {node.name}", f"cores {text}; of these ours: {_cores_text(mine)}"))
    return found


def _limits() -> list[Finding]:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES * max(1, len(os.sched_getaffinity(0)))
    few = files != resource.RLIM_INFINITY and files < needed
    remedy = f"ulimit -n {needed} or more"
    memory = psutil.virtual_memory()
    return [
        Finding("open files", f"{_limit(files)}, at most {_limit(most)}", "bad" if few else "", remedy if few else ""),
        Finding(
            "locked memory",
            f"{_bytes_limit(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])}; what CUDA pins is not counted",
        ),
        Finding("memory", f"{_size(memory.available)} available of {_size(memory.total)}"),
        Finding("cgroup: processors", _cgroup_cpus()),
        Finding("cgroup: memory", _cgroup_memory()),
    ]


def _shm(has_gpus: bool) -> Finding:
    """Describe the memory where the CUDA driver keeps the events that processes share."""
    try:
        usage = shutil.disk_usage(SHM)
    except OSError as error:
        remedy = f"mount a tmpfs at {SHM}: the CUDA driver keeps events there that processes share"
        return Finding(SHM, f"missing: {error.strerror}", "bad" if has_gpus else "", remedy if has_gpus else "")
    return Finding(SHM, f"{_size(usage.free)} free of {_size(usage.total)}; drp puts nothing there, CUDA a few KB")


def _cgroup_cpus() -> str:
    """Describe the processor limit of the control group, version 2 or 1."""
    quota, _, period = (_read(_own_group("") / "cpu.max") or "").partition(" ")
    if not quota:
        quota = _read(_own_group("cpu") / "cpu.cfs_quota_us") or ""
        period = _read(_own_group("cpu") / "cpu.cfs_period_us") or ""
    if not quota:
        return "no limit to be seen"
    return "no limit" if quota in ("max", "-1") else f"the time of {int(quota) / int(period):g}"


def _cgroup_memory() -> str:
    most = _read(_own_group("") / "memory.max") or _read(_own_group("memory") / "memory.limit_in_bytes")
    if most is None:
        return "no limit to be seen"
    return "no limit" if most == "max" or int(most) > 2**60 else _size(int(most))


def _own_group(controller: str) -> Path:
    """Return the folder of this process's control group; version 1 has one for each controller."""
    root = CGROUP / controller
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(",") and (root / path.lstrip("/")).is_dir():
            return root / path.lstrip("/")
    return root


def _use(gpus: Sequence[Gpu], why: str, reached: Matrix) -> list[Finding]:
    cores = parse_devices(f"{len(os.sched_getaffinity(0))}xcpu", 1)
    on_cores = f"a worker a core, {cores[0].name} to {cores[-1].name}, one thread each"
    if not gpus:
        return [Finding("devices=N", on_cores), Finding("devices='cuda'", f"refused: {why}")]
    names = ", ".join(f"cuda:{gpu.index}" for gpu in gpus)
    found = [Finding("devices=N", f"a worker a GPU, N up to {len(gpus)}"), Finding("devices='Nxcpu'", on_cores)]
    far = [f"cuda:{gpu.index}" for gpu, how in zip(gpus, reached[0], strict=True) if how != "works"]
    alone = [f"cuda:{gpu.index}" for place, gpu in enumerate(gpus) if reached[place][place] != "works"]
    return [
        *found,
        Finding("devices='cuda'", f"{names}, in turn; the leader computes on the first named"),
        Finding(
            "runs' memory",
            f"on cuda:{gpus[0].index}, if that is the first named: all GPUs reach it"
            if not far
            else f"on the host, pinned, with workers on {', '.join(far)}: they do not reach cuda:{gpus[0].index}",
        ),
        Finding(
            "weights",
            "one copy for all workers of a GPU"
            + (f"; on {', '.join(alone)} one per worker, since no other process can access it" if alone else ""),
        ),
        Finding("one GPU alone", f"Leader(..., devices='cuda:{gpus[0].index}', drafts_per_device=4)"),
    ]


def _cores_text(cores: Sequence[int]) -> str:
    """Format cores as the kernel does: 0-3,8."""
    spans: list[list[int]] = []
    for core in cores:
        if spans and spans[-1][1] == core - 1:
            spans[-1][1] = core
        else:
            spans.append([core, core])
    return "cores " + (",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "none")


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _limit(count: int) -> str:
    return "no limit" if count == resource.RLIM_INFINITY else str(count)


def _bytes_limit(nbytes: int) -> str:
    return "no limit" if nbytes == resource.RLIM_INFINITY else _size(nbytes)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
