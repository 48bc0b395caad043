"""The dry run's table: what each GPU would hold, how long the run would take, and whether it can be held at all."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from kosmosg.config import ConfigError
from lightning_modules.estimate.dry_run import Sized, size_up
from lightning_modules.scale.batch_layout import BatchLayout, batch_layout, count_devices
from lightning_modules.scale.recompute import layers
from lightning_modules.scale.trainer import TrainerConfig

GIB, TERA = 2**30, 1e12
FULL, HALF = 4, 2  # bytes of a number
SECONDS_OF_DAY = 86_400


class DoesNotFitError(ValueError):
    """A run that the assumed GPU cannot hold."""


@dataclass(frozen=True)
class Estimate:
    """Of one GPU. `memory` in bytes by part, `flops` of an update, `seconds` of an update."""

    memory: dict[str, float]
    row_bytes: float
    available: float
    flops: float
    seconds: float

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    def largest_batch(self, batch_size: int) -> int:
        """Rows of a pass that fit, 0 or less for none."""
        without_rows = self.total - batch_size * self.row_bytes
        return int((self.available - without_rows) // self.row_bytes)


def estimate(sized: Sized, options: TrainerConfig, layout: BatchLayout, average: bool) -> Estimate:
    """What a GPU holds and does."""
    device, module = sized.hardware.resolved(), sized.module
    sharded = options.strategy == "fsdp2" or (options.strategy == "auto" and layout.processes > 1)
    share = layout.processes if sharded else 1
    mixed = options.precision.endswith("-mixed")
    own = HALF if options.precision == "bf16-true" else FULL
    trained = count(module, trains=True)
    divided = {id(parameter) for network in module.sharded_networks() for parameter in network.parameters()}
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    frozen_divided = sum(parameter.numel() for parameter in frozen if id(parameter) in divided)
    frozen_whole = sum(parameter.numel() for parameter in frozen) - frozen_divided
    copies = sized.cost.fixed_bytes()
    memory = {
        "trained weights": own * trained / share,
        "gradients": own * trained / share,
        "optimiser states": 2 * own * trained / share,
    }
    if average:
        memory["average of the weights"] = FULL * trained / share
    memory["frozen parts"] = own * (frozen_divided / share + frozen_whole)
    if sharded:
        memory["gathered layers"] = gathered(module, HALF if mixed else own, own)
        if mixed:  # layers are gathered in half precision, so autocast makes no copies of theirs
            copies = max(0.0, copies - HALF * (trained + frozen_divided))
    elif options.strategy == "ddp":
        memory["buckets of gradients"] = own * trained
    memory["half-precision copies and the like"] = copies
    rows = layout.batch_size
    memory[f"activations, {rows} rows, recompute {options.recompute}"] = rows * sized.cost.row_bytes()
    memory["CUDA, NCCL, fragmentation"] = sized.hardware.reserve_gib * GIB
    flops = sized.cost.flops(rows) * layout.accumulate
    peak = device.single_tflops if options.precision == "32-true" else device.half_tflops
    seconds = flops / (peak * TERA * sized.hardware.utilisation)
    return Estimate(memory, sized.cost.row_bytes(), device.memory_gib * GIB, flops, seconds)


def count(module: nn.Module, trains: bool) -> int:
    """Numbers in the parameters that train, or that do not."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad == trains)


def gathered(module: Any, layer_bytes: int, own: int) -> float:
    """What FSDP2 holds whole: the layer at work and the one gathered ahead, and from the forward pass to the end of the
    backward what belongs to no layer (embeddings, positions, norms), with its gradient where it trains."""
    sizes, total = [0], 0.0
    for network in module.sharded_networks():
        in_layers = set()
        for layer in layers(network):
            parameters = list(layer.parameters())
            sizes.append(sum(parameter.numel() for parameter in parameters))
            in_layers |= {id(parameter) for parameter in parameters}
        for parameter in network.parameters():
            if id(parameter) not in in_layers:
                total += own * parameter.numel() * (2 if parameter.requires_grad else 1)
    return total + 2 * layer_bytes * max(sizes)


def report(experiment: Any, console: Console) -> None:
    """Print the estimate of an experiment.

    Raises:
        ConfigError: the run cannot be laid out.
        DoesNotFitError: after printing; names what takes most and what would fit.
    """
    options = experiment.trainer
    devices = options.devices or count_devices(options.devices, options.num_nodes, options.accelerator)
    try:
        layout = batch_layout(experiment.data.batch_size, options.global_batch_size, devices, options.num_nodes)
        sized = size_up(experiment)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    hardware = sized.hardware
    found = estimate(sized, options, layout, experiment.ema.decay > 0)
    device = hardware.resolved()
    console.print(f"Dry run of {experiment.stage}: {layout}", highlight=False, soft_wrap=True)
    console.print(parameters_table(sized), memory_table(found, hardware.device, layout.processes))
    for line in time_lines(found, options, layout, hardware):
        console.print(line, highlight=False, soft_wrap=True)
    if options.precision == "bf16-mixed" and not device.has_bf16:
        console.print(f"{hardware.device} computes no bf16: take trainer.precision=16-mixed.", style="bold")
    if not Path(experiment.model.tokenizer).is_dir():
        console.print(f"There is no tokenizer at '{experiment.model.tokenizer}' yet: {sized.vocabulary:,} ids assumed.")
    refuse_what_does_not_fit(found, layout, hardware.device)


def refuse_what_does_not_fit(found: Estimate, layout: BatchLayout, device: str) -> None:
    """Raises DoesNotFitError."""
    largest = found.largest_batch(layout.batch_size)
    if found.total <= found.available:
        return
    missing = (found.total - found.available) / GIB
    if largest >= 1:
        advice = f"data.batch_size={largest} would fit"
    else:
        parts = sorted(found.memory.items(), key=lambda part: -part[1])[:3]
        most = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)
        advice = f"no batch fits; most is taken by {most} GiB. More devices divide them (strategy fsdp2)"
    raise DoesNotFitError(
        f"{found.total / GIB:.1f} GiB are needed on each GPU and {device} has {found.available / GIB:.1f}, "
        f"{missing:.1f} too few: {advice}; trainer.recompute=full keeps the fewest activations."
    )


def parameters_table(sized: Sized) -> Table:
    """Parameters of each network."""
    table = Table("network", "trained", "frozen", title="Parameters", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, network in sized.module.named_children():
        table.add_row(name, f"{count(network, True):,}", f"{count(network, False):,}")
    table.add_section()
    table.add_row("all", f"{count(sized.module, True):,}", f"{count(sized.module, False):,}")
    return table


def memory_table(found: Estimate, device: str, processes: int) -> Table:
    """Memory of each GPU by part."""
    table = Table("part", "GiB", title=f"Memory of each GPU, {processes} × {device}", title_justify="left")
    table.columns[1].justify = "right"
    for name, size in found.memory.items():
        if size:
            table.add_row(name, f"{size / GIB:.2f}")
    table.add_section()
    verdict = "fits" if found.total <= found.available else "DOES NOT FIT"
    table.add_row(f"needed, of {found.available / GIB:.1f}: {verdict}", f"{found.total / GIB:.2f}")
    return table


def time_lines(found: Estimate, options: TrainerConfig, layout: BatchLayout, hardware: Any) -> Iterator[str]:
    """Work and time."""
    days = found.seconds * options.max_steps / SECONDS_OF_DAY
    device = hardware.resolved()
    peak = device.single_tflops if options.precision == "32-true" else device.half_tflops
    yield (
        f"Each update: {found.flops * layout.processes / TERA:,.1f} TFLOP on all GPUs, "
        f"{found.flops / layout.accumulate / layout.batch_size / TERA:.3f} a row"
    )
    yield (
        f"Expected: {found.seconds:.2f} s an update, {layout.global_batch / found.seconds:,.0f} rows a second, "
        f"{days:.1f} days for {options.max_steps:,} updates, if {hardware.utilisation:.0%} of {peak:g} TFLOP/s are "
        "reached and neither data nor network is waited for"
    )
    yield (
        f"Assumed: {hardware.prompt_tokens} tokens and {hardware.images_per_row} images a row (keys hardware.*); "
        f"the largest data.batch_size that fits is {max(0, found.largest_batch(layout.batch_size))}"
    )
