"""From ways of doing the same work to one result: ratio, levers, ceiling, memory, scaling."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks.config import BenchmarkConfig
from benchmarks.timing import Step, ceiling, describe_machine, flops, in_turns, peak_bytes, ratio

OURS, THEIRS = "project's default", "released way"


@dataclass
class Comparison:
    """What a benchmark compares.

    Args:
        ours, theirs: one step each.
        levers: what each does alone: a step that is `theirs` but for one thing.
        items: what a step does, e.g. 56 captions; unit: their name.
        axes: for each axis of scaling, steps of the default way by size.
        facts: what else the reader must know: distributions, sizes, differences.
    """

    name: str
    config: BenchmarkConfig
    ours: Step
    theirs: Step
    items: int
    unit: str
    levers: Mapping[str, Step] = field(default_factory=dict)
    axes: Mapping[str, Mapping[int, Callable[[], Step]]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    against: str = f"the {THEIRS}"
    training: bool = True

    def measure(self) -> dict[str, Any]:
        """The result, as the JSON has it."""
        config, device = self.config, self.config.torch_device()
        run = self._in_precision
        ways = {THEIRS: run(self.theirs), OURS: run(self.ours)}
        ways |= {name: run(step) for name, step in self.levers.items()} if config.levers else {}
        seconds = in_turns(ways, config.repetitions, config.warm_up, device, config.clock)
        top = ceiling(device, config.dtype, config.clock)
        needed = flops(ways[OURS])
        memory = {name: peak_bytes(step, device) for name, step in ways.items()}
        ours, theirs = median(seconds[OURS]), median(seconds[THEIRS])
        return {
            "benchmark": self.name,
            "size": config.name,
            "against": self.against,
            "ratio": ratio(seconds[THEIRS], seconds[OURS]),
            "seconds": {"ours": ours, "theirs": theirs},
            "work": {"items": self.items, "unit": self.unit, "per_second": self.items / ours},
            "ceiling": {
                "flops_per_second": top,
                "flops_of_ours": needed,
                "share_of_ours": needed / ours / top,
                "share_of_theirs_for_the_same": needed / theirs / top,
            },
            "memory": {
                "ours_bytes": memory[OURS],
                "theirs_bytes": memory[THEIRS],
                "ours_by_theirs": memory[OURS] / memory[THEIRS],
            },
            "levers": [
                {
                    "lever": name,
                    "ratio": ratio(seconds[THEIRS], seconds[name]),
                    "memory_by_theirs": memory[name] / memory[THEIRS],
                }
                for name in ways
                if name not in (THEIRS, OURS)
            ],
            "scaling": self._scaling(device) if config.scaling else [],
            "facts": {
                "repetitions": config.repetitions,
                "precision": config.precision,
                "clock": config.clock,
                **self.facts,
            },
            "machine": describe_machine(device),
        }

    def _scaling(self, device: torch.device) -> list[dict[str, Any]]:
        rows = []
        for axis, sizes in self.axes.items():
            steps = {str(size): self._in_precision(build()) for size, build in sizes.items()}
            seconds = in_turns(
                steps, max(1, self.config.repetitions // 2), self.config.warm_up, device, self.config.clock
            )
            first = next(iter(sizes))
            for size in sizes:
                taken, base = median(seconds[str(size)]), median(seconds[str(first)])
                rows.append(
                    {
                        "axis": axis,
                        "size": size,
                        "seconds": taken,
                        "growth": taken / base,
                        "linear": size / max(first, 1),
                    }
                )
        return rows

    def _in_precision(self, step: Step) -> Step:
        device, dtype = self.config.torch_device(), self.config.dtype

        def run() -> Any:
            context: AbstractContextManager = nullcontext()
            if self.training and dtype != torch.float32:
                context = torch.autocast(device.type, dtype)
            with context:
                return step()

        return run
