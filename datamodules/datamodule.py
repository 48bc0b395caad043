"""What the three DataModules share: loaders over an endless mixture, the position on resume, the count of bad samples.

The loader's declared length is the whole run (`max_steps` × accumulated batches) and its iterator yields what is left
of it: Lightning counts the batches before a resume as fetched, and an undeclared length would lose one batch.
"""

import gc
import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from datamodules.agreement import Agreement, Answered, AnsweringDataset
from datamodules.data_config import DataConfig, Source
from datamodules.errors import DataError
from datamodules.mixture import BatchPositions, MixtureDataset, RowBuilder, SampleSource, token_weights
from datamodules.report import ReadReport, SampleCounter

logger = logging.getLogger(__name__)

STATE_VERSION = 1


class RunLoader(DataLoader):
    """A loader that Lightning knows to be resumable: its position is derived from the step, so it stores none.

    Args:
        agreement: is shown every batch's report, and what went wrong instead of a batch, on all processes at once.
    """

    def __init__(self, dataset: MixtureDataset, agreement: Agreement, **options: Any):
        super().__init__(AnsweringDataset(dataset), **options)
        self.agreement = agreement

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches.

        Raises:
            DataError: on every process, where one cannot go on or too many samples are unusable.
        """
        answer: Answered
        for answer in super().__iter__():
            yield self.agreement(answer)

    def state_dict(self) -> dict:
        """Nothing: see `MixtureDataModule.position`."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore."""


class MixtureDataModule(lightning.LightningDataModule):
    """A mixture of sources, read in an order that only seed and position determine.

    A checkpoint holds the position (samples read by all processes), so a run may go on with another number of
    processes, workers or accumulated batches and reads the same global sequence.

    Subclasses name their sources in `sources()` and build rows and batches.
    """

    def __init__(self, config: DataConfig):
        super().__init__()
        self.config = config
        self.counter = SampleCounter(config.max_bad_share, config.min_bad_count)
        self.train_dataset: MixtureDataset | None = None
        self.validation_dataset: MixtureDataset | None = None
        self._resumed: dict[str, Any] = {"step": 0, "position": 0}

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
        turn = self.config.batch_size if whole_batches else 1
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

    def train_dataloader(self) -> DataLoader:
        """Batches from the present position to the end of the run.

        Raises:
            DataError: the trainer has no `max_steps`, or would replace the sampler by its own.
        """
        assert self.trainer is not None and self.train_dataset is not None
        if self.trainer.max_steps < 1:
            raise DataError(
                f"trainer.max_steps={self.trainer.max_steps}: the mixture has no end; set the steps to train."
            )
        self._refuse_other_sampler()
        steps = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        return self._loader(self.train_dataset, steps, lambda: self.position()[:2])

    def val_dataloader(self) -> DataLoader | list:
        """The first `validation_samples` of the held-out mixture in fixed order; an empty list if there is none."""
        if self.validation_dataset is None:
            return []
        self._refuse_other_sampler()
        steps = -(-self.config.validation_samples // (self.config.batch_size * self._world()[1]))
        return self._loader(self.validation_dataset, steps, lambda: (0, 0))

    def position(self) -> tuple[int, int]:
        """(batches, samples of all processes) that the run has read so far.

        Only finished optimiser steps count: the batches of one that a crash interrupted are read again.
        """
        assert self.trainer is not None
        since = max(0, self.trainer.global_step - self._resumed["step"])
        accumulated = self.trainer.accumulate_grad_batches
        batches = since * accumulated
        samples = self._resumed["position"] + batches * self.config.batch_size * self._world()[1]
        return (self._resumed["step"] + since) * accumulated, samples

    def state_dict(self) -> dict:
        """Position and identity of the data, and the counts of all processes."""
        assert self.trainer is not None
        return {
            "version": STATE_VERSION,
            "step": self.trainer.global_step,
            "position": self.position()[1],
            "identity": self.identity(),
            "counts": self.counter.state_dict(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Take up the position; refuse other data unless `accept_changed_data`.

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

    def _loader(self, dataset: MixtureDataset, steps: int, start) -> DataLoader:
        rank, world_size = self._world()
        workers = self.config.num_workers
        return RunLoader(
            dataset,
            Agreement(self.counter),
            batch_size=None,  # the dataset makes whole batches
            sampler=BatchPositions(self.config.batch_size, steps, rank, world_size, start),
            collate_fn=_unchanged,
            num_workers=workers,
            worker_init_fn=_prepare_worker,
            prefetch_factor=self.config.prefetch_factor if workers else None,
            pin_memory=self.config.pin_memory and torch.cuda.is_available(),
        )

    def _world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _refuse_other_sampler(self) -> None:
        if self._world()[1] > 1 and self.trainer._accelerator_connector.use_distributed_sampler:  # type: ignore
            raise DataError(
                "set trainer.use_distributed_sampler=false: the batches are already divided among processes."
            )


def _unchanged(batch: Any) -> Any:
    return batch


def _prepare_worker(number: int) -> None:
    """The libraries' objects are left out of garbage collection: looking through them takes a third of the time of
    reading captions."""
    gc.freeze()
