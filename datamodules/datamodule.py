"""What the three DataModules share: loaders over an endless mixture, the position on resume, the count of bad samples.

A batch of the training loader is one optimizer step: the list of its micro-batches. The loader's declared length is the
whole run and its iterator yields what is left of it: Lightning counts the steps before a resume as fetched, and an
undeclared length would lose one.
"""

import gc
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import lightning
import torch
from torch.utils.data import DataLoader

from datamodules.agreement import Agreement, AnsweringDataset
from datamodules.data_config import DataConfig, Source
from datamodules.errors import DataError
from datamodules.mixture import BatchPositions, MixtureDataset, RowBuilder, SampleSource, token_weights
from datamodules.report import SampleCounter
from kosmosg.batches import ReadReport
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.prompt import PromptEncoder

logger = logging.getLogger(__name__)

STATE_VERSION = 2


class StepLoader:
    """Optimizer steps as lists of micro-batches; or micro-batches alone, for validation.

    Args:
        loader: of micro-batches.
        agreement: is shown every report, and what went wrong instead of a batch, on all ranks at once.
        per_step: micro-batches of a step; None yields them one by one.
        counted: rows of the global order that count, for validation.
    """

    def __init__(self, loader: DataLoader, agreement: Agreement, per_step: int | None, counted: int | None = None):
        self.loader, self.agreement, self.per_step, self.counted = loader, agreement, per_step, counted

    def __len__(self) -> int:
        return len(self.loader) // (self.per_step or 1)

    def __iter__(self) -> Iterator[Any]:
        """Steps, or micro-batches.

        Raises:
            DataError: on every rank, where one cannot go on or too many samples are unusable.
        """
        step = []
        for answer in self.loader:
            batch = self.agreement(answer)
            if self.per_step is None:
                batch.counted = sum(index < self.counted for index in batch.indices) if self.counted else None
                yield batch
                continue
            step.append(batch)
            if len(step) == self.per_step:
                yield step
                step = []

    def state_dict(self) -> dict:
        """Nothing: the position follows from the step."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore."""


class MixtureDataModule(lightning.LightningDataModule):
    """A mixture of sources, read in an order that only seed and position determine.

    The position follows from the optimizer step and the global batch, so a run may go on with another number of ranks,
    workers or micro-batches and reads the same global sequence.

    Subclasses name their sources in `sources()` and build rows and batches.

    Attributes:
        micro_batches: of one optimizer step, on each rank.
    """

    Config: ClassVar[type[DataConfig]]

    def __init__(self, config: DataConfig):
        super().__init__()
        self.config = config
        self.counter = SampleCounter(config.max_bad_share, config.min_bad_count)
        self.train_dataset: MixtureDataset | None = None
        self.validation_dataset: MixtureDataset | None = None
        self.micro_batches = 1
        self._resumed: dict[str, Any] = {}

    @classmethod
    def build(cls, config: Any, encoder: PromptEncoder, image_size: int, decoder: ImageDecoder | None) -> Any:
        """The stage's data.

        Args:
            encoder: encodes prompts as the stage's MLLM reads them.
            image_size: side of the target images in pixels.
            decoder: of the stage's module, if it has one.
        """
        raise NotImplementedError

    @abstractmethod
    def sources(self) -> dict[str, Source]:
        """The stage's sources by name, unused ones included."""

    @abstractmethod
    def builder(self, name: str, pattern: str) -> RowBuilder:
        """Reader and row builder of one source over the shards of `pattern`."""

    @abstractmethod
    def collate(self, rows: list, report: ReadReport) -> Any:
        """Rows → the stage's batch."""

    def open_source(self, pattern: str, kind: str, suffixes: Sequence[str] | None = None) -> SampleSource:
        """The samples of `kind` in the shards of `pattern`, within the configured limits."""
        wanted = frozenset(suffixes) if suffixes else None
        return SampleSource(pattern, kind, self.config.limits, wanted, self.config.remote)

    def setup(self, stage: str | None = None) -> None:
        """Open the shards and compare them with those of the checkpoint, if one was loaded.

        Raises:
            DataError: no source is in use, shards cannot be read, or they are not the checkpoint's.
        """
        if self.train_dataset is not None:
            return
        used = {name: source for name, source in self.sources().items() if source.shards and source.weight}
        if not used:
            names = ", ".join(f"data.{name}.shards" for name in self.sources())
            raise DataError(f"no source of data is in use; set at least one of {names} and a weight above 0.")
        training = {name: source.shards for name, source in used.items()}
        whole_batches = self.config.mixing == "per_batch"
        turn = self.config.micro_batch_size if whole_batches else 1
        self.train_dataset = self._dataset(training, self.config.seed, rows_per_turn=turn)
        chosen = self.config.validation_sources
        if chosen is not None and (unknown := sorted(set(chosen) - set(self.sources()))):
            raise DataError(f"data.validation_sources names {unknown}; allowed: {', '.join(self.sources())}.")
        held_out = {
            name: source.validation
            for name, source in used.items()
            if source.validation and (chosen is None or name in chosen)
        }
        if held_out:
            self.validation_dataset = self._dataset(held_out, seed=0)  # the same samples whatever the run's seed
        self._check_identity()

    def train_dataloader(self) -> StepLoader:
        """Optimizer steps from the present one to the end of the run.

        Raises:
            DataError: the trainer has no `max_steps`.
        """
        assert self.trainer is not None and self.train_dataset is not None
        if self.trainer.max_steps < 1:
            raise DataError(
                f"trainer.max_steps={self.trainer.max_steps}: the mixture has no end; set the steps to train."
            )
        loader = self._loader(self.train_dataset, self.trainer.max_steps * self.micro_batches, self._first)
        return StepLoader(loader, Agreement(self.counter), self.micro_batches)

    def val_dataloader(self) -> StepLoader | list:
        """The first `validation_samples` of the held-out mixture in fixed order; an empty list if there is none."""
        if self.validation_dataset is None:
            return []
        count = -(-self.config.validation_samples // (self.config.micro_batch_size * self._world()[1]))
        loader = self._loader(self.validation_dataset, count, lambda: 0)
        return StepLoader(loader, Agreement(self.counter), None, self.config.validation_samples)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Micro-batches of a training step move one by one, when their turn comes."""
        return batch if isinstance(batch, list) else batch.to(device, non_blocking=True)

    def _first(self) -> int:
        """The micro-batch at which the run goes on. What a crash interrupted within a step is read again."""
        assert self.trainer is not None
        return self.trainer.global_step * self.micro_batches

    def state_dict(self) -> dict:
        """Identity of the data, and the counts of all ranks."""
        return {"version": STATE_VERSION, "identity": self.identity(), "counts": self.counter.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take up the counts; refuse other data unless `accept_changed_data`.

        Raises:
            DataError: the checkpoint's data are not these.
        """
        if state_dict.get("version") != STATE_VERSION:
            raise DataError(
                f"the checkpoint's data state has version {state_dict.get('version')}, not {STATE_VERSION}."
            )
        self._resumed = dict(state_dict)
        self.counter.load_state_dict(state_dict["counts"])
        self._check_identity()

    def identity(self) -> dict[str, Any]:
        """What must not change under a run: the seed, and weight and content hash of each source."""
        assert self.train_dataset is not None
        weights = self.train_dataset.order.weights
        names = [builder.name for builder in self.train_dataset.builders]
        hashes = [builder.source.shards.identity for builder in self.train_dataset.builders]
        return {
            "seed": self.config.seed,
            "rows_per_turn": self.train_dataset.order.rows_per_turn,
            "sources": {
                name: {"weight": weight, "content": content}
                for name, weight, content in zip(names, weights, hashes, strict=True)
            },
        }

    def _check_identity(self) -> None:
        if self.train_dataset is None or "identity" not in self._resumed or self.config.accept_changed_data:
            return
        before, now = self._resumed["identity"], self.identity()
        before = {"rows_per_turn": 1} | before  # checkpoints of before `mixing` was a choice
        changes = [
            f"{name} {before[name]} → {now[name]}" for name in ("seed", "rows_per_turn") if before[name] != now[name]
        ]
        for name in sorted(before["sources"].keys() | now["sources"].keys()):
            old, new = before["sources"].get(name), now["sources"].get(name)
            if old is None or new is None:
                changes.append(f"source '{name}' {'was added' if old is None else 'is gone'}")
                continue
            changes += [
                f"{name}.{item} {old[item]!s:.12} → {new[item]!s:.12}" for item in old if old[item] != new[item]
            ]
        if changes:
            raise DataError(
                f"the data are not those of the checkpoint ({'; '.join(changes)}), so the run would not go on with the "
                "samples that are due. Restore them, or set data.accept_changed_data=true to go on with these."
            )

    def _dataset(self, patterns: dict[str, str], seed: int, rows_per_turn: int = 1) -> MixtureDataset:
        builders = [self.builder(name, pattern) for name, pattern in patterns.items()]
        weights = [self.sources()[name].weight for name in patterns]
        dataset = MixtureDataset(builders, weights, seed, self.collate, rows_per_turn)
        if self.config.weights_of == "samples" or len(builders) == 1:
            return dataset
        weights = token_weights(dataset, weights)
        logger.info("rows by tokens: %s", ", ".join(f"{name} {w}" for name, w in zip(patterns, weights, strict=True)))
        return MixtureDataset(builders, weights, seed, self.collate, rows_per_turn)

    def _loader(self, dataset: MixtureDataset, count: int, first: Callable[[], int]) -> DataLoader:
        rank, world_size = self._world()
        workers = self.config.num_workers
        return DataLoader(
            AnsweringDataset(dataset),
            batch_size=None,  # the dataset makes whole micro-batches
            sampler=BatchPositions(self.config.micro_batch_size, count, rank, world_size, first),
            collate_fn=_unchanged,
            num_workers=workers,
            worker_init_fn=_prepare_worker,
            prefetch_factor=self.config.prefetch_factor if workers else None,
            pin_memory=self.config.pin_memory and torch.cuda.is_available(),
        )

    def _world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def _unchanged(batch: Any) -> Any:
    return batch


def _prepare_worker(number: int) -> None:
    """The libraries' objects are left out of garbage collection: looking through them takes a third of the time of
    reading captions."""
    gc.freeze()
