"""What can go wrong with data, from one sample to the whole set."""


class DataError(Exception):
    """The data cannot be used as configured: the run must stop and somebody must act."""


class ShardError(DataError):
    """A shard or a pattern of shards cannot be read at all."""


class SampleError(Exception):
    """One sample cannot be used; it is counted, logged and replaced by another of the same source.

    Args:
        reason: short machine-readable name, e.g. `unreadable_image`; samples are counted by it.
        shard: file name of the shard.
        key: the sample's key in the shard.
        detail: what was found and what is allowed.
    """

    filtered = False

    def __init__(self, reason: str, shard: str, key: str, detail: str = ""):
        super().__init__(reason, shard, key, detail)
        self.reason, self.shard, self.key, self.detail = reason, shard, key, detail

    def __str__(self) -> str:
        text = f"{self.shard}, sample '{self.key}': {self.reason}" + (f" ({self.detail})" if self.detail else "")
        return printable(text)


class FilteredSample(SampleError):
    """A sound sample that the configuration leaves out (too long, too small): not a fault of the data."""

    filtered = True


def printable(text: str) -> str:
    """Text with control characters escaped: names and captions must not steer the terminal that they are read in."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
