"""What this machine offers: CPU cores, memory and GPUs, asked of the kernel and the driver, never of torch."""

import ctypes
import functools
import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True, slots=True)
class Gpu:
    """memory: bytes in all. capability: compute capability, (8, 0) is the first with bfloat16."""

    name: str
    memory: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Machine:
    """cores: what this process may use (affinity and cgroup quota). memory: bytes available now.

    torch_cuda: None where torch is not installed, else whether its build can use a GPU at all.
    """

    cores: int
    memory: int
    gpus: tuple[Gpu, ...]
    torch_cuda: bool | None

    @property
    def usable_gpus(self) -> tuple[Gpu, ...]:
        return self.gpus if self.torch_cuda else ()


@functools.cache
def this_machine() -> Machine:
    return Machine(cores(), available_memory(), gpus(), torch_has_cuda())


def cores() -> int:
    """CPU cores this process may run on, at least 1."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2 here: the affinity is what there is
    return max(1, count)


def available_memory() -> int:
    """Bytes that can be taken without swapping: the kernel's estimate, or what the cgroup leaves."""
    available = 0
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return 0
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        available = min(available, max(0, limit - used))
    except (OSError, ValueError):
        pass  # "max" or no cgroup v2: no limit of its own
    return available


def gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs visible to this process (CUDA_VISIBLE_DEVICES counts), through the driver library."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    found = []
    for ordinal in range(count.value):
        device, memory, number = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_int()
        name = ctypes.create_string_buffer(256)
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        driver.cuDeviceGetName(name, 256, device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        capability = []
        for attribute in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR):
            driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
            capability.append(number.value)
        found.append(Gpu(name.value.decode(errors="replace"), memory.value, (capability[0], capability[1])))
    return tuple(found)


def gpu_names(environ: Mapping[str, str], count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each of the `count` visible GPUs: a number, or a name such as GPU-8c1f."""
    chosen = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return chosen[:count] if len(chosen) >= count else [str(place) for place in range(count)]


def driver_cuda() -> str | None:
    """The newest CUDA that the driver runs, "12.8"; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def torch_has_cuda() -> bool | None:
    """Whether the installed torch is a CUDA build, read from its metadata; None: not installed."""
    try:
        distribution = importlib.metadata.distribution("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    version = Path(str(distribution.locate_file("torch/version.py")))
    try:
        for line in version.read_text().splitlines():
            if line.startswith("cuda"):
                return not line.split("=", 1)[1].strip().startswith("None")
    except OSError:
        pass  # an unusual installation: the version string is the next best witness
    return "+cpu" not in distribution.version
