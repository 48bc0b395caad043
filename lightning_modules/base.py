"""Base class of the stages: manual optimization, with one Lightning batch per optimizer step.

A Lightning batch is the list of an optimizer step's micro-batches. `training_step` runs a forward and a backward pass
for each of them, clips the gradient (or skips a step that is not finite), sets the learning rate and steps the
optimizer. So `batch_idx == global_step` on any number of devices.

Up to rounding, the result does not depend on how a step is divided into micro-batches and ranks. There are two
exceptions: dropout, which is seeded by step, micro-batch and rank (and so is the same after a resume with the same
division), and losses normalised over a whole micro-batch, as L_rec in stage 2's `released` variant.
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

IMAGE_TOKENS = 64  # per image in the paper's MLLM
LoadDecoder = Callable[..., ImageDecoder]
PromptTokenizer = Tokenizer | LanguageProcessor
Sample = Callable[[Condition, Condition], list[Image.Image]]


class StageExperiment(Protocol):
    """The part of an experiment's configuration that stages read."""

    model: ModelConfig
    data: Any
    recipe: Any
    optimizer: OptimizerConfig
    init_from: str | None
    seed: int


class CacheEncoder(NamedTuple):
    """A frozen network, and the function that turns a list of its inputs into the tensors to cache for each."""

    network: nn.Module
    encode: Callable[[list[Any]], list[dict[str, Tensor]]]


@dataclass
class PromptShape:
    """Number of tokens and images of a typical row, for dry runs."""

    tokens: int
    images: int


class StageModule(lightning.LightningModule):
    """Base of the stages.

    Args:
        optimizer: optimizer configuration.
        seed: seed of all random draws in the run.

    Attributes:
        Recipe: schema of the stage's own configuration keys, `recipe.*`.
        draws_images: whether the stage has an aligner, so that sample grids can be drawn.
        guard: skips optimizer steps that are not finite.
        global_batch: rows per optimizer step; must be the same when a run is resumed.
        step_began, waiting_since: start of the last step and of the wait for the next one's data, in seconds.
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

    # To be implemented by each stage.
    @classmethod
    def build(
        cls, experiment: StageExperiment, tokenizer: PromptTokenizer, load_decoder: LoadDecoder = load_image_decoder
    ) -> "StageModule":
        """Build the module and its networks from the configuration; `init_from` is the previous stage's model."""
        raise NotImplementedError

    def losses(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Training losses of a micro-batch, each a mean over its rows (or tokens); `loss` is minimised."""
        raise NotImplementedError

    def validation_losses(self, batch: MicroBatch) -> dict[str, tuple[Tensor, int]]:
        """Name → loss and the number of rows or tokens it averages. All ranks must return the same names."""
        raise NotImplementedError

    def count(self, batch: MicroBatch) -> int:
        """Weight of a micro-batch in its optimizer step: the number of rows by default."""
        return len(batch)

    def prompt_shape(self, experiment: StageExperiment) -> PromptShape:
        """Typical row of the stage, which a dry run assumes."""
        raise NotImplementedError

    def fake_batch(self, rows: int, shape: PromptShape, image_size: int) -> MicroBatch:
        """A micro-batch of the given shape with arbitrary values, for dry runs, profiling and tests."""
        raise NotImplementedError

    def reference_images(self, batch: MicroBatch, sample: Sample) -> list[Image.Image]:
        """The reference column of sample grids, an image per prompt; `sample` draws images from conditions."""
        raise NotImplementedError

    def frozen_modules(self) -> Sequence[nn.Module]:
        """Networks that stay in eval mode."""
        return ()

    def sharded_modules(self) -> Sequence[nn.Module]:
        """Networks that FSDP2 shards; others are replicated. Run them by `__call__`, which gathers the parameters."""
        return ()

    @classmethod
    def cached_networks(cls, experiment: StageExperiment) -> dict[str, dict[str, str]]:
        """Name of each cache that `data.cached_*` sets → what its values depend on besides the samples and their
        preprocessing: the fingerprint of the frozen network, and which of its outputs is cached.

        Raises:
            ValueError: the network to be cached is trained.
        """
        return {}

    def cache_encoders(self) -> dict[str, CacheEncoder]:
        """Name → encoder of each cache. The module must have been built without caches."""
        return {}

    def save_model(self, folder: Path, tokenizer: PromptTokenizer) -> None:
        """Write the trained networks and the tokenizer as a model folder."""
        raise NotImplementedError

    # The optimizer step.
    def training_step(self, step: list[MicroBatch], batch_idx: int) -> dict[str, Tensor]:
        """Run an optimizer step over this rank's micro-batches; returns its loss for the progress bar."""
        self.step_began = time.perf_counter()
        optimizer: Any = self.optimizers()
        self.guard.begin_step(step)
        sums: dict[str, Tensor] = {}
        for number, (batch, weight) in enumerate(zip(step, self._loss_weights(step), strict=True)):
            # Dropout draws from the global generator. Seeding it here makes resume exact without saving its state.
            position = self.trainer.global_step * len(step) + number
            torch.manual_seed(derive_seed(self.seed, "dropout", position, self.trainer.global_rank))
            with self._gradient_sync(last=number == len(step) - 1):
                losses = self.losses(batch.to(self.device, non_blocking=True))
                self.manual_backward(losses["loss"] * weight)
            self.guard.observe(losses["loss"])
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() * weight
        rate = self.optimizer_config.lr * learning_rate_factor(
            self.trainer.global_step, self.optimizer_config.warmup_steps, self.trainer.max_steps
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        self._step_metrics = {f"train/{name}": value for name, value in sums.items()} | {"lr": rate}
        optimizer.step()  # on_before_optimizer_step clips the gradient or skips the step
        optimizer.zero_grad()
        return {"loss": sums["loss"]}

    def step_metrics(self) -> dict[str, float]:
        """Metrics of the last optimizer step, with losses averaged over ranks. All ranks must call it together."""
        reduced = {
            name: float(self.trainer.strategy.reduce(value, reduce_op="mean") if name.startswith("train/") else value)
            for name, value in self._step_metrics.items()
        }
        return reduced | {"skipped_steps": float(self.guard.skipped)}

    def _loss_weights(self, step: list[MicroBatch]) -> list[Tensor] | list[float]:
        """Weight of each micro-batch's loss, such that the mean over ranks of the weighted sums is the step's mean."""
        counts = [self.count(batch) for batch in step]
        if self.trainer.world_size == 1:
            return [count / max(1, sum(counts)) for count in counts]
        total = torch.tensor(float(sum(counts)), device=self.device)
        total = self.trainer.strategy.reduce(total, reduce_op="sum").clamp(min=1)
        return [count * self.trainer.world_size / total for count in counts]

    @contextmanager
    def _gradient_sync(self, last: bool) -> Iterator[None]:
        """Let DDP reduce gradients once per step. FSDP2 does so for every micro-batch, to keep them sharded."""
        model = self.trainer.model
        if isinstance(model, DistributedDataParallel) and not last:
            with model.no_sync():
                yield
        else:
            yield

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the (unscaled) gradient to `max_grad_norm`, or drop it if the gradient or a loss is not finite.

        Raises:
            TooManySkippedStepsError: more steps were skipped than `trainer.max_skipped_steps`.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.optimizer_config.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._step_metrics["grad_norm"] = norm
        # The norm is the same on all ranks, the losses are not.
        losses_are_finite = not self.any_rank(not self.guard.losses_are_finite())
        if losses_are_finite and bool(norm.isfinite()):
            return
        optimizer.zero_grad()
        # With fp16 an occasional gradient overflow is normal, as long as the loss scale can still be reduced.
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
        batch = batch.rows(list(range(counted))) if 0 < counted < len(batch) else batch
        for name, (value, count) in self.validation_losses(batch).items():
            count = torch.tensor(float(count if counted else 0), device=self.device)
            total, counts = self._validation.get(name, (torch.zeros_like(count), torch.zeros_like(count)))
            # A mean over nothing may be NaN.
            self._validation[name] = (total + torch.where(count > 0, value * count, 0), counts + count)

    def on_validation_epoch_end(self) -> None:
        reduced = {
            name: [self.trainer.strategy.reduce(part.clone(), reduce_op="sum") for part in parts]
            for name, parts in self._validation.items()
        }
        metrics = {f"val/{name}": float(total / counts.clamp(min=1)) for name, (total, counts) in reduced.items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)

    # Distributed training, train and eval mode, checkpoints.
    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is True on any rank. All ranks must call it together."""
        return self.trainer.strategy.reduce_boolean_decision(flag, all=False)

    @property
    def is_sharded(self) -> bool:
        """Whether networks are sharded, so that every call is a collective operation."""
        return self._trainer is not None and self.device_mesh is not None

    def with_dummy_image(self, prompt: PromptBatch, mllm: MultimodalLM) -> PromptBatch:
        """Append a row with a blank image if the batch has no image; the caller gives that row weight 0 in the loss.

        If only some ranks ran the vision encoder, they would deadlock. The dummy image also gives the encoder a zero
        gradient instead of none, on any number of ranks, so that the optimizer step does not depend on their number.
        """
        return prompt if prompt.images is not None else prompt.join(mllm.dummy_image_prompt().to(prompt.ids.device))

    def condition(self, prompt: PromptBatch, mllm: MultimodalLM, aligner: Aligner, dummy_image: bool) -> Condition:
        """C = M(MLLM(prompt)) of each row; with `dummy_image` the vision encoder also runs for prompts without images,
        see `with_dummy_image`."""
        rows = len(prompt)
        condition = aligner(*mllm.hidden_states(self.with_dummy_image(prompt, mllm) if dummy_image else prompt))
        unused = condition.states[rows:].sum()
        return condition.rows(slice(0, rows))._replace(states=condition.states[:rows] + 0 * unused)

    def train(self, mode: bool = True) -> "StageModule":
        """Set the mode of the trainable networks; frozen modules stay in eval mode."""
        super().train(mode)
        for network in self.frozen_modules():
            network.train(False)
        return self

    def configure_model(self) -> None:
        """Shard the networks if the strategy has a device mesh. Idempotent."""
        if self.device_mesh is not None:
            shard(self.sharded_modules(), self.device_mesh, self.trainer.precision)

    def on_train_start(self) -> None:
        self.train()
        self.waiting_since = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.waiting_since = time.perf_counter()  # called after the callbacks

    def on_validation_end(self) -> None:
        self.waiting_since = time.perf_counter()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stage"] = type(self).__name__
        checkpoint["skipped_steps"] = self.guard.skipped
        checkpoint["global_batch"] = self.global_batch

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises CheckpointMismatchError: the checkpoint is of another stage or global batch size."""
        if checkpoint.get("stage") != type(self).__name__:
            raise CheckpointMismatchError(
                f"the checkpoint holds a {checkpoint.get('stage')}, but this run trains a {type(self).__name__}: use "
                "another run folder"
            )
        if checkpoint["global_batch"] != self.global_batch:
            raise CheckpointMismatchError(
                f"the checkpoint was trained with {checkpoint['global_batch']} rows per optimizer step, this run has "
                f"{self.global_batch}: set trainer.global_batch_size={checkpoint['global_batch']}, and "
                "data.micro_batch_size to what fits on a device."
            )
        self.guard.skipped = checkpoint["skipped_steps"]


def typical_shape(mllm: MultimodalLM, tokens: int, images: int) -> PromptShape:
    """A row of `tokens` (counted with the paper's 64 tokens per image), lengthened if images take more tokens."""
    image = mllm.dummy_image_prompt(usual=True).lengths[0] - 1
    return PromptShape(tokens + images * max(0, image - IMAGE_TOKENS), images)


def fake_prompts(mllm: MultimodalLM, rows: int, shape: PromptShape) -> PromptBatch:
    """Identical prompts of the given length and number of images, with arbitrary values.

    Raises:
        ValueError: the images need more tokens than a row has.
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
    padding = torch.zeros_like(mask)
    row = PromptBatch(ids, mask, None, padding, [shape.tokens], [0], image.pad_id)
    if shape.images:
        row = replace(row, images=image.rows([0] * shape.images).images, images_per_row=[shape.images])
    return row.rows([0] * rows).to(mllm.device)


def build_stage(module: type[StageModule], experiment: StageExperiment, tokenizer: PromptTokenizer) -> StageModule:
    """Build the stage's module. Random initial weights depend on the seed alone: frozen networks are in no checkpoint,
    so a resumed run must draw the same ones."""
    lightning.seed_everything(experiment.seed, verbose=False)
    return module.build(experiment, tokenizer)
