"""Shards behind URLs: allowed by the configuration alone, read by ranges, retried, counted when unreachable."""

import os
import pickle
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from torch.utils.data import DataLoader

from datamodules.alignment import AlignmentData, AlignmentDataConfig
from datamodules.data_config import Source
from datamodules.errors import SampleError, ShardError
from datamodules.storage.indexed_shards import IndexedShards
from datamodules.storage.remote import STORES, RemoteConfig
from tests.datamodules import worlds


@dataclass
class Server:
    """A web server over a folder that answers range requests, counts them, and fails when it is told to."""

    folder: Path
    address: str = ""
    ranges: bool = True
    failures: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append((request.path, request.headers.get("Range", "")))
        file = self.folder / request.path.lstrip("/")
        if self.failures > 0 and request.command == "GET":
            self.failures -= 1
            return request.send_error(503)
        if not file.is_file():
            return request.send_error(404)
        content, status = file.read_bytes(), 200
        if self.ranges and "Range" in request.headers:
            begin, end = request.headers["Range"].removeprefix("bytes=").split("-")
            content, status = content[int(begin) : int(end) + 1], 206
        request.send_response(status)
        request.send_header("Content-Length", str(len(content)))
        request.send_header("ETag", f'"{file.stat().st_mtime_ns}"')
        if self.ranges:
            request.send_header("Accept-Ranges", "bytes")
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content)


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    server = Server(tmp_path / "served")
    server.folder.mkdir()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            server.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        server.address = f"http://127.0.0.1:{listening.server_address[1]}"
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield server
        listening.shutdown()


@pytest.fixture
def remote(tmp_path) -> RemoteConfig:
    return RemoteConfig(["http", "memory"], index_folder=str(tmp_path / "indexes"), retries=2, pause=0.01, timeout=20)


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


def test_a_set_is_read_as_from_the_disk(server, remote):
    local = IndexedShards(worlds.write(server.folder, "captions", worlds.captions(20)))
    shards = IndexedShards(f"{server.address}/captions-{{000000..000002}}.tar", remote=remote)
    assert len(shards) == 20 and shards.identity == local.identity
    assert [shards.read(i) for i in (19, 0, 8)] == [local.read(i) for i in (19, 0, 8)]
    # of the shards themselves only ranges were asked for, and nothing about them: the manifest says it
    tars = [header for path, header in server.requests if path.endswith(".tar")]
    assert len(tars) == 3 and all(header.startswith("bytes=") for header in tars)


def test_a_foreign_shard_is_walked_through_once(server, remote, tmp_path):
    groups = [(f"{i:09d}", {"jpg": os.urandom(90_000), "txt": b"a dog"}) for i in range(120)]
    worlds.write_members(server.folder / "00000.tar", groups)
    url = f"{server.address}/00000.tar"
    assert IndexedShards(url, remote=remote)[77] == groups[77][1]
    walked = len(server.requests)
    assert walked < 15  # blocks of megabytes, not a request for each of 240 headers
    assert len(IndexedShards(url, remote=remote)) == 120
    assert [path for path, _ in server.requests[walked:]] == ["/00000.tar"]  # its size and tag alone
    worlds.write_members(server.folder / "00000.tar", [("k", {"txt": b"another"})])
    assert IndexedShards(url, remote=remote)[0] == {"txt": b"another"}  # another tag: walked through anew


def test_stores_that_list_take_globs(memory, remote):
    for number, texts in enumerate((worlds.texts(3), worlds.texts(2))):
        memory.pipe(f"/set/{number:05d}.tar", tar_bytes([(s.key, s.encode()) for s in texts]))
    shards = IndexedShards("memory://set/*.tar", remote=remote)
    assert len(shards) == 5 and shards.read(3)[:2] == ("00001.tar", "t00000")
    with pytest.raises(ShardError, match=r"no shard at 'memory://set/x\*"):
        IndexedShards("memory://set/x*.tar", remote=remote)


def tar_bytes(groups: list) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return Path(worlds.write_members(Path(folder) / "a.tar", groups)).read_bytes()


def test_a_batch_is_asked_for_at_once(server, remote):
    pattern = f"{server.address}/captions-{{000000..000002}}.tar"
    worlds.write(server.folder, "captions", worlds.captions(20))
    shards = IndexedShards(pattern, remote=remote)
    shards.prefetch([3, 17, 3, 9])
    asked = len(server.requests)
    assert [shards.read(i)[1] for i in (3, 17, 9)] == ["c00003", "c00017", "c00009"]
    assert len(server.requests) == asked
    shards.read(3)
    assert len(server.requests) == asked + 1


def test_failures_are_retried_and_then_counted(server, remote):
    worlds.write(server.folder, "text", worlds.texts(4))
    shards = IndexedShards(f"{server.address}/text-000000.tar", remote=remote)
    server.failures = 2
    assert shards.read(1)[1] == "t00001"
    server.failures = 9
    with pytest.raises(SampleError, match="unreachable_shard") as caught:
        shards.read(2)
    assert server.failures == 6 and caught.value.shard == "text-000000.tar"
    (server.folder / "text-000000.tar").unlink()
    server.failures = 0
    shards.prefetch([3])
    with pytest.raises(SampleError, match="unreachable_shard"):
        shards.read(3)


def test_a_local_shard_that_goes_away_is_counted(tmp_path):
    shards = IndexedShards(worlds.write(tmp_path, "text", worlds.texts(4)))
    (tmp_path / "text-000000.tar").unlink()
    with pytest.raises(SampleError, match="unreachable_shard"):
        shards.read(2)


def test_a_server_without_ranges_is_refused(server, remote):
    server.ranges = False
    worlds.write_members(server.folder / "00000.tar", [("k", {"jpg": os.urandom(9_000_000), "txt": b"a dog"})])
    with pytest.raises(ShardError, match="range requests"):
        IndexedShards(f"{server.address}/00000.tar", remote=remote)


@pytest.mark.parametrize("name", ["nowhere.tar", "text-{000000..000001}.tar", "*.tar"])
def test_what_is_not_there_is_named(server, remote, name):
    worlds.write(server.folder, "text", worlds.texts(4))
    with pytest.raises(ShardError) as caught:
        IndexedShards(f"{server.address}/{name}", remote=remote)
    assert ("lists nothing" if "*" in name else "no shard at") in str(caught.value)


@pytest.mark.parametrize("pattern", ["s3://bucket/a.tar", "gs://bucket/a.tar"])
def test_a_store_whose_package_is_missing_says_so(pattern, tmp_path):
    config = RemoteConfig(["s3", "gs"], index_folder=str(tmp_path))
    try:
        fsspec.filesystem(pattern[:2])
    except ImportError:
        with pytest.raises(ShardError, match="need another package"):
            IndexedShards(pattern, remote=config)
    else:
        pytest.skip("the package is installed and would look for the network")


@pytest.mark.parametrize(
    "pattern",
    [
        "pipe:touch {marker}",
        "http://example.org/a.tar",
        "simplecache::memory://a.tar",
        "memory://a.tar | touch {marker}",
    ],
)
def test_nothing_but_what_is_allowed_is_opened(tmp_path, pattern):
    marker = tmp_path / "marker"
    with pytest.raises(ShardError, match="not a local path"):
        IndexedShards(pattern.format(marker=marker), remote=RemoteConfig(["memory", "https"]))
    assert not marker.exists()


@pytest.mark.parametrize("protocol", ["pipe", "file", "reference", "ssh", "zip"])
def test_only_stores_can_be_allowed(protocol):
    assert protocol not in STORES
    with pytest.raises(ValueError, match=f"'{protocol}' is not allowed"):
        RemoteConfig([protocol])
    with pytest.raises(ValueError, match=f"'{protocol}' is not allowed"):
        RemoteConfig(options={protocol: {}})


@pytest.mark.parametrize("key, value", [("retries", -1), ("pause", -1), ("timeout", 0), ("connections", 0)])
def test_values_are_checked(key, value):
    with pytest.raises(ValueError, match=f"remote.{key}={value}"):
        RemoteConfig(**{key: value})


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_open_their_own_connections(server, remote, context, tiny_tokenizer):
    worlds.write(server.folder, "captions", worlds.captions(20))
    shards = IndexedShards(f"{server.address}/captions-{{000000..000002}}.tar", remote=remote)
    first = shards[0]  # the parent's connection is open when the workers start
    loader = DataLoader(shards, batch_size=None, num_workers=2, multiprocessing_context=context, sampler=range(20))
    texts = [members["txt"] for members in loader]
    assert texts == [f"a small dog number {i}".encode() for i in range(20)] and first["txt"] == texts[0]
    assert pickle.loads(pickle.dumps(shards))[0] == first


def test_stage_2_from_a_store_is_stage_2_from_a_disk(server, remote, tiny_tokenizer):
    pattern = worlds.write(server.folder, "captions", worlds.captions(20))
    url = f"{server.address}/captions-{{000000..000002}}.tar"

    def batch(shards: str):
        config = AlignmentDataConfig(captions=Source(shards), remote=remote)
        module = AlignmentData(config, worlds.encoder(tiny_tokenizer), worlds.clip_tokenize)
        module.setup()
        return module.train_dataset[range(12)]

    ours, reference = batch(url), batch(pattern)
    assert ours.report.samples == reference.report.samples
    assert ours.prompt.ids.equal(reference.prompt.ids)
