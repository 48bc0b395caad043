"""Ways of doing the same work, timed in turns; the machine's ceiling; the memory and the arithmetic of one step."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[[], Any]
REPLICATES = 2000
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CEILING_SIDE = {"cpu": 1536, "cuda": 8192}


def in_turns(
    ways: Mapping[str, Step], repetitions: int, warm_up: int, device: torch.device, clock: str = "wall"
) -> dict[str, list[float]]:
    """Seconds of each way in each repetition: A, B, …, A, B, …"""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(warm_up + repetitions):
        for name, step in ways.items():
            gc.collect()
            taken = timed(step, device, clock)
            if repetition >= warm_up:
                seconds[name].append(taken)
    return seconds


def timed(step: Step, device: torch.device, clock: str = "wall") -> float:
    """Seconds of one call by the `clock` (wall or cpu), the device's queue emptied before and after."""
    now = CLOCKS[clock]
    synchronize(device)
    started = now()
    step()
    synchronize(device)
    return now() - started


def synchronize(device: torch.device) -> None:
    """Wait for what the device still computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(slow: Sequence[float], fast: Sequence[float], seed: int = 0) -> dict[str, float]:
    """How many times faster: the median over repetitions, with a 95 % bootstrap interval over them."""
    pairs = [theirs / ours for theirs, ours in zip(slow, fast, strict=True)]
    source = random.Random(seed)
    medians = sorted(statistics.median(source.choices(pairs, k=len(pairs))) for _ in range(REPLICATES))
    edge = round(0.025 * REPLICATES)
    return {"median": statistics.median(pairs), "low": medians[edge], "high": medians[-1 - edge]}


def ceiling(device: torch.device, dtype: torch.dtype, clock: str = "wall", repetitions: int = 5) -> float:
    """FLOP/s of a large square matrix product: what this machine can do at best."""
    side = CEILING_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = [timed(lambda: a @ b, device, clock) for _ in range(repetitions + 1)][1:]
    return 2 * side**3 / min(seconds)


def flops(step: Step) -> int:
    """Matrix products and convolutions of one call; attention is counted whole, causal or not."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most memory that one call holds beyond what was there before it."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def cpu_name() -> str:
    """The processor as the kernel names it, or its architecture's widest vectors."""
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    known = [name for name in names if name and name != "unknown"]
    return known[0] if known else f"CPU ({torch.backends.cpu.get_cpu_capability()})"
