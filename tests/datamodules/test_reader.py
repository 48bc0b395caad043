"""Reading in order: one global sequence on any ranks and workers, from a disk or a store, with faults and bounds."""

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from torch.utils.data import DataLoader

from datamodules.alignment import AlignmentData, AlignmentDataConfig
from datamodules.data_config import Source
from datamodules.errors import ShardError
from datamodules.mixture import BatchPositions
from datamodules.remote import STORES, RemoteConfig
from datamodules.shards import LISTING, list_shards
from tests.datamodules import worlds
from tests.lightning_modules.processes import run_together

SAMPLES, SHARDS = 260, 26
# Four lanes with windows of three shards of ten samples and blocks of about twelve.
SETTINGS = {"lanes": 4, "lane_rows": 2, "window": 3, "block": 12, "micro_batch_size": 4}


@pytest.fixture
def remote(tmp_path) -> RemoteConfig:
    return RemoteConfig(["http", "memory"], spool_folder=str(tmp_path / "spool"), retries=2, pause=0.01, timeout=20)


@pytest.fixture
def make(tiny_tokenizer) -> Callable[..., AlignmentData]:
    def build(pattern: str, **options) -> AlignmentData:
        config = AlignmentDataConfig(**{"captions": Source(pattern), **SETTINGS, **options})
        module = AlignmentData(config, worlds.encoder(tiny_tokenizer), worlds.clip())
        module.setup()
        return module

    return build


def read(module: AlignmentData, positions) -> list[str]:
    return [name.partition("/")[2] for name in module.train_dataset[list(positions)].report.samples]


def sequence(module: AlignmentData, steps: range, ranks: int = 1, workers: int = 0) -> list[str]:
    """What all ranks read in these micro-batches, each rank by a loader of its own."""
    size, loaders = module.config.micro_batch_size, []
    for rank in range(ranks):
        positions = BatchPositions(size // ranks, steps.stop, rank, ranks, lambda: steps.start)
        loaders.append(DataLoader(module.train_dataset, None, sampler=positions, num_workers=workers))
    batches = zip(*loaders, strict=True)
    return [name.partition("/")[2] for step in batches for batch in step for name in batch.report.samples]


def test_one_global_sequence_on_any_ranks_and_workers(server, make):
    """1 × 0, 2 × 2 ranks × workers; 70 steps of four rows are one epoch and a part of the next."""
    steps = range(70)
    whole = sequence(make(str(server.folder)), steps)
    counts = Counter(whole)
    assert set(counts) == {f"c{i:05d}" for i in range(SAMPLES)} and max(counts.values()) == 2
    assert sequence(make(str(server.folder)), steps, 2, 2) == whole
    # and from the middle of a window, on yet another layout
    assert sequence(make(str(server.folder)), range(33, 70), 4, 1) == whole[33 * 4 :]


def test_a_store_is_read_as_a_disk_is(server, make, remote):
    """Also where names are to be quoted, and any store of fsspec."""
    for number, name in enumerate(("a b.tar", "50%20.tar", "a#b.tar", "ü.tar")):
        (server.folder / f"captions-{number:06d}.tar").rename(server.folder / name)
        listing = server.folder / LISTING
        listing.write_text(listing.read_text().replace(f"captions-{number:06d}.tar", name))
    ours, reference = make(server.address, remote=remote), make(str(server.folder))
    assert ours.identity() == reference.identity()
    for begin in range(0, SAMPLES, 20):
        assert read(ours, range(begin, begin + 20)) == read(reference, range(begin, begin + 20))
    assert len(list_shards(f"{server.address}/a%20b.tar", remote)) == 10
    memory = fsspec.filesystem("memory")
    try:
        for path in server.folder.iterdir():
            memory.pipe(f"/set/{path.name}", path.read_bytes())
        assert read(make("memory://set/*.tar", remote=remote), range(20)) == read(reference, range(20))
    finally:
        memory.store.clear()


def test_each_shard_is_asked_for_once_and_the_disk_is_bounded(server, make, remote, tmp_path):
    """Lanes share the shards at their borders; next windows are fetched ahead."""
    module, most = make(server.address, remote=remote), 0
    for begin in range(0, SAMPLES - 20, 4):
        read(module, range(begin, begin + 4))
        most = max(most, len(list((tmp_path / "spool").rglob("*.tar"))))
    assert most <= 2 * SETTINGS["window"] * SETTINGS["lanes"]
    asked = Counter(server.shards())
    assert len(asked) == SHARDS
    assert server.requests.count(f"/{LISTING}") == 1
    # The next epoch's first windows are fetched ahead when the last ones begin.
    assert asked.total() <= SHARDS + SETTINGS["window"] * SETTINGS["lanes"]


def test_a_process_leaves_no_spool(server, make, remote, tmp_path):
    """A worker removes its own, and the next process that of one that was killed, and reads on as if nothing was."""
    assert len(sequence(make(server.address, remote=remote), range(10), workers=2)) == 40

    def read_and_die() -> None:
        read(make(server.address, remote=remote), range(40))
        os.kill(os.getpid(), signal.SIGKILL)

    assert run_together(1, read_and_die, tmp_path / "log") == [-signal.SIGKILL]
    (abandoned,) = (tmp_path / "spool").iterdir()
    os.utime(abandoned / "lock", (1, 1))  # a new one may not be locked yet
    again = read(make(server.address, remote=remote), range(40, 80))
    assert not abandoned.exists() and again == read(make(str(server.folder)), range(40, 80))


def test_a_failing_store_costs_nothing_but_time(server, make, remote):
    server.fails = lambda path, number: path.endswith("0.tar") and number == 1
    server.stalls = lambda path, number: path.endswith("3.tar") and number == 1
    remote.timeout = 1
    ours, reference = make(server.address, remote=remote), make(str(server.folder))
    for begin in range(0, 120, 20):
        batch = ours.train_dataset[range(begin, begin + 20)]
        assert batch.report.errors == []
        assert batch.report.samples == reference.train_dataset[range(begin, begin + 20)].report.samples


@pytest.mark.parametrize("fault", ["absent", "unreachable", "shorter", "longer"])
def test_a_shard_that_cannot_be_fetched_is_counted(server, make, remote, fault):
    shard, name = server.folder / "captions-000004.tar", "/captions-000004.tar"
    listed = shard.read_bytes()
    if fault == "absent":
        shard.unlink()
    elif fault == "unreachable":
        server.fails = lambda path, number: path == name
    else:
        shard.write_bytes(listed[:-1024] if fault == "shorter" else listed + bytes(512))
    module = make(server.address, remote=remote)
    errors = [
        error
        for begin in range(0, SAMPLES, 20)
        for error in module.train_dataset[range(begin, begin + 20)].report.errors
    ]
    assert {error.reason for error in errors} == {"unreachable_shard"}
    assert len({error.key for error in errors}) == SAMPLES // SHARDS
    assert {error.shard for error in errors} == {"captions-000004.tar"}


def test_bad_samples_are_replaced_inside_their_block(tmp_path, make):
    groups = [(f"k{i:03d}", {"txt": b"a dog" if i % 5 else b"", "png": worlds.png(i)}) for i in range(100)]
    for number in range(10):
        worlds.write_members(tmp_path / f"{number}.tar", groups[10 * number : 10 * number + 10], listed=False)
    worlds.index(tmp_path)
    module = make(str(tmp_path))
    source = module.train_dataset.builders[0].source
    for position in range(100):
        report = module.train_dataset[[position]].report
        draw = module.train_dataset.order(position)
        block, _ = source.order(draw.lane, draw.row)
        shards = {source.names[part.shard] for part in block.slices}
        assert report.samples[0].partition("/")[0] in shards
        assert {error.shard for error in report.errors} <= shards
        assert all(error.reason == "empty_caption" for error in report.errors)
    seen = {error.key for position in range(100) for error in module.train_dataset[[position]].report.errors}
    assert seen == {key for key, members in groups if not members["txt"]}


def test_a_block_without_a_usable_sample_is_replaced_by_the_next(tmp_path, make):
    """Shards of one sample and windows of one shard: a block is one sample."""
    samples = worlds.captions(40)
    folder = Path(worlds.write(tmp_path, "c", samples, per_shard=1)).parent
    broken = [folder / f"c-{number:06d}.tar" for number in (3, 4, 20)]
    for path in broken:
        path.write_bytes(path.read_bytes().replace(b"a small dog", b"\xff small dog"))
    module = make(str(folder), lanes=2, window=1, block=1)
    batches = [module.train_dataset[range(begin, begin + 4)] for begin in range(0, 40, 4)]
    read = Counter(name.partition("/")[2] for batch in batches for name in batch.report.samples)
    assert {key for key in read} == {sample.key for number, sample in enumerate(samples) if number not in (3, 4, 20)}
    assert {error.reason for batch in batches for error in batch.report.errors} == {"not_utf8"}


def test_a_spool_folder_that_cannot_be_written_stops_the_run(server, make, remote, tmp_path):
    (tmp_path / "file").write_text("")
    remote.spool_folder = str(tmp_path / "file" / "spool")
    with pytest.raises(ShardError, match=r"data\.remote\.spool_folder must be a folder"):
        read(make(server.address, remote=remote), range(4))


def test_a_full_disk_stops_the_run(server, make, remote):
    """A shard without room is no shard that is missing: its samples must not be dropped."""
    module = make(server.address, remote=remote)
    store = module.train_dataset.builders[0].source.spool.store
    with pytest.raises(ShardError, match=r"No space left on device.*data\.remote\.spool_folder"):
        store.get(f"{server.address}/captions-000000.tar", Path("/dev/full"))


def test_a_shard_of_more_samples_than_listed_is_named(tmp_path, make, caplog):
    pattern = worlds.write(tmp_path, "c", worlds.captions(40), per_shard=10)
    listing = tmp_path / LISTING
    listing.write_text(listing.read_text().replace('"samples": 10', '"samples": 7', 1))
    module = make(pattern)
    assert len({key for key in read(module, range(74))}) == 37
    assert "c-000000.tar' holds more than the 7 samples that are listed" in caplog.text


def test_what_is_not_there_is_named(server, remote):
    for name in ("nowhere.tar", "captions-{000000..000027}.tar", "x-*.tar"):
        with pytest.raises(ShardError, match=r"is not listed in|no shard at"):
            list_shards(f"{server.address}/{name}", remote)
    with pytest.raises(ShardError, match=r"no 'http://.*/elsewhere/shards\.json'"):
        list_shards(f"{server.address}/elsewhere/a.tar", remote)
    (server.folder / LISTING).write_text("{}")
    with pytest.raises(ShardError, match="is not a list of shards"):
        list_shards(server.address, remote)


def test_a_store_whose_package_is_missing_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ShardError, match="need another package"):
        list_shards("s3://bucket/a.tar", RemoteConfig(["s3"]))


def test_nothing_but_what_is_allowed_is_opened_also_from_a_listing(tmp_path):
    """Patterns are in bad_inputs.py, too."""
    marker, listing = tmp_path / "marker", tmp_path / "listing.json"
    urls = "pipe:touch MARKER", "http://example.org/a.tar", "simplecache::memory://a.tar", "memory://a | touch MARKER"
    for url in (url.replace("MARKER", str(marker)) for url in urls):
        listing.write_text(json.dumps({"shards": [{"name": url, "samples": 1, "bytes": 512}]}))
        for pattern in (url, str(listing)):
            with pytest.raises(ShardError, match="not a local path"):
                list_shards(pattern, RemoteConfig(["memory", "https"]))
    assert not marker.exists()


def test_only_stores_can_be_allowed():
    for protocol in ["pipe", "file", "reference", "ssh", "zip"]:
        assert protocol not in STORES
        with pytest.raises(ValueError, match=f"'{protocol}' is not allowed"):
            RemoteConfig([protocol])
        with pytest.raises(ValueError, match=f"'{protocol}' is not allowed"):
            RemoteConfig(options={protocol: {}})
