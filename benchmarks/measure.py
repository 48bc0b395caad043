"""Measure time (alternating between variants), peak memory and peak FLOP/s; describe the machine."""

import gc
import importlib.metadata
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.dry_run import LiveBytes

Step = Callable[[], Any]
REPLICATES = 2000
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PEAK_SIDE = {"cpu": 1024, "cuda": 8192}
LIBRARIES = ("torch", "diffusers", "transformers", "lightning", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "triton")


class OutOfTimeError(Exception):
    """A part exceeded its time limit."""


class Limit:
    """The time limit of a part."""

    def __init__(self, seconds: float):
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Raise `OutOfTimeError` at the limit, by a signal that waits for the current kernel or compilation."""

        def stop(*_: Any) -> None:
            raise OutOfTimeError(f"no further result within {self.seconds:g} s")

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(1e-3, self.left()))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def time_alternately(
    variants: Mapping[str, Step], repetitions: int, warmup: int, device: torch.device, limit: Limit, clock: str = "wall"
) -> dict[str, list[float]]:
    """Return the seconds of each variant in each repetition. The order alternates (A, B, B, A, …), because the first
    one leaves caches behind. Stops early if another repetition would exceed the limit."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(warmup + repetitions):
        began = time.monotonic()
        for name, step in list(variants.items())[:: -1 if repetition % 2 else 1]:
            elapsed = timed(step, device, clock)
            if repetition >= warmup:
                seconds[name].append(elapsed)
        if repetition >= warmup and limit.left() < 2 * (time.monotonic() - began):
            break
    return seconds


def timed(step: Step, device: torch.device, clock: str = "wall") -> float:
    """Return the seconds of one call, with synchronisation before and after it."""
    now = CLOCKS[clock]
    synchronize(device)
    started = now()
    step()
    synchronize(device)
    return now() - started


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interval(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Return the median of `values` with its 95 % bootstrap interval."""
    source = random.Random(seed)
    medians = sorted(statistics.median(source.choices(values, k=len(values))) for _ in range(REPLICATES))
    edge = round(0.025 * REPLICATES)
    return {"median": statistics.median(values), "low": medians[edge], "high": medians[-1 - edge]}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Return the speed-up of `fast` over `slow`, paired by repetition."""
    return interval([a / b for a, b in zip(slow, fast, strict=True)])


def peak_flops(device: torch.device, dtype: torch.dtype, clock: str = "wall", repetitions: int = 10) -> float:
    """Return the best FLOP/s that the device reaches in a large square matrix product."""
    side = PEAK_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(timed(lambda: a @ b, device, clock) for _ in range(repetitions))


def peak_bytes(step: Step, module: nn.Module, others: Sequence[Tensor] = ()) -> int:
    """Return the peak bytes while `step` runs, including weights and `others`, such as optimizer states."""
    held = [*module.parameters(), *module.buffers(), *others]
    gc.collect()
    if held[0].device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with LiveBytes(held) as live:
        step()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    return sum(storages.values()) + live.peak


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return device, number of threads, and versions of the installed libraries."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"device": name, "threads": torch.get_num_threads(), "versions": versions}


def cpu_name() -> str:
    """Return the processor's name from Linux, or the vector instructions that PyTorch uses."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    known = [name for name in names if name and name != "unknown"]
    return known[0] if known else f"CPU ({torch.backends.cpu.get_cpu_capability()})"
