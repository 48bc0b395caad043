"""Dry run: estimate parameters, memory per GPU, FLOPs and time of a training run, without a GPU or any weights.

The stage's own module is built at full size under PyTorch's FakeTensorMode, in which tensors have shapes and dtypes but
no data. FLOPs and live memory are counted while its loss runs forward and backward on `fake_batch`. Sizes of the image
decoder and of a vision-language model are read from their folders or known for published models.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from kosmosg.config import ConfigError
from kosmosg.models.build import image_decoder_class
from kosmosg.models.image_decoder import with_values
from kosmosg.tokenizer import Tokenizer
from lightning_modules.base import PromptShape, StageModule
from lightning_modules.optimizer import BLOCK
from lightning_modules.parallelize import apply_activation_checkpointing, layers, store_frozen_weights, stored_weights
from lightning_modules.trainer import BatchLayout, TrainerConfig, batch_layout, count_devices

GIB, TERA = 2**30, 1e12
FULL, HALF = 4, 2  # bytes per element
EIGHT_BIT_STATES = 2 * (1 + FULL / BLOCK)  # bytes per parameter for both moments
SECONDS_PER_DAY = 86_400
RELEASED_VOCABULARY = 64_007


class DoesNotFitError(ValueError):
    """The run does not fit into the memory of the assumed GPU."""


class Device(NamedTuple):
    """A GPU: memory in GiB as PyTorch reports it, and peak dense TFLOP/s by precision from the data sheet."""

    memory_gib: float
    half_tflops: float
    single_tflops: float
    has_bf16: bool = True


DEVICES = {
    "h200-141gb": Device(139.8, 989.0, 67.0),
    "h100-80gb": Device(79.1, 989.0, 67.0),
    "a100-80gb": Device(79.1, 312.0, 19.5),
    "a100-40gb": Device(39.4, 312.0, 19.5),
    "rtx4090-24gb": Device(23.5, 165.0, 82.6),
    "rtx3090-24gb": Device(23.6, 71.0, 35.6),
    "rtx3060-12gb": Device(11.6, 25.5, 12.7),
    "v100-32gb": Device(31.7, 125.0, 15.7, has_bf16=False),
}


@dataclass
class HardwareConfig:
    device: str = "h100-80gb"
    """GPU that the dry run assumes, a key of DEVICES in lightning_modules/dry_run.py."""
    memory_gib: float | None = None
    """Memory per GPU; null: that of `device`."""
    tflops: float | None = None
    """Peak TFLOP/s per GPU in the run's precision; null: that of `device`."""
    utilization: float = 0.3
    """Assumed share of the peak FLOP/s that is reached."""
    reserve_gib: float = 2.0
    """Memory per GPU assumed for CUDA, NCCL and fragmentation."""
    prompt_tokens: int | None = None
    """Tokens per row, with padding; null: data.sequence_length in stage 1, 75 in stage 2, 160 in stage 3."""
    images_per_row: int | None = None
    """Images per row; null: 11 in 2,048 tokens in stage 1, 0 in stage 2, 2 in stage 3."""

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ValueError(f"hardware.device is {self.device!r}; allowed: {', '.join(DEVICES)}")
        if not 0 < self.utilization <= 1:
            raise ValueError(f"hardware.utilization is {self.utilization}; allowed: above 0, at most 1")
        for name in ("memory_gib", "tflops", "reserve_gib", "prompt_tokens", "images_per_row"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"hardware.{name} is {value}; allowed: 0 or more")

    def card(self) -> Device:
        """Return the device, with the values that are set here."""
        device = DEVICES[self.device]
        if self.memory_gib is not None:
            device = device._replace(memory_gib=self.memory_gib)
        return device if self.tflops is None else device._replace(half_tflops=self.tflops, single_tflops=self.tflops)


# Counting.
class PassCost(NamedTuple):
    """FLOPs and peak bytes of activations in the forward and backward pass of a micro-batch."""

    flops: float
    activations: float


@dataclass(frozen=True)
class Sized:
    """A stage's module without data, and the costs of micro-batches of one and two rows; costs are linear in rows."""

    module: StageModule
    shape: PromptShape
    vocabulary: int
    one: PassCost
    two: PassCost

    def flops(self, rows: int) -> float:
        return self.one.flops + (rows - 1) * (self.two.flops - self.one.flops)

    @property
    def row_bytes(self) -> float:
        """Bytes of activations per row."""
        return self.two.activations - self.one.activations

    @property
    def fixed_bytes(self) -> float:
        """Bytes that do not depend on the rows: autocast's half-precision copies of the weights."""
        return max(0.0, self.one.activations - self.row_bytes)


class Vocabulary(NamedTuple):
    """The part of a tokenizer that is needed to build a model."""

    size: int
    pad_id: int = 1
    bos_id: int = 0

    def __len__(self) -> int:
        return self.size


def size_up(experiment: Any) -> Sized:
    """Build the stage's module under FakeTensorMode and measure micro-batches of one and two rows.

    Raises:
        ValueError: the networks do not fit together, or the sizes of a network are not known.
    """
    folder = Path(experiment.model.tokenizer)
    words = len(Tokenizer.from_pretrained(folder)) if folder.is_dir() else RELEASED_VOCABULARY
    # All rows have the same length here, so one bucket is enough.
    buckets = {"length_buckets": 1} if hasattr(experiment.recipe, "length_buckets") else {}
    untrained = replace(
        experiment,
        init_from=None,
        recipe=replace(experiment.recipe, **buckets),
        model=replace(experiment.model, vision_weights=None),
    )
    with FakeTensorMode(allow_non_fake_inputs=True), RealIntegers(), torch.random.fork_rng(devices=[]):
        module = experiment.module.build(
            untrained,
            Vocabulary(words),
            lambda source, parts: image_decoder_class(source).from_config(source, parts),
        ).train()
        options = experiment.trainer
        skipped = module.sharded_modules() if options.is_sharded(count_devices(options) * options.num_nodes) else ()
        store_frozen_weights(module, options.frozen_storage, skipped)
        apply_activation_checkpointing(module, options.activation_checkpointing)
        typical, hardware = module.prompt_shape(experiment), experiment.hardware
        shape = PromptShape(
            typical.tokens if hardware.prompt_tokens is None else hardware.prompt_tokens,
            typical.images if hardware.images_per_row is None else hardware.images_per_row,
        )

        def cost(rows: int) -> PassCost:
            batch = module.fake_batch(rows, shape, experiment.model.image_size)
            return measure(module, lambda: module.losses(batch)["loss"], experiment.trainer.precision)

        return Sized(module, shape, words, cost(1), cost(2))


def measure(module: nn.Module, loss: Callable[[], Tensor], precision: str) -> PassCost:
    """Measure the cost of `loss()` and its backward pass under FakeTensorMode."""
    # FSDP2 reduces gradients at once, so they are freed here. `estimate` adds what each rank keeps of them.
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    live = LiveBytes([*module.parameters(), *module.buffers()])
    # Fake tensors are on the CPU, so its autocast is used in place of the GPU's.
    autocast: Any = contextlib.nullcontext()
    if precision.endswith("-mixed"):
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)
    # The counter's own module tracker would keep the graphs of recomputed layers, and thus their activations, alive.
    counter.mod_tracker = NoModuleTracker()  # type: ignore[assignment]
    with counter, live:
        with autocast:
            value = loss()
        value.backward()
    for hook in hooks:
        hook.remove()
    return PassCost(counter.get_total_flops(), live.peak)


class NoModuleTracker(contextlib.nullcontext):
    """Replaces the module tracker of FlopCounterMode: all FLOPs are counted in total only."""

    parents = ("Global",)


class LiveBytes(TorchDispatchMode):
    """Tracks the bytes of all storages created since; `peak` is their maximum. Storages of `known` are not counted."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._add(result.untyped_storage())
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class RealIntegers(TorchDispatchMode):
    """Computes integer and boolean tensors for real, because shapes depend on their values: the number of entries that
    a mask selects, and in vision-language models the positions of image tokens and of attention windows."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if all(type(tensor) is Tensor for tensor in inputs):
            results = None if inputs else tree_leaves(function(*args, **kwargs))
            if results is None or not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in results):
                with with_values():
                    return function(*args, **kwargs)
        elif function in INDEXING:
            args = (args[0], [numbers for index in args[1] for numbers in integer_index(index)], *args[2:])
        return function(*args, **kwargs)


INDEXING = [torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default]


def integer_index(index: Tensor | None) -> Sequence[Tensor | None]:
    """Convert a mask to integer indices, one per dimension; other indices are returned as they are."""
    if type(index) is not Tensor or index.dtype != torch.bool:
        return (index,)
    with with_values():
        return index.nonzero(as_tuple=True)


# FlopCounterMode knows only the attention kernels of GPUs.
ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(gradient, query, key, value)
    ),
}


# The estimate.
@dataclass(frozen=True)
class Estimate:
    """Estimate for one GPU: `memory` in bytes by part, and `flops` and `seconds` per optimizer step."""

    memory: dict[str, float]
    row_bytes: float
    available: float
    flops: float
    seconds: float

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    def largest_micro_batch(self, rows: int) -> int:
        """Return the largest micro-batch that fits, given that `memory` is for one of `rows`; 0 if none does."""
        return max(0, int((self.available - (self.total - rows * self.row_bytes)) // self.row_bytes))


def estimate(sized: Sized, experiment: Any, layout: BatchLayout) -> Estimate:
    """Estimate memory, FLOPs and time of an optimizer step on one GPU."""
    hardware, options, ema = experiment.hardware, experiment.trainer, experiment.ema.decay > 0
    device, module = hardware.card(), sized.module
    sharded = options.is_sharded(layout.world_size)
    share = layout.world_size if sharded else 1
    mixed = options.precision.endswith("-mixed")
    own = HALF if options.precision == "bf16-true" else FULL
    trainable = count(module, trainable=True)
    in_sharded = {id(parameter) for network in module.sharded_modules() for parameter in network.parameters()}
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    frozen_sharded = sum(parameter.numel() for parameter in frozen if id(parameter) in in_sharded)
    frozen_whole = sum(parameter.numel() for parameter in frozen) - frozen_sharded
    stored = sum(weight.nbytes for weight in stored_weights(module))
    state_bytes = EIGHT_BIT_STATES if experiment.optimizer.eight_bit else 2 * own
    copies = sized.fixed_bytes
    memory = {
        "trainable weights": own * trainable / share,
        "gradients": own * trainable / share,
        "optimizer states": state_bytes * trainable / share,
        "average of the weights": FULL * trainable / share if ema else 0.0,
        "frozen weights": own * (frozen_sharded / share + frozen_whole) + stored,
    }
    if sharded:
        memory["gathered layers"] = gathered(module, HALF if mixed else own, own)
        if mixed:  # layers are gathered in half precision, so autocast does not copy their weights
            copies = max(0.0, copies - HALF * (trainable + frozen_sharded))
    elif options.strategy == "ddp":
        memory["gradient buckets"] = own * trainable
    rows = layout.micro_batch_size
    memory["half-precision copies and the like"] = copies
    memory[f"activations, {rows} rows, checkpointing {options.activation_checkpointing}"] = rows * sized.row_bytes
    memory["CUDA, NCCL, fragmentation"] = hardware.reserve_gib * GIB
    flops = sized.flops(rows) * layout.micro_batches
    seconds = flops / (peak_tflops(device, options) * TERA * hardware.utilization)
    return Estimate(memory, sized.row_bytes, device.memory_gib * GIB, flops, seconds)


def peak_tflops(device: Device, options: TrainerConfig) -> float:
    return device.single_tflops if options.precision == "32-true" else device.half_tflops


def count(module: nn.Module, trainable: bool) -> int:
    """Return the number of trainable or of frozen parameters."""
    total = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad == trainable)
    return total if trainable else total + sum(weight.numel() for weight in stored_weights(module))


def gathered(module: StageModule, layer_bytes: int, own: int) -> float:
    """Return the bytes of unsharded parameters that FSDP2 holds: the current and the prefetched layer, and during the
    whole step all parameters outside of layers (embeddings, positions, norms), with gradients if trainable."""
    sizes, total = [0], 0.0
    for network in module.sharded_modules():
        in_layers: set[int] = set()
        for layer in layers(network):
            parameters = list(layer.parameters())
            sizes.append(sum(parameter.numel() for parameter in parameters))
            in_layers |= {id(parameter) for parameter in parameters}
        for parameter in network.parameters():
            if id(parameter) not in in_layers:
                total += own * parameter.numel() * (2 if parameter.requires_grad else 1)
    return total + 2 * layer_bytes * max(sizes)


# The report.
def report(experiment: Any, console: Console) -> None:
    """Print the estimate of an experiment.

    Raises:
        ConfigError: the configuration is not valid.
        DoesNotFitError: after printing; names the largest parts, or a micro-batch size that fits.
    """
    options, hardware = experiment.trainer, experiment.hardware
    try:
        layout = batch_layout(experiment.data.micro_batch_size, options)
        sized = size_up(experiment)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    result = estimate(sized, experiment, layout)
    console.print(f"Dry run of {experiment.stage}: {layout}", highlight=False, soft_wrap=True)
    console.print(parameters_table(sized.module), memory_table(result, hardware.device, layout.world_size))
    for line in time_lines(sized, result, options, layout, hardware):
        console.print(line, highlight=False, soft_wrap=True)
    if options.precision == "bf16-mixed" and not hardware.card().has_bf16:
        console.print(f"{hardware.device} does not support bf16: use trainer.precision=16-mixed.", style="bold")
    if experiment.model.language_model is None and not Path(experiment.model.tokenizer).is_dir():
        console.print(f"No tokenizer at '{experiment.model.tokenizer}' yet: assuming {sized.vocabulary:,} ids.")
    if result.total > result.available:
        raise DoesNotFitError(refusal(result, layout, hardware.device))


def refusal(result: Estimate, layout: BatchLayout, device: str) -> str:
    """Return the message for a run that does not fit, with what would."""
    if largest := result.largest_micro_batch(layout.micro_batch_size):
        advice = f"data.micro_batch_size={largest} would fit"
    else:
        parts = sorted(result.memory.items(), key=lambda part: -part[1])[:3]
        largest_parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)
        advice = f"no micro-batch fits; the largest parts are {largest_parts} GiB. More devices with fsdp2 shard them"
    return (
        f"{result.total / GIB:.1f} GiB are needed on each GPU, but {device} has {result.available / GIB:.1f}: "
        f"{advice}; trainer.activation_checkpointing=full saves most activation memory."
    )


def parameters_table(module: StageModule) -> Table:
    """Table of the trainable and frozen parameters of each network."""
    table = Table("network", "trainable", "frozen", title="Parameters", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, network in module.named_children():
        table.add_row(name, f"{count(network, True):,}", f"{count(network, False):,}")
    table.add_section()
    table.add_row("all", f"{count(module, True):,}", f"{count(module, False):,}")
    return table


def memory_table(result: Estimate, device: str, world_size: int) -> Table:
    """Table of the memory of each GPU by part."""
    table = Table("part", "GiB", title=f"Memory of each GPU, {world_size} × {device}", title_justify="left")
    table.columns[1].justify = "right"
    for name, size in result.memory.items():
        if size:
            table.add_row(name, f"{size / GIB:.2f}")
    table.add_section()
    verdict = "fits" if result.total <= result.available else "DOES NOT FIT"
    table.add_row(f"needed, of {result.available / GIB:.1f}: {verdict}", f"{result.total / GIB:.2f}")
    return table


def time_lines(
    sized: Sized, result: Estimate, options: TrainerConfig, layout: BatchLayout, hardware: HardwareConfig
) -> Iterator[str]:
    """Lines on FLOPs, time and assumptions."""
    days = result.seconds * options.max_steps / SECONDS_PER_DAY
    yield (
        f"Per step: {result.flops * layout.world_size / TERA:,.1f} TFLOP on all GPUs, "
        f"{result.flops / layout.micro_batches / layout.micro_batch_size / TERA:.3f} per row"
    )
    yield (
        f"Expected: {result.seconds:.2f} s per step, {layout.global_batch / result.seconds:,.0f} rows/s, {days:.1f} "
        f"days for {options.max_steps:,} steps, at {hardware.utilization:.0%} of the peak of "
        f"{peak_tflops(hardware.card(), options):g} TFLOP/s and without waiting for data or network"
    )
    yield (
        f"Assumed: {sized.shape.tokens} tokens and {sized.shape.images} images per row (keys hardware.*); the largest "
        f"data.micro_batch_size that fits is {result.largest_micro_batch(layout.micro_batch_size)}"
    )
