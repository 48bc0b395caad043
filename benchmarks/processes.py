"""Stage 3's step on 1, 2, … processes that train together, each with as many samples and one share of the cores.

What a process adds beside its own arithmetic is the exchange of gradients (ddp), and of parameters too (fsdp2). Ideal
is a step that takes as long on all as on one; what the machine itself takes from that, by caches and cores that are
shared, is seen where nothing is exchanged (none).
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from lightning_modules.scale.sharding import DATA_PARALLEL, shard
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from benchmarks.batches import instruction_batch
from benchmarks.config import BenchmarkConfig, read_config
from benchmarks.models import Parts
from benchmarks.report import line, times
from benchmarks.timing import describe_machine, ratio
from lightning_modules.instruction_tuning import InstructionTuningModule, InstructionTuningRecipe
from lightning_modules.optimizer import OptimizerConfig

STRATEGIES = ("none", "ddp", "fsdp2")
HEADER = ["strategy", "processes", "seconds a step", "images a second", "times one process's images"]


class Step(nn.Module):
    """A step's loss; a network of its own so that ddp sees one forward pass."""

    def __init__(self, config: BenchmarkConfig):
        super().__init__()
        parts = Parts(config)
        decoder = parts.image_decoder()
        recipe = InstructionTuningRecipe(length_groups=config.stage3.length_groups)
        networks = parts.mllm(), parts.aligner(), decoder
        self.module = InstructionTuningModule(*networks, recipe, OptimizerConfig(), config.seed).train()
        self.prompt, targets = instruction_batch(config)
        self.moments = decoder.moments(targets)
        self.draws = self.module._draws("train", range(len(targets)), targets).to(config.torch_device())

    def forward(self) -> Tensor:
        drop = self.module.recipe.condition_drop
        return self.module.sample_losses(self.prompt, self.moments, self.draws, drop).mean()


def measure(arguments: Sequence[str]) -> dict[str, Any]:
    """See `benchmarks`."""
    config = read_config(arguments)
    cores = os.cpu_count() or 1
    counts = [count for count in (1, 2, 4, 8) if count <= cores]
    threads = max(1, cores // counts[-1])
    seconds = {
        (strategy, count): timed_together(strategy, count, threads, arguments)
        for strategy in STRATEGIES
        for count in counts
    }
    samples = config.stage3.samples
    rows = []
    for (strategy, count), taken in seconds.items():
        alone = seconds[strategy, 1]
        each = [one * count for one in alone]  # one process would take so long for as many images
        pairs = min(len(each), len(taken))
        rows.append(
            {
                "strategy": strategy,
                "processes": count,
                "seconds": statistics.median(taken),
                "images_per_second": samples * count / statistics.median(taken),
                "ratio": ratio(each[:pairs], taken[:pairs]),
            }
        )
    return {
        "benchmark": "processes",
        "size": config.name,
        "ratio": rows[-1]["ratio"],
        "rows": rows,
        "facts": {"samples of a process": samples, "threads of a process": threads, "repetitions": config.repetitions},
        "machine": describe_machine(torch.device("cpu")),
    }


def timed_together(strategy: str, count: int, threads: int, arguments: Sequence[str]) -> list[float]:
    """Seconds of each step on the first of `count` processes."""
    with tempfile.TemporaryDirectory() as folder:
        given = (count, strategy, threads, list(arguments), folder)
        torch.multiprocessing.spawn(work, given, nprocs=count)
        return json.loads((Path(folder) / "seconds.json").read_text())


def work(rank: int, count: int, strategy: str, threads: int, arguments: list[str], folder: str) -> None:
    """One process."""
    torch.set_num_threads(threads)
    store = distributed.FileStore(str(Path(folder) / "store"), count)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
    config = read_config(arguments)
    step: Any = Step(config)
    if strategy == "fsdp2":
        shard(step.module.sharded_networks(), init_device_mesh("cpu", (count,), mesh_dim_names=(DATA_PARALLEL,)))
    elif strategy == "ddp" and count > 1:
        step = DistributedDataParallel(step)
    seconds = []
    for repetition in range(config.warm_up + config.repetitions):
        distributed.barrier()
        started = time.perf_counter()
        step().backward()
        distributed.barrier()
        if repetition >= config.warm_up:
            seconds.append(time.perf_counter() - started)
        for parameter in step.parameters():
            parameter.grad = None
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps(seconds))
    distributed.destroy_process_group()


def cells(result: dict[str, Any]) -> list[list[str]]:
    return [
        [
            row["strategy"],
            str(row["processes"]),
            f"{row['seconds']:.3f}",
            f"{row['images_per_second']:.2f}",
            times(row["ratio"]),
        ]
        for row in result["rows"]
    ]


def footnote(result: dict[str, Any]) -> str:
    """What the figures hold for."""
    machine = result["machine"]
    facts = "; ".join(f"{name}: {value}" for name, value in result["facts"].items())
    what = "Stage 3's step with gloo, no optimiser; none: nothing is exchanged."
    return f"{what} {machine['device']}, torch {machine['torch']}. {facts}."


def markdown(result: dict[str, Any]) -> str:
    """A section of the page."""
    rows = [line(HEADER), line(["---"] * len(HEADER)), *map(line, cells(result))]
    return "\n".join(["### processes", "", *rows, "", footnote(result), ""])


def print_result(result: dict[str, Any]) -> None:
    """To the terminal."""
    table = Table(*HEADER, title="Processes that train together", title_justify="left")
    for row in cells(result):
        table.add_row(*row)
    Console().print(table)
    Console().print(footnote(result), style="dim")
