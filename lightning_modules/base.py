"""What the stages share: one Lightning batch is one optimizer step, made of micro-batches that the module steps itself.

Per optimizer step: a loss for each micro-batch, weighted by what it counts, and its backward pass; then clip or skip,
step, schedule. So `batch_idx == global_step` on any number of devices.

A step is the same, up to rounding, however it is divided into micro-batches and ranks, but for two things: dropout of
networks in training mode, seeded by step, place of the micro-batch and rank (the same division draws the same, also
after a resume), and losses that read a whole micro-batch, as L_rec of stage 2's `released` variant.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import lightning
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from kosmosg.batches import MicroBatch
from kosmosg.condition import Condition
from kosmosg.models.aligner import Aligner
from kosmosg.models.build import load_image_decoder
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.models.mllm import MultimodalLM
from kosmosg.models.model_config import ModelConfig
from kosmosg.models.vision_language_model import LanguageProcessor
from kosmosg.prompt import PromptBatch
from kosmosg.tokenizer import Tokenizer
from lightning_modules.checkpointing import CheckpointMismatchError
from lightning_modules.optimizer import OptimizerConfig, StageAdamW, build_optimizer, learning_rate_factor
from lightning_modules.parallelize import shard
from lightning_modules.randomness import derive_seed
from lightning_modules.step_guard import StepGuard

IMAGE_TOKENS = 64  # of the paper's MLLM
LoadDecoder = Callable[..., ImageDecoder]
PromptTokenizer = Tokenizer | LanguageProcessor
Sample = Callable[[Condition, Condition], list[Image.Image]]


class StageExperiment(Protocol):
    """What a stage reads of an experiment's configuration."""

    model: ModelConfig
    data: Any
    recipe: Any
    optimizer: OptimizerConfig
    init_from: str | None
    seed: int


class CacheEncoder(NamedTuple):
    """What makes a cache: a frozen network, and from what is read of some items to the values kept of each."""

    network: nn.Module
    encode: Callable[[list[Any]], list[dict[str, Tensor]]]


@dataclass
class PromptShape:
    """Length of a stage's typical row, for dry runs."""

    tokens: int
    images: int


class StageModule(lightning.LightningModule):
    """Base of the stages.

    Args:
        optimizer: schema of the optimizer.
        seed: of all random draws of the run.

    Attributes:
        Recipe: schema of the stage's own keys.
        draws_images: whether the stage has a condition that sample grids can be drawn from.
        guard: skips optimizer steps that are not finite.
        global_batch: rows of an optimizer step; a resumed run must have the same.
        step_began, waiting_since: when the last step began, and the wait for the next one's data; seconds.
    """

    Recipe: ClassVar[type]
    draws_images: ClassVar[bool] = False

    def __init__(self, optimizer: OptimizerConfig, seed: int):
        super().__init__()
        self.automatic_optimization = False
        self.optimizer_config, self.seed = optimizer, seed
        self.guard = StepGuard()
        self.global_batch: int | None = None
        self.step_began = self.waiting_since = 0.0
        self._step_metrics: dict[str, Tensor | float] = {}
        self._validation: dict[str, tuple[Tensor, Tensor]] = {}

    # What a stage owns.
    @classmethod
    def build(
        cls, experiment: StageExperiment, tokenizer: PromptTokenizer, load_decoder: LoadDecoder = load_image_decoder
    ) -> "StageModule":
        """The module with the networks that the configuration describes; `init_from` holds the stage before."""
        raise NotImplementedError

    def losses(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Training losses of a micro-batch, means over what it counts; `loss` is the one to minimise."""
        raise NotImplementedError

    def validation_losses(self, batch: MicroBatch) -> dict[str, tuple[Tensor, int]]:
        """Name → loss and what it counts. All ranks must give the same names."""
        raise NotImplementedError

    def count(self, batch: MicroBatch) -> int:
        """What a micro-batch counts in its optimizer step: rows, unless the stage says otherwise."""
        return len(batch)

    def prompt_shape(self, experiment: StageExperiment) -> PromptShape:
        """The row that a dry run assumes."""
        raise NotImplementedError

    def fake_batch(self, rows: int, shape: PromptShape, image_size: int) -> MicroBatch:
        """A micro-batch of that shape, for dry runs, profiling and tests; its values mean nothing."""
        raise NotImplementedError

    def reference_images(self, batch: MicroBatch, sample: Sample) -> list[Image.Image]:
        """What the grid compares each prompt's image with; `sample` draws from conditions."""
        raise NotImplementedError

    def frozen_modules(self) -> Sequence[nn.Module]:
        """Networks that stay in eval mode."""
        return ()

    def sharded_modules(self) -> Sequence[nn.Module]:
        """Networks that FSDP2 shards; the others are whole on every rank. Each must be run by calling it."""
        return ()

    @classmethod
    def cached_networks(cls, experiment: StageExperiment) -> dict[str, dict[str, str]]:
        """The caches that `data.cached_*` names, and what each depends on beside samples and their preprocessing: the
        fingerprint of the network, and what is read of it.

        Raises:
            ValueError: what should be cached trains.
        """
        return {}

    def cache_encoders(self) -> dict[str, CacheEncoder]:
        """By name, how these caches are made; of a module that was built without any."""
        return {}

    def save_model(self, folder: Path, tokenizer: PromptTokenizer) -> None:
        """Write the stage's result as a model folder."""
        raise NotImplementedError

    # The optimizer step.
    def training_step(self, step: list[MicroBatch], batch_idx: int) -> dict[str, Tensor]:
        """One optimizer step over the micro-batches of this rank; its loss, for the progress bar."""
        self.step_began = time.perf_counter()
        optimizer: Any = self.optimizers()
        self.guard.begin_step(step)
        sums: dict[str, Tensor] = {}
        for number, (batch, share) in enumerate(zip(step, self._shares(step), strict=True)):
            # Dropout draws from the global generator. Seeded here, it needs no saving and resume is exact.
            position = self.trainer.global_step * len(step) + number
            torch.manual_seed(derive_seed(self.seed, "dropout", position, self.trainer.global_rank))
            with self._gradient_sync(last=number == len(step) - 1):
                losses = self.losses(batch.to(self.device, non_blocking=True))
                self.manual_backward(losses["loss"] * share)
            self.guard.observe(losses["loss"])
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() * share
        rate = self.optimizer_config.lr * learning_rate_factor(
            self.trainer.global_step, self.optimizer_config.warmup_steps, self.trainer.max_steps
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        self._step_metrics = {f"train/{name}": value for name, value in sums.items()} | {"lr": rate}
        optimizer.step()  # clips or skips, see on_before_optimizer_step
        optimizer.zero_grad()
        return {"loss": sums["loss"]}

    def step_metrics(self) -> dict[str, float]:
        """Losses of the last optimizer step over all ranks, rate, gradient norm, skipped steps. All ranks call it."""
        reduced = {
            name: float(self.trainer.strategy.reduce(value, reduce_op="mean") if name.startswith("train/") else value)
            for name, value in self._step_metrics.items()
        }
        return reduced | {"skipped_steps": float(self.guard.skipped)}

    def _shares(self, step: list[MicroBatch]) -> list[Tensor] | list[float]:
        """Weight of each micro-batch's mean: the mean over ranks of the weighted sums is the mean over the step."""
        counts = [self.count(batch) for batch in step]
        if self.trainer.world_size == 1:
            return [count / max(1, sum(counts)) for count in counts]
        total = torch.tensor(float(sum(counts)), device=self.device)
        total = self.trainer.strategy.reduce(total, reduce_op="sum").clamp(min=1)
        return [count * self.trainer.world_size / total for count in counts]

    @contextmanager
    def _gradient_sync(self, last: bool) -> Iterator[None]:
        """DDP exchanges gradients once a step. FSDP2 does so in every micro-batch, to keep them sharded."""
        model = self.trainer.model
        if isinstance(model, DistributedDataParallel) and not last:
            with model.no_sync():
                yield
        else:
            yield

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the norm over all trainable parameters, whole or sharded; or drop the gradients of a step that is not
        finite. The gradients are no longer scaled here.

        Raises:
            TooManySkippedStepsError: see `StepGuard.skip`.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.optimizer_config.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._step_metrics["grad_norm"] = norm
        # The norm is one number for all ranks; a loss is each rank's own.
        losses_are_finite = not self.any_rank(not self.guard.losses_are_finite())
        if losses_are_finite and bool(norm.isfinite()):
            return
        optimizer.zero_grad()
        # With fp16 a gradient that overflows is the loss scaler's daily work, as long as it has room to shrink.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if not (losses_are_finite and scaler is not None and scaler.get_scale() > 1):
            self.guard.skip(self.trainer.global_step + 1, float(norm), Path(self.trainer.default_root_dir))

    def configure_optimizers(self) -> StageAdamW:
        return build_optimizer([p for p in self.parameters() if p.requires_grad], self.optimizer_config)

    # Validation.
    def on_validation_epoch_start(self) -> None:
        self._validation = {}

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        counted = len(batch) if batch.counted is None else batch.counted
        chosen = batch.rows(list(range(counted))) if 0 < counted < len(batch) else batch
        for name, (value, count) in self.validation_losses(chosen).items():
            count = torch.tensor(float(count if counted else 0), device=self.device)
            total, counts = self._validation.get(name, (torch.zeros_like(count), torch.zeros_like(count)))
            # Nothing counted may be a mean over nothing.
            self._validation[name] = (total + torch.where(count > 0, value * count, 0), counts + count)

    def on_validation_epoch_end(self) -> None:
        reduced = {
            name: [self.trainer.strategy.reduce(part.clone(), reduce_op="sum") for part in parts]
            for name, parts in self._validation.items()
        }
        metrics = {f"val/{name}": float(total / counts.clamp(min=1)) for name, (total, counts) in reduced.items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)

    # Ranks, modes, checkpoints.
    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank. All must ask alike: what they do together next must be the same."""
        return self.trainer.strategy.reduce_boolean_decision(flag, all=False)

    @property
    def is_sharded(self) -> bool:
        """Whether ranks gather parameters together, in every call of a network."""
        return self._trainer is not None and self.device_mesh is not None

    def with_image(self, prompt: PromptBatch, mllm: MultimodalLM) -> PromptBatch:
        """The batch, with a row with a blank image if it has no image at all; the loss counts that row with weight 0.

        Without it, ranks whose rows have images would wait for this one at the vision encoder. Its gradient is then
        zero and not absent, on one rank as on many, so that the optimizer's step does not depend on their number.
        """
        return prompt if prompt.images is not None else prompt.join(mllm.dummy_image_prompt().to(prompt.ids.device))

    def condition(self, prompt: PromptBatch, mllm: MultimodalLM, aligner: Aligner, wants_image: bool) -> Condition:
        """C = M(MLLM(prompt)) of each row; with `wants_image`, the vision encoder is run whether or not any row has
        an image, see `with_image`."""
        rows = len(prompt)
        condition = aligner(*mllm.hidden_states(self.with_image(prompt, mllm) if wants_image else prompt))
        unused = condition.states[rows:].sum()
        return condition.rows(slice(0, rows))._replace(states=condition.states[:rows] + 0 * unused)

    def train(self, mode: bool = True) -> "StageModule":
        """Training mode for what trains; frozen modules stay in eval mode, without dropout."""
        super().train(mode)
        for network in self.frozen_modules():
            network.train(False)
        return self

    def configure_model(self) -> None:
        """Shard over the device mesh when the strategy has one. Idempotent."""
        if self.device_mesh is not None:
            shard(self.sharded_modules(), self.device_mesh, self.trainer.precision)

    def on_train_start(self) -> None:
        self.train()
        self.waiting_since = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.waiting_since = time.perf_counter()  # the callbacks are done

    def on_validation_end(self) -> None:
        self.waiting_since = time.perf_counter()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stage"] = type(self).__name__
        checkpoint["skipped_steps"] = self.guard.skipped
        checkpoint["global_batch"] = self.global_batch

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises CheckpointMismatchError: another stage's checkpoint, or one whose steps read more or fewer rows."""
        if checkpoint.get("stage") != type(self).__name__:
            raise CheckpointMismatchError(
                f"the checkpoint is of {checkpoint.get('stage')}, this is {type(self).__name__}: use another run folder"
            )
        if checkpoint["global_batch"] != self.global_batch:
            raise CheckpointMismatchError(
                f"an optimizer step of the checkpoint reads {checkpoint['global_batch']} rows, one of this run would "
                f"read {self.global_batch}: set trainer.global_batch_size={checkpoint['global_batch']}, and "
                "data.micro_batch_size to what a device holds."
            )
        self.guard.skipped = checkpoint["skipped_steps"]


def usual_shape(mllm: MultimodalLM, tokens: int, images: int) -> PromptShape:
    """A row of `tokens`, or of more where an image takes more of them than the paper's 64."""
    image = mllm.dummy_image_prompt(usual=True).lengths[0] - 1
    return PromptShape(tokens + images * max(0, image - IMAGE_TOKENS), images)


def fake_prompts(mllm: MultimodalLM, rows: int, shape: PromptShape) -> PromptBatch:
    """Prompts of a length and number of images, with values that mean nothing.

    Raises:
        ValueError: the images do not fit.
    """
    image = mllm.dummy_image_prompt(usual=True)
    tokens = image.lengths[0] - 1
    if (needed := 1 + shape.images * (tokens + 2)) > shape.tokens:
        raise ValueError(
            f"{shape.images} images need rows of {needed} tokens, but a row has {shape.tokens}: change "
            "hardware.images_per_row or hardware.prompt_tokens"
        )
    ids = image.ids[:, :1].repeat(1, shape.tokens)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for number in range(shape.images):
        first = 2 + number * (tokens + 2)
        ids[:, first : first + tokens] = image.ids[:, 1:]
        mask[:, first : first + tokens] = image.image_mask[:, 1:]
    nowhere = torch.zeros_like(mask)
    row = PromptBatch(ids, mask, None, nowhere, [shape.tokens], [0], image.pad_id)
    if shape.images:
        row = replace(row, images=image.rows([0] * shape.images).images, images_per_row=[shape.images])
    return row.rows([0] * rows).to(mllm.device)


def build_stage(module: type[StageModule], experiment: StageExperiment, tokenizer: PromptTokenizer) -> StageModule:
    """The stage's module. Weights that no file holds are drawn anew from the seed, so that every start has the same:
    a frozen network with random weights is in no checkpoint."""
    lightning.seed_everything(experiment.seed, verbose=False)
    return module.build(experiment, tokenizer)
