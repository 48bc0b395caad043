import hashlib
import json
import os
import pickle

import pytest

from datamodules.errors import DataError, SampleError, ShardError
from datamodules.images import Limits, load
from datamodules.sample import TextSample, decode
from datamodules.storage.shards import IndexedShards, ShardWriter
from datamodules.storage.tar_index import ShardIndex, index_path
from tests.datamodules import worlds


def test_what_is_written_is_read_in_any_order(tmp_path):
    shards = IndexedShards(worlds.write(tmp_path, "captions", worlds.captions(20)))
    assert len(shards) == 20
    for i in (19, 0, 8, 7):
        name, key, members = shards.read(i)
        sample = decode(members, name, key)
        assert (name, key) == (f"captions-{i // 8:06d}.tar", f"c{i:05d}")
        assert sample.caption == f"a small dog number {i}" and load(sample.image).getpixel((0, 0)) == (i, 0, 7)
    with pytest.raises(IndexError, match="there are 20"):
        shards[20]


def test_equal_samples_give_equal_bytes(tmp_path):
    for folder in ("a", "b"):
        worlds.write(tmp_path / folder, "edit", worlds.edits(10))
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_manifest_counts_and_checksums(tmp_path):
    worlds.write(tmp_path, "text", worlds.texts(10))
    manifest = json.loads((tmp_path / "text.manifest.json").read_text())
    assert [(shard["name"], shard["samples"]) for shard in manifest["shards"]] == [
        ("text-000000.tar", 8),
        ("text-000001.tar", 2),
    ]
    for shard in manifest["shards"]:
        content = (tmp_path / shard["name"]).read_bytes()
        assert shard["bytes"] == len(content) and shard["sha256"] == hashlib.sha256(content).hexdigest()


def test_an_interrupted_writer_leaves_nothing_partial(tmp_path):
    with pytest.raises(RuntimeError, match="power"), ShardWriter(tmp_path, "text", 4) as writer:
        for sample in worlds.texts(6):
            writer.write(sample)
        raise RuntimeError("power cut")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text-000000.index.npy", "text-000000.tar"]


def test_the_writer_refuses_what_would_not_be_read_back(tmp_path):
    with pytest.raises(ValueError, match="unique"), ShardWriter(tmp_path, "text") as writer:
        writer.write(TextSample("a"), "x")
        writer.write(TextSample("b"), "x")
    with pytest.raises(ValueError, match="no dot"), ShardWriter(tmp_path, "text") as writer:
        writer.write(TextSample("a"), "x.y")
    with pytest.raises(DataError, match="no sample"), ShardWriter(tmp_path, "text"):
        pass
    worlds.write(tmp_path, "text", worlds.texts(1))
    with pytest.raises(FileExistsError, match="already holds 1 shards"):
        ShardWriter(tmp_path, "text")


def test_foreign_tars_are_indexed_once(tmp_path):
    path = tmp_path / "00000.tar"
    groups = [(f"{i:09d}", {"jpg": worlds.png(i), "json": b"{}", "txt": f"a dog {i}".encode()}) for i in range(5)]
    pattern = worlds.write_members(path, groups)
    assert IndexedShards(pattern)[3] == groups[3][1]
    assert len(ShardIndex.read(index_path(path))) == 5
    os.utime(index_path(path), (1, 1))
    assert IndexedShards(pattern).identity == IndexedShards(pattern).identity
    assert index_path(path).stat().st_mtime == 1  # not written again
    worlds.write_members(path, groups[:3])
    assert len(IndexedShards(pattern)) == 3  # another size: indexed anew


def test_long_names_are_read(tmp_path):
    key = "folder/" + "x" * 200
    pattern = worlds.write_members(tmp_path / "a.tar", [("short", {"txt": b"1"}), (key, {"txt": b"2", "json": b"{}"})])
    assert IndexedShards(pattern).read(1) == ("a.tar", key, {"txt": b"2", "json": b"{}"})


def test_unwanted_members_are_not_read(tmp_path):
    members = {"jpg": b"x" * 200_000, "txt": b"a dog"}
    shards = IndexedShards(worlds.write_members(tmp_path / "a.tar", [("k", members)]))
    assert shards.read(0, frozenset(["txt"]))[2] == {"jpg": b"", "txt": b"a dog"}


def test_patterns(tmp_path):
    worlds.write(tmp_path, "text", worlds.texts(20))
    assert len(IndexedShards(str(tmp_path / "text-{000000..000001}.tar"))) == 16
    assert len(IndexedShards(str(tmp_path / "text-000002.tar"))) == 4
    assert len(IndexedShards(str(tmp_path / "text-*.tar"))) == 20


@pytest.mark.parametrize("name", ["text-{000000..000005}.tar", "txt-*.tar", "nowhere/a.tar"])
def test_missing_shards_name_the_pattern_and_what_is_there(tmp_path, name):
    worlds.write(tmp_path, "text", worlds.texts(20))
    with pytest.raises(ShardError) as caught:
        IndexedShards(str(tmp_path / name))
    assert name in str(caught.value)
    assert ("does not exist" if "nowhere" in name else "text-000000.tar") in str(caught.value)


def test_a_shard_that_its_manifest_lists_is_missed(tmp_path):
    pattern = worlds.write(tmp_path, "text", worlds.texts(20))
    (tmp_path / "text-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"text-000001.tar' is in its manifest"):
        IndexedShards(pattern)


@pytest.mark.parametrize("pattern", ["pipe:touch {marker}", "http://example.org/a.tar", "s3://b/a.tar", "cat a.tar |"])
def test_only_local_paths_are_read(tmp_path, pattern):
    marker = tmp_path / "marker"
    with pytest.raises(ShardError, match="not a local path"):
        IndexedShards(pattern.format(marker=marker))
    assert not marker.exists()


def unusable(shards: IndexedShards) -> dict[int, str]:
    found = {}
    for i in range(len(shards)):
        try:
            shards[i]
        except SampleError as error:
            found[i] = error.reason
    return found


@pytest.mark.parametrize("number, missing", [(1, 1), (4, 600), (7, 1100)])
def test_a_truncated_tar_loses_exactly_what_is_cut_off(tmp_path, number, missing):
    pattern = worlds.write(tmp_path, "captions", worlds.captions(8))
    path = tmp_path / "captions-000000.tar"
    ends = IndexedShards(pattern)._bounds[0][:, 1]
    os.truncate(path, int(ends[number]) - 512 - missing)
    assert unusable(IndexedShards(pattern)) == dict.fromkeys(range(number, 8), "truncated_tar")


def test_a_truncated_tar_without_manifest_keeps_what_is_whole(tmp_path):
    groups = [(f"k{i}", {"txt": b"a" * 3000}) for i in range(4)]
    path = tmp_path / "a.tar"
    pattern = worlds.write_members(path, groups)
    os.truncate(path, 9000)  # in the data of the third sample
    assert unusable(IndexedShards(pattern)) == {2: "truncated_tar"}
    os.truncate(path, 7400)  # in its header
    assert unusable(IndexedShards(pattern)) == {2: "truncated_tar"}


def test_a_damaged_header_is_found(tmp_path):
    pattern = worlds.write(tmp_path, "text", worlds.texts(4))
    path = tmp_path / "text-000000.tar"
    begin = int(IndexedShards(pattern)._bounds[0][2, 0])
    content = bytearray(path.read_bytes())
    content[begin + 3] ^= 1
    path.write_bytes(content)
    assert unusable(IndexedShards(pattern)) == {2: "damaged_tar"}


@pytest.mark.parametrize("content", [b"", b"not a tar" * 1000, b"\0" * 10240], ids=["empty", "garbage", "zeros"])
def test_what_is_no_tar_is_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ShardError, match=r"a\.tar"):
        IndexedShards(str(tmp_path / "a.tar"))


def test_a_shard_written_anew_beside_an_old_manifest_is_refused(tmp_path):
    pattern = worlds.write(tmp_path, "text", worlds.texts(2))
    worlds.write_members(tmp_path / "text-000000.tar", [("k", {"txt": b"a" * 50_000})])
    with pytest.raises(ShardError, match="written anew"):
        IndexedShards(pattern)


def test_a_large_member_is_refused_unread(tmp_path):
    pattern = worlds.write_members(tmp_path / "a.tar", [("k", {"txt": b"a" * 2000})])
    shards = IndexedShards(pattern, Limits(max_member_bytes=1000))
    with pytest.raises(SampleError, match="member_too_large"):
        shards[0]


def test_content_decides_the_identity(tmp_path):
    one = IndexedShards(worlds.write(tmp_path / "a", "text", worlds.texts(9)))
    same = IndexedShards(worlds.write(tmp_path / "b", "text", worlds.texts(9)))
    other = IndexedShards(worlds.write(tmp_path / "c", "text", [*worlds.texts(8), TextSample("other")]))
    assert one.identity == same.identity != other.identity


def test_shards_can_be_sent_to_spawned_workers(tmp_path):
    shards = IndexedShards(worlds.write(tmp_path, "text", worlds.texts(3)))
    before = shards[1]
    assert pickle.loads(pickle.dumps(shards))[1] == before
