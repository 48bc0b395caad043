"""Base class of the stages' DataModules: loaders over an endless mixture, resuming, and counting of bad samples.

A batch of the training loader is one optimizer step, as a list of micro-batches. The loader's length is that of the
whole run, even if its iterator starts in the middle: Lightning counts the steps before a resume as fetched, and without
a length it would lose one step.
"""

import gc
import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import lightning
import torch
from torch.utils.data import DataLoader

from datamodules.agreement import Agreement, CatchDataErrors
from datamodules.cache import Cache, Encode, Item, write_cache
from datamodules.data_config import DataConfig, Source
from datamodules.errors import DataError
from datamodules.mixture import DRAWS_PER_WEIGHT, BatchPositions, MixtureDataset, RowBuilder
from datamodules.order import Mixture, SampleOrder, integer_weights, mix
from datamodules.report import SampleCounter
from datamodules.sample import Sample
from datamodules.shards import ShardList, list_shards
from kosmosg.batches import ReadReport
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.prompt import PromptEncoder

logger = logging.getLogger(__name__)

STATE_VERSION = 3


class StepLoader:
    """Yields optimizer steps as lists of micro-batches, or single micro-batches for validation.

    Args:
        loader: yields micro-batches or errors.
        agreement: counts reports and raises errors on all ranks at once.
        per_step: micro-batches per step; None yields single micro-batches.
        counted: for validation, the number of rows that count; later ones only fill the last batch.
    """

    def __init__(self, loader: DataLoader, agreement: Agreement, per_step: int | None, counted: int | None = None):
        self.loader, self.agreement, self.per_step, self.counted = loader, agreement, per_step, counted

    def __len__(self) -> int:
        return len(self.loader) // (self.per_step or 1)

    def __iter__(self) -> Iterator[Any]:
        """Yield steps or micro-batches.

        Raises:
            DataError: raised on every rank if any rank has no batch or too many samples are unusable.
        """
        step = []
        for result in self.loader:
            batch = self.agreement(result)
            if self.per_step is None:
                batch.counted = sum(index < self.counted for index in batch.indices) if self.counted else None
                yield batch
                continue
            step.append(batch)
            if len(step) == self.per_step:
                yield step
                step = []

    def state_dict(self) -> dict:
        """Return an empty state, since the position follows from the step."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Do nothing."""


class MixtureDataModule(lightning.LightningDataModule):
    """A mixture of sources, read in an order that depends only on the seed and the position.

    The position follows from the optimizer step and the global batch size. A run may therefore be resumed with another
    number of ranks, workers or micro-batches and still reads the same global sequence.

    Subclasses list their sources in `sources()` and build rows and batches.

    Attributes:
        micro_batches: per optimizer step, on each rank.
        networks: for each cache that is read or written, what its values depend on apart from the data; see
            `StageModule.cached_networks`.
    """

    Config: ClassVar[type[DataConfig]]

    def __init__(self, config: DataConfig):
        super().__init__()
        self.config = config
        self.counter = SampleCounter(config.max_bad_share, config.min_bad_count)
        self.train_dataset: MixtureDataset | None = None
        self.validation_dataset: MixtureDataset | None = None
        self.micro_batches = 1
        self.networks: dict[str, dict[str, str]] = {}
        self._measured: dict[str, dict[str, float]] = {}
        self._resumed: dict[str, Any] = {}

    @classmethod
    def build(cls, config: Any, encoder: PromptEncoder, image_size: int, decoder: ImageDecoder | None) -> Any:
        """Build the DataModule of a stage.

        Args:
            encoder: encodes prompts for the stage's MLLM.
            image_size: side of the target images in pixels.
            decoder: the image decoder of the stage's module, if it has one.
        """
        raise NotImplementedError

    @abstractmethod
    def sources(self) -> dict[str, Source]:
        """Return the stage's sources by name, including unused ones."""

    @abstractmethod
    def builder(self, name: str, shards: ShardList, order: SampleOrder) -> RowBuilder:
        """Return the row builder of a source."""

    @abstractmethod
    def collate(self, rows: list, report: ReadReport) -> Any:
        """Make the stage's batch of rows."""

    @property
    def lane_rows(self) -> int:
        """Consecutive rows of a lane; with `mixing: per_batch`, a whole micro-batch."""
        return self.config.micro_batch_size if self.config.mixing == "per_batch" else self.config.lane_rows

    def setup(self, stage: str | None = None) -> None:
        """List the shards and compare them with those of the checkpoint, if one was loaded.

        Raises:
            DataError: no source is in use, the shards cannot be listed, or they differ from the checkpoint's.
        """
        if self.train_dataset is not None:
            return
        training, held_out = self._patterns()
        self.train_dataset = self._dataset(training, self.config.seed, self.config.mixing == "per_batch")
        if held_out:
            self.validation_dataset = self._dataset(held_out, seed=0)  # the same samples whatever the run's seed
        self._check_identity()

    def _patterns(self) -> tuple[dict[str, str], dict[str, str]]:
        """Patterns of the training and the held-out shards of each source in use."""
        used = {name: source for name, source in self.sources().items() if source.shards and source.weight}
        if not used:
            names = ", ".join(f"data.{name}.shards" for name in self.sources())
            raise DataError(f"no data source is in use; set at least one of {names} and a weight above 0.")
        chosen = self.config.validation_sources
        if chosen is not None and (unknown := sorted(set(chosen) - set(self.sources()))):
            raise DataError(f"data.validation_sources names {unknown}; allowed: {', '.join(self.sources())}.")
        held_out = {
            name: source.validation
            for name, source in used.items()
            if source.validation and (chosen is None or name in chosen)
        }
        return {name: source.shards for name, source in used.items()}, held_out

    # Caches.
    def preprocessing(self, cache: str) -> dict[str, str]:
        """Describe the preprocessing of a cache's items, and the `precision` in which its values are stored."""
        raise NotImplementedError

    def items(self, cache: str, sample: Sample) -> Sequence[Item]:
        """Return the inputs of a cache's network that a sample has, as functions that decode them."""
        raise NotImplementedError

    def cache(self, name: str, shards: ShardList) -> Cache | None:
        """Open the cache of some shards; None if this run does not use it."""
        return Cache(shards, self._identity_of(name)) if name in self.networks else None

    def write_cache(self, name: str, encode: Encode) -> Counter[str]:
        """Write a cache for all shards in use, including held-out ones; see `datamodules.cache.write_cache`."""
        config, counts = self.config, Counter()
        for pattern in sorted({pattern for patterns in self._patterns() for pattern in patterns.values()}):
            shards, identity = list_shards(pattern, config.remote), self._identity_of(name)
            items = partial(self.items, name)
            counts += write_cache(shards, identity, items, encode, config.micro_batch_size, config.limits)
        return counts

    def _identity_of(self, cache: str) -> dict[str, str]:
        return {"cache": cache, **self.networks[cache], **self.preprocessing(cache)}

    def train_dataloader(self) -> StepLoader:
        """Return the loader of optimizer steps, from the current one to the end of the run.

        Raises:
            DataError: `trainer.max_steps` is not set.
        """
        assert self.trainer is not None and self.train_dataset is not None
        if self.trainer.max_steps < 1:
            raise DataError(
                f"trainer.max_steps={self.trainer.max_steps} must be at least 1, because the mixture is endless."
            )
        self._check_lanes()
        self.measure()
        loader = self._loader(self.train_dataset, self.trainer.max_steps * self.micro_batches, self._first)
        return StepLoader(loader, Agreement(self.counter), self.micro_batches)

    def val_dataloader(self) -> StepLoader | list:
        """Return the loader of the first `validation_samples` held-out rows, or [] if there are no held-out shards."""
        if self.validation_dataset is None:
            return []
        self.measure()
        count = -(-self.config.validation_samples // (self.config.micro_batch_size * self._rank_and_world_size()[1]))
        loader = self._loader(self.validation_dataset, count, lambda: 0)
        return StepLoader(loader, Agreement(self.counter), None, self.config.validation_samples)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move validation batches to the device; the training step moves its micro-batches itself, one at a time."""
        return batch if isinstance(batch, list) else batch.to(device, non_blocking=True)

    def _first(self) -> int:
        """Number of the first micro-batch to read. A step interrupted by a crash is read again."""
        assert self.trainer is not None
        return self.trainer.global_step * self.micro_batches

    def measure(self) -> None:
        """Measure what the order depends on: samples per packed row and, for `weights_of: tokens`, tokens per row.

        Rank 0 measures for all ranks. A resumed run uses the values measured at its first start.

        Raises:
            DataError: raised on every rank if rank 0 finds too many unusable samples.
        """
        datasets = {"": self.train_dataset, "validation ": self.validation_dataset}
        for prefix, dataset in datasets.items():
            names = [] if dataset is None else [prefix + builder.name for builder in dataset.builders]
            if dataset is None or self._measured.keys() >= set(names) or not self._needs_measuring(dataset):
                continue
            measured = self._on_rank_0(lambda dataset=dataset: self._measure(dataset))
            self._measured |= dict(zip(names, measured, strict=True))
            self._apply_measured(prefix, dataset)

    def _needs_measuring(self, dataset: MixtureDataset) -> bool:
        by_tokens = self.config.weights_of == "tokens" and len(dataset.builders) > 1
        return by_tokens or not all(builder.samples_per_row for builder in dataset.builders)

    def _measure(self, dataset: MixtureDataset) -> list[dict[str, float]]:
        measured: list[dict[str, float]] = []
        for number, builder in enumerate(dataset.builders):
            builder.samples_per_row = builder.measure()
            measured.append({"samples_per_row": builder.samples_per_row})
            if self.config.weights_of == "tokens" and len(dataset.builders) > 1:
                measured[-1]["tokens_per_row"] = dataset.tokens_per_row(number)
        return measured

    def _on_rank_0(self, function: Callable[[], Any]) -> Any:
        result: Any = None
        if self._rank_and_world_size()[0] == 0:
            try:
                result = function()
            except DataError as error:
                result = error
        if self.trainer is not None and self.trainer.world_size > 1:
            result = self.trainer.strategy.broadcast(result)
        if isinstance(result, DataError):
            raise result
        return result

    def _apply_measured(self, prefix: str, dataset: MixtureDataset) -> None:
        measured = [self._measured.get(prefix + builder.name, {}) for builder in dataset.builders]
        if not all(measured):
            return
        for builder, values in zip(dataset.builders, measured, strict=True):
            builder.samples_per_row = values["samples_per_row"]
        if all("tokens_per_row" in values for values in measured):
            shares = [self.sources()[builder.name].weight for builder in dataset.builders]
            weights = integer_weights(
                [share / max(values["tokens_per_row"], 1.0) for share, values in zip(shares, measured, strict=True)]
            )
            names = [builder.name for builder in dataset.builders]
            logger.info(
                "row weights of the sources for the configured shares of tokens: %s",
                ", ".join(f"{name} {weight}" for name, weight in zip(names, weights, strict=True)),
            )
            order = dataset.order
            dataset.order = Mixture(order.seed, weights, order.lanes, order.lane_rows, order.rows_per_draw)

    def state_dict(self) -> dict:
        """Return the identity of the data, the measured values, and the counts of all ranks."""
        counts = self.counter.state_dict()
        return {"version": STATE_VERSION, "identity": self.identity(), "measured": self._measured, "counts": counts}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore the counts and check that the data are the same, unless `accept_changed_data` is set.

        Raises:
            DataError: the data differ from the checkpoint's.
        """
        if state_dict.get("version") != STATE_VERSION:
            raise DataError(
                f"the checkpoint's data state has version {state_dict.get('version')}, whose order of samples differs "
                f"from that of version {STATE_VERSION}. Finish the run with the version of this project that began it."
            )
        self._resumed = dict(state_dict)
        self.counter.load_state_dict(state_dict["counts"])
        self._check_identity()

    def identity(self) -> dict[str, Any]:
        """Return what must not change during a run: settings of the order, and weight and content of each source."""
        assert self.train_dataset is not None
        config, order = self.config, self.train_dataset.order
        settings = ("seed", "mixing", "weights_of", "lanes", "window", "block")
        return {name: getattr(config, name) for name in settings} | {
            "lane_rows": order.lane_rows,
            "sources": {
                builder.name: {
                    "weight": self.sources()[builder.name].weight,
                    "content": builder.source.shards.identity,
                }
                for builder in self.train_dataset.builders
            },
        }

    def _check_identity(self) -> None:
        if self.train_dataset is None or "identity" not in self._resumed:
            return
        before, now = self._resumed["identity"], self.identity()
        changes = [
            f"{name} {before[name]} → {now[name]}" for name in now if name != "sources" and before[name] != now[name]
        ]
        for name in sorted(before["sources"].keys() | now["sources"].keys()):
            old, new = before["sources"].get(name), now["sources"].get(name)
            if old is None or new is None:
                changes.append(f"source '{name}' was {'added' if old is None else 'removed'}")
                continue
            changes += [
                f"{name}.{item} {old[item]!s:.12} → {new[item]!s:.12}" for item in old if old[item] != new[item]
            ]
        if changes and not self.config.accept_changed_data:
            raise DataError(
                f"the data are not those of the checkpoint ({'; '.join(changes)}), so the run would not continue with "
                "the samples that come next. Restore the data, or set data.accept_changed_data=true to use these."
            )
        self._measured = {} if changes else dict(self._resumed["measured"])
        self._apply_measured("", self.train_dataset)
        if self.validation_dataset is not None:
            self._apply_measured("validation ", self.validation_dataset)

    def _dataset(self, patterns: dict[str, str], seed: int, whole_batches: bool = False) -> MixtureDataset:
        config = self.config
        shards = {name: list_shards(pattern, config.remote) for name, pattern in patterns.items()}
        orders = [
            SampleOrder(one.samples, mix(seed, number), config.lanes, self.lane_rows, config.window, config.block)
            for number, one in enumerate(shards.values())
        ]
        lanes = config.lanes
        if all(order.one_block for order in orders):
            # Every reader reads all shards anyway, and with one lane the weights and epochs are exact in global order.
            lanes = 1
            for order in orders:
                order.lanes = lanes
        rows_per_draw, repeats = (self.lane_rows, DRAWS_PER_WEIGHT) if whole_batches else (1, 1)
        weights = [self.sources()[name].weight for name in patterns]
        mixture = Mixture(seed, weights, lanes, self.lane_rows, rows_per_draw, repeats)
        builders = [self.builder(name, one, order) for (name, one), order in zip(shards.items(), orders, strict=True)]
        return MixtureDataset(builders, mixture, self.collate)

    def _check_lanes(self) -> None:
        """Warn if several readers would read the same shards."""
        assert self.train_dataset is not None
        rank, world_size = self._rank_and_world_size()
        readers, lanes = world_size * max(self.config.num_workers, 1), self.config.lanes
        large = [builder.name for builder in self.train_dataset.builders if not builder.source.order.one_block]
        if rank == 0 and large and lanes % readers:
            logger.warning(
                "data.lanes=%d is not a multiple of the %d readers (ranks × workers), so several read the same "
                "shards of %s. Set data.lanes=%d for a new run.",
                lanes, readers, ", ".join(large), readers * -(-lanes // readers),
            )  # fmt: skip

    def _loader(self, dataset: MixtureDataset, count: int, first: Callable[[], int]) -> DataLoader:
        rank, world_size = self._rank_and_world_size()
        workers = self.config.num_workers
        return DataLoader(
            CatchDataErrors(dataset),
            batch_size=None,  # the dataset makes whole micro-batches
            sampler=BatchPositions(self.config.micro_batch_size, count, rank, world_size, first),
            collate_fn=_unchanged,
            num_workers=workers,
            worker_init_fn=_prepare_worker,
            prefetch_factor=self.config.prefetch_factor if workers else None,
            pin_memory=self.config.pin_memory and torch.cuda.is_available(),
        )

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def _unchanged(batch: Any) -> Any:
    return batch


def _prepare_worker(number: int) -> None:
    """Exclude the libraries' objects from garbage collection, which would take a third of the time to read captions."""
    gc.freeze()
