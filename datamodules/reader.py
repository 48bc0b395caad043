"""Samples by their place in the order: block after block, each located by walking on through its shards.

What is kept of a block is where its samples lie, 48 bytes each; their content is read when it is asked for.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from datamodules.errors import SampleError, ShardError
from datamodules.images import Limits
from datamodules.order import Block, SampleOrder, shuffled
from datamodules.remote import Spool
from datamodules.sample import CaptionSample, Sample, decode
from datamodules.shards import ShardList
from datamodules.tar import GZIP, Group, OpenFiles, Tar

logger = logging.getLogger(__name__)

KEPT_EPOCHS = 3


class Located(NamedTuple):
    """Where a sample is: shard number and number in the shard; its group, None if the shard does not hold it."""

    shard: int
    number: int
    group: Group | None


class SampleReader:
    """The samples of one kind in some shards, by lane and number. Safe to share with forked and spawned workers.

    Args:
        shards: where they are.
        order: which sample comes when.
        kind: of all samples.
        suffixes: tar members to read; None reads all.
    """

    def __init__(
        self,
        shards: ShardList,
        order: SampleOrder,
        kind: str,
        limits: Limits,
        suffixes: frozenset[str] | None = None,
    ):
        self.shards, self.order, self.kind, self.limits, self.suffixes = shards, order, kind, limits, suffixes
        self.names = [url.partition("?")[0].rpartition("/")[2] for url in shards.urls]
        self.spool = None if shards.store is None else Spool(shards.store, shards.urls, shards.bytes)
        self._forget()

    def __call__(self, lane: int, number: int, attempt: int = 0) -> Sample:
        """Sample `number` of a lane, images still encoded.

        Args:
            attempt: above 0, the sample so many places further, in place of an unusable one: in the same block, and
                when all of that were tried, in the next.

        Raises:
            SampleError: it cannot be used.
            ShardError: a shard is not the one that was listed.
        """
        located = self.locate(lane, number, attempt)
        key, members = self.members(located)
        return decode(members, self.names[located.shard], key, kind=self.kind, limits=self.limits)

    def caption(self, lane: int, number: int, attempt: int = 0) -> Sample:
        """The same without its image, where that is quicker."""
        located = self.locate(lane, number, attempt)
        found = located.group and self._tar(located.shard).read_text(located.group, self.limits)
        if not found:
            return self(lane, number, attempt)
        key, content = found
        try:
            caption = content.decode("utf-8").strip()
        except UnicodeDecodeError:
            caption = ""
        name = self.names[located.shard]
        # What is not plainly a caption is left to `decode`, which names what is wrong.
        return CaptionSample(caption, None, key, name) if caption else decode({"txt": content}, name, key)

    def locate(self, lane: int, number: int, attempt: int = 0) -> Located:
        """Where a sample is. Raises ShardError: a shard is not the one that was listed."""
        block, place = self.order(lane, number)
        while attempt >= len(block) and not self.order.one_block:
            attempt -= len(block)
            number += len(block) - place
            block, place = self.order(lane, number)
        rows = self._rows(lane, block)
        shard, inside, begin, end, text, size = rows[(place + attempt) % len(rows)].tolist()
        return Located(shard, inside, Group(begin, end, text, size) if begin >= 0 else None)

    def members(self, located: Located) -> tuple[str, dict[str, bytes]]:
        """Key and members of a located sample. Raises SampleError: it cannot be read."""
        if located.group is None:
            reason, detail = self._lost[located.shard]
            raise SampleError(reason, self.names[located.shard], f"number {located.number}", detail)
        return self._tar(located.shard).read(located.group.begin, located.group.end, self.limits, self.suffixes)

    def _rows(self, lane: int, block: Block) -> np.ndarray:
        """int64 N×6 of a block in its shuffled order: shard, number, and the group or -1."""
        # A full shuffle is shared by all lanes, which may be in two epochs.
        place = block.key if self.order.one_block else lane
        if (found := self._blocks.get(place)) and found[0] == block.key:
            return found[1]
        if not self.order.one_block:
            rows = self._located(lane, block)
        else:
            rows = self._all = self._located(-1, block) if self._all is None else self._all
            if len(self._blocks) >= KEPT_EPOCHS:
                self._blocks.pop(next(iter(self._blocks)))
        self._blocks[place] = block.key, rows[shuffled(len(block), *block.key)]
        return self._blocks[place][1]

    def _located(self, lane: int, block: Block) -> np.ndarray:
        """int64 N×6 of a block in the order of its slices."""
        self._enter(lane, block)
        parts = []
        for shard, begin, end in block.slices:
            rows = np.full((end - begin, 6), -1, dtype=np.int64)
            rows[:, 0], rows[:, 1] = shard, np.arange(begin, end)
            groups = self._walk(lane, shard, begin, end)
            if groups:
                rows[: len(groups), 2:] = groups
            parts.append(rows)
        return np.concatenate(parts)

    def _enter(self, lane: int, block: Block) -> None:
        """Let go of what the lane's last window needed, and fetch what this and the next one need."""
        if self._windows.get(lane, (None, None))[0] == block.window:
            return
        self._windows[lane] = block.window, block.following
        for walked in [one for one in self._walks if one[0] == lane and one[1] not in block.window]:
            del self._walks[walked]
        if self.spool is not None:
            now = [shard for window, _ in self._windows.values() for shard in window]
            later = [shard for _, following in self._windows.values() for shard in following]
            for path in self.spool.want([*now, *later]):
                self._files.close(str(path))
            for shard in self._tars.keys() - set(now) - set(later):
                del self._tars[shard]

    def _walk(self, lane: int, shard: int, begin: int, end: int) -> list[Group]:
        """Groups `begin` … `end`-1 of a shard; fewer where it breaks off or cannot be read."""
        at, groups = self._walks.pop((lane, shard), (0, None))
        found: list[Group] = []
        try:
            if groups is None or at > begin:
                self._compare(shard)
                at, groups = 0, self._tar(shard).groups()
            for group in islice(groups, begin - at, end - at):
                found.append(group)
            if end == self.shards.samples[shard] and shard not in self._longer and next(groups, None) is not None:
                self._longer.add(shard)
                logger.warning(
                    "'%s' holds more than the %d samples that are listed, and the others are not read; list it again "
                    "with `kosmosg data index` after deleting its record and its _stats.json",
                    self.shards.urls[shard], end,
                )  # fmt: skip
        except SampleError as error:
            self._lost[shard] = error.reason, f"{error.key}: {error.detail}"
        except OSError as error:
            self._lost[shard] = "unreachable_shard", str(error)
        else:
            if len(found) < end - begin:
                self._lost[shard] = "truncated_tar", f"ends before its {self.shards.samples[shard]} samples"
            self._walks[lane, shard] = end, groups
        return found

    def _compare(self, shard: int) -> None:
        tar, listed = self._tar(shard), int(self.shards.bytes[shard])
        if tar.files.read(tar.path, 0, 2) == GZIP:
            raise SampleError("damaged_tar", tar.name, "", "the file is compressed; decompress it")
        if tar.size > listed:
            raise ShardError(
                f"'{self.shards.urls[shard]}' has {tar.size} bytes but its listing says {listed}: it was written anew. "
                "Write the listing again with `kosmosg data index`, or the whole set."
            )

    def _tar(self, shard: int) -> Tar:
        """Raises OSError: a remote shard cannot be fetched."""
        if shard not in self._tars:
            path = self.shards.urls[shard] if self.spool is None else self.spool.path(shard)
            self._tars[shard] = Tar(path, self._files, self.names[shard])
            while self.spool is None and len(self._tars) > 1024:
                self._tars.popitem(last=False)
        return self._tars[shard]

    def _forget(self) -> None:
        self._files = OpenFiles()
        self._tars: OrderedDict[int, Tar] = OrderedDict()
        self._longer: set[int] = set()
        self._lost: dict[int, tuple[str, str]] = {}
        self._all: np.ndarray | None = None
        self._blocks: dict[Any, tuple[tuple[int, ...], np.ndarray]] = {}
        self._windows: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._walks: dict[tuple[int, int], tuple[int, Iterator[Group]]] = {}

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()
