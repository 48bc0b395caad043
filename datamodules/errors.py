"""Errors of samples, shards and data sets."""


class DataError(Exception):
    """The data cannot be used as configured, and the run must stop."""


class ShardError(DataError):
    """A shard, or a pattern of shards, cannot be used."""


class SampleError(Exception):
    """One sample cannot be used. It is counted, logged and replaced by another one of its source.

    Args:
        reason: short machine-readable name by which samples are counted, e.g. `unreadable_image`.
        shard: file name of the shard.
        key: the sample's key in the shard.
        detail: the value found and what is allowed.
    """

    filtered = False

    def __init__(self, reason: str, shard: str, key: str, detail: str = ""):
        super().__init__(reason, shard, key, detail)
        self.reason, self.shard, self.key, self.detail = reason, shard, key, detail

    def __str__(self) -> str:
        text = f"{self.shard}, sample '{self.key}': {self.reason}" + (f" ({self.detail})" if self.detail else "")
        return printable(text)


class FilteredSample(SampleError):
    """A valid sample that the configuration excludes, e.g. because it is too long or too small."""

    filtered = True


def printable(text: str) -> str:
    """Escape control characters, so that names and captions from data cannot control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
