"""Every bad input of the list among good samples: what training drops is what was injected, no good sample is lost, and
`kosmosg data check` counts the same."""

import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from datamodules.checks.check import CheckConfig, check
from datamodules.data_config import Source
from datamodules.errors import ShardError
from datamodules.images import Limits
from datamodules.instruction import InstructionData, InstructionDataConfig
from datamodules.language_modelling import LanguageModellingData, LanguageModellingDataConfig
from datamodules.shards import LISTING
from kosmosg.image_processing import TargetTransform
from tests.conftest import REPOSITORY
from tests.datamodules import worlds
from tests.datamodules.bad_inputs import BAD_INPUTS, DROPPED, FILTERED, REFUSED, USED, BadInput, table

ALL = [bad for inputs in BAD_INPUTS.values() for bad in inputs]
MAKE = {
    "caption": worlds.captions,
    "edit": worlds.edits,
    "constructed": worlds.constructed,
    "text": worlds.texts,
    "interleaved": worlds.interleaved,
}
NAMES = {"caption": "captions"}
GOOD = 8
LARGEST, MOST_MEMORY = 120_000, 150_000_000


@contextmanager
def memory_bounded(most: int) -> Iterator[None]:
    """Fails if the process's peak of resident memory grows by more than `most` bytes."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is there now
    except OSError:
        pytest.skip("the kernel does not tell peaks of memory")

    def peak() -> int:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])

    before = peak()
    yield
    assert peak() - before < most


def add(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    for suffix, content in members.items():
        worlds.add(tar, f"{key}.{suffix}", content)


def write_shard(bad: BadInput, folder: Path, marker: Path) -> str:
    """Good samples with the bad one in their middle, or at the end where nothing behind it can be read."""
    good = MAKE[bad.kind](GOOD)
    if bad.during or bad.two:
        return worlds.write(folder, "set", MAKE[bad.kind](2 * GOOD), per_shard=GOOD)
    if bad.spoil is not None:
        return worlds.write(folder, "set", good, per_shard=GOOD)
    folder.mkdir()
    with tarfile.open(folder / "set-000000.tar", "w") as tar:
        for number, sample in enumerate(good):
            if number == GOOD // 2 and not bad.last:
                inject(bad, tar, marker)
            add(tar, sample.key, sample.encode())
        if bad.last:
            inject(bad, tar, marker)
    worlds.index(folder)
    return str(folder / "set-*.tar")


def inject(bad: BadInput, tar: tarfile.TarFile, marker: Path) -> None:
    if bad.entries is not None:
        bad.entries(tar)
    elif bad.members is not None:
        add(tar, bad.key, bad.members | (bad.marker(marker) if bad.marker else {}))


def open_source(kind: str, pattern: str, tokenizer: Path):
    source, encoder = Source(pattern), worlds.encoder(tokenizer)
    if kind in ("text", "interleaved"):
        config = LanguageModellingDataConfig(**{kind: source}, sequence_length=64, max_bad_share=1.0)
        module = LanguageModellingData(config, encoder)
    else:
        config = InstructionDataConfig(**{NAMES.get(kind, kind): source}, min_image_side=0, max_bad_share=1.0)
        module = InstructionData(config, encoder, TargetTransform(worlds.SIDE))
    config.limits.max_member_bytes = LARGEST
    module.setup()
    module.measure()
    return module


def epoch(module) -> set[str]:
    """Reads an epoch, or so many packed rows that one begins in every sample; the samples that rows begin in."""
    seen: set[str] = set()
    samples = len(module.train_dataset.builders[0].source.shards)
    for position in range(samples * (8 if isinstance(module, LanguageModellingData) else 1)):
        report = module.train_dataset[[position]].report
        module.counter.add(report)
        seen |= set(report.samples)
    return seen


def test_what_is_dropped_is_what_was_injected(subtests, tmp_path, tiny_tokenizer):
    for number, bad in enumerate(ALL):
        (tmp_path / str(number)).mkdir()
        with subtests.test(bad.name):
            read_with(bad, tmp_path / str(number), tiny_tokenizer)


def read_with(bad: BadInput, tmp_path: Path, tiny_tokenizer: Path) -> None:
    marker, folder = tmp_path / "marker", tmp_path / "shards"
    pattern = write_shard(bad, folder, marker)
    shard = folder / "set-000000.tar"
    if bad.spoil is not None and not bad.during:
        pattern = bad.spoil(shard, marker) or pattern
        if "before it was listed" in bad.name:
            (folder / LISTING).unlink()
            worlds.index(folder)
    with memory_bounded(MOST_MEMORY):
        if bad.way == REFUSED:
            with pytest.raises(ShardError, match=re.escape(bad.reason)):
                epoch(open_source(bad.kind, pattern, tiny_tokenizer))
        else:
            module = open_source(bad.kind, pattern, tiny_tokenizer)
            if bad.during:
                bad.spoil(shard, marker)
            read_epoch(bad, module)
    if bad.way != REFUSED and not bad.during:
        found = check(pattern, CheckConfig(kind=bad.kind, processes=1, limits=Limits(max_member_bytes=LARGEST)))
        assert found.dropped == ({bad.reason: bad.count} if bad.way == DROPPED else {})
    assert not marker.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"shards"}  # nothing was written elsewhere


def read_epoch(bad: BadInput, module) -> None:
    seen = epoch(module)
    counts = {bad.reason: bad.count}
    assert module.counter.dropped == (counts if bad.way == DROPPED else {})
    assert module.counter.filtered == (counts if bad.way == FILTERED else {})
    good = {sample.key for sample in MAKE[bad.kind](2 * GOOD if bad.during or bad.two else GOOD)}
    keys = {name.partition("/")[2] for name in seen}
    lost = bad.count if bad.spoil is not None and bad.way == DROPPED else 0
    assert len(good & keys) == len(good) - lost
    if bad.spoil is None:
        assert bool(keys - good) == (bad.way == USED)


def test_the_documented_table_is_this_list():
    assert len(ALL) == len({bad.name for bad in ALL})
    assert table() in (REPOSITORY / "docs" / "reading.md").read_text(encoding="utf-8")
