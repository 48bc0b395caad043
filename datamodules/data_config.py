"""Configuration of data that all stages share. The stages' configurations extend `DataConfig`."""

from dataclasses import dataclass, field, fields, replace
from typing import Literal, Self

from datamodules.images import Limits
from datamodules.remote import RemoteConfig

Precision = Literal["float32", "bfloat16", "float16"]
CACHED = "cached_"  # prefix of the keys that enable a cache


@dataclass
class Source:
    """Shards of one kind of sample."""

    shards: str = ""
    """Folder, path, glob, brace list or URL (see `remote`) of tars, or a shards.json; empty: the source is not used."""
    weight: int = 1
    """Integer share of the mixture; 0: the source is not used."""
    validation: str = ""
    """Held-out shards of the same kind; empty: none."""

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"weight={self.weight} of shards '{self.shards}' must be at least 0.")


@dataclass
class DataConfig:
    """Data of any stage."""

    micro_batch_size: int = 16
    """Rows that one device processes at a time."""
    seed: int = 0
    """Seed of the order of samples and of random choices within them."""
    mixing: Literal["per_sample", "per_batch"] = "per_sample"
    """Draw a source for each row, or for each whole micro-batch (released code, stage 3)."""
    weights_of: Literal["samples", "tokens"] = "samples"
    """Whether weights are shares of rows or of tokens without padding (the mean length of rows is measured)."""
    lanes: int = 8
    """Parts of the order that are read in parallel; should be a multiple of ranks × workers. Fixed for a run."""
    lane_rows: int = 16
    """Consecutive rows of one lane; micro_batch_size should be a multiple. Fixed for a run."""
    window: int = 8
    """Shards that a lane mixes at a time. Fixed for a run."""
    block: int = 4096
    """Approximate number of samples that are shuffled together. Fixed for a run."""
    num_workers: int = 0
    """Loader processes per training process; 0 reads in the training process."""
    prefetch_factor: int = 2
    """Batches that each worker prepares ahead."""
    pin_memory: bool = True
    """Use page-locked memory for faster copies to the GPU; ignored without a GPU."""
    validation_samples: int = 256
    """Rows of each validation, over all ranks."""
    validation_sources: list[str] | None = None
    """Sources whose held-out shards are used for validation; null: all sources in use that have some."""
    max_bad_share: float = 0.01
    """The run stops if a larger share of samples is unusable (0 … 1)."""
    min_bad_count: int = 20
    """Fewer unusable samples than this never stop a run."""
    accept_changed_data: bool = False
    """Resume even if seed, mixture or shards differ from the checkpoint's."""
    limits: Limits = field(default_factory=Limits)
    """Upper limits for one sample."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    """Object stores that shards may be read from."""

    def __post_init__(self):
        for name, allowed in (("mixing", ("per_sample", "per_batch")), ("weights_of", ("samples", "tokens"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}='{getattr(self, name)}' must be {' or '.join(allowed)}.")
        least_one = ("micro_batch_size", "prefetch_factor", "validation_samples", "min_bad_count")
        for name in (*least_one, "lanes", "lane_rows", "window", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers} must be at least 0.")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share={self.max_bad_share} must lie in 0 … 1.")

    def without_caches(self) -> Self:
        """Return a copy that reads no caches."""
        return replace(self, **{item.name: None for item in fields(self) if item.name.startswith(CACHED)})
