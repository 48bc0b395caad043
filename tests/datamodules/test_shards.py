"""Sets of shards: written, listed, found, indexed, and their samples located as WebDataset groups them."""

import gzip
import hashlib
import json
import re
import tarfile

import pytest
import webdataset

from datamodules.errors import DataError, ShardError
from datamodules.images import load
from datamodules.remote import RemoteConfig
from datamodules.sample import TextSample, decode
from datamodules.shard_writer import ShardWriter
from datamodules.shards import LISTING, index_shard, list_shards
from datamodules.tar import read_shard
from kosmosg.cli import main
from tests.datamodules import worlds


def test_what_is_written_is_read(tmp_path):
    shards = list_shards(worlds.write(tmp_path, "captions", worlds.captions(20)))
    assert len(shards) == 20 and shards.samples.tolist() == [8, 8, 4]
    found = [(path.name, *read) for path in shards.paths for read in read_shard(path)]
    for number, (name, key, members) in enumerate(found):
        sample = decode(members, name, key)
        assert (name, key) == (f"captions-{number // 8:06d}.tar", f"c{number:05d}")
        assert sample.caption == f"a small dog number {number}"
        assert load(sample.image).getpixel((0, 0)) == (number, 0, 7)


def test_the_listing_counts_and_checksums(tmp_path):
    worlds.write(tmp_path, "text", worlds.texts(10))
    worlds.write(tmp_path, "more", worlds.texts(3))  # another set in the same folder
    records = json.loads((tmp_path / LISTING).read_text())["shards"]
    assert [(shard["name"], shard["samples"]) for shard in records] == [
        ("more-000000.tar", 3),
        ("text-000000.tar", 8),
        ("text-000001.tar", 2),
    ]
    for shard in records:
        content = (tmp_path / shard["name"]).read_bytes()
        assert shard["bytes"] == len(content) and shard["sha256"] == hashlib.sha256(content).hexdigest()


def test_an_interrupted_writer_leaves_nothing_partial(tmp_path):
    with pytest.raises(RuntimeError, match="power"), ShardWriter(tmp_path, "text", 4) as writer:
        for sample in worlds.texts(6):
            writer.write(sample)
        raise RuntimeError("power cut")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text-000000.tar"]


def test_the_writer_refuses_what_would_not_be_read_back(tmp_path):
    with pytest.raises(ValueError, match="unique"), ShardWriter(tmp_path, "text") as writer:
        writer.write(TextSample("a"), "x")
        writer.write(TextSample("b"), "x")
    with pytest.raises(ValueError, match="no dot"), ShardWriter(tmp_path, "text") as writer:
        writer.write(TextSample("a"), "x.y")
    with pytest.raises(DataError, match="no sample"), ShardWriter(tmp_path, "text"):
        pass
    with pytest.raises(ValueError, match="plain file name"):
        ShardWriter(tmp_path, "te{x,t}")
    worlds.write(tmp_path, "text", worlds.texts(1))
    with pytest.raises(FileExistsError, match="already holds 1 shards"):
        ShardWriter(tmp_path, "text")


def test_patterns(tmp_path):
    worlds.write(tmp_path, "text", worlds.texts(20))
    counts = {
        "text-{000000..000001}.tar": 16,
        "text-000002.tar": 4,
        "text-*.tar": 20,
        "": 20,
        "**/text-*1.tar": 8,
        LISTING: 20,
    }
    for pattern, count in counts.items():
        assert len(list_shards(str(tmp_path / pattern))) == count


def test_a_set_keeps_its_identity_when_it_moves(tmp_path):
    pattern = worlds.write(tmp_path / "a", "text", worlds.texts(20))
    identity = list_shards(pattern).identity
    (tmp_path / "a").rename(tmp_path / "b")
    assert list_shards(str(tmp_path / "b")).identity == identity
    assert list_shards(str(tmp_path / "b" / "text-000001.tar")).identity != identity


def test_what_the_listing_does_not_know_is_named(tmp_path):
    worlds.write(tmp_path, "text", worlds.texts(3))
    worlds.write_members(tmp_path / "text-000001.tar", [("a", {"txt": b"a"})], listed=False)
    with pytest.raises(ShardError, match=r"text-000001\.tar' is not listed"):
        list_shards(str(tmp_path / "*.tar"))


def test_what_is_no_tar_cannot_be_indexed(tmp_path):
    contents = {"not a readable tar": bytes(range(256)) * 60, "holds no samples": bytes(20_480)}
    for message, content in (contents | {"is compressed": gzip.compress(bytes(10_240))}).items():
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(ShardError, match=message):
            index_shard(str(tmp_path / "a.tar"))


def test_counts_that_cannot_be_are_not_believed(tmp_path):
    for stats in ['{"successes": -5}', '{"successes": Infinity}', "[" * 100_000, '{"successes": 1000000000}', "{}"]:
        worlds.write_members(tmp_path / "a.tar", [(str(i), {"txt": b"a dog"}) for i in range(4)], listed=False)
        (tmp_path / "a_stats.json").write_text(stats)
        assert index_shard(str(tmp_path / "a.tar"))["samples"] == 4


def test_a_listed_shard_that_is_missing_is_named_whatever_the_pattern(tmp_path):
    for folder in ("a", "b"):
        worlds.write(tmp_path / folder, "x", worlds.texts(20))
    patterns = (
        "{a,b}",
        "{a,b}/x-*.tar",
        "*/x-*.tar",
        "**/*.tar",
        "b/**/x-*.tar",
        "b/shards.json",
        "b",
        "b/x-00000?.tar",
    )
    assert [list_shards(str(tmp_path / pattern)).samples.sum() for pattern in patterns] == [40] * 4 + [20] * 4
    (tmp_path / "b" / "x-000001.tar").unlink()
    for pattern in patterns:
        with pytest.raises(ShardError, match=r"b/x-000001\.tar' is listed in .* but is missing"):
            list_shards(str(tmp_path / pattern))


def test_a_folder_is_taken_by_its_name_whatever_is_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("sp ace", "ü文", "a[1]", "50%20", "a#b", "a{b,c}", "st*r"):
        worlds.write(tmp_path / name, "x", worlds.texts(10))
        for pattern in ("", "/x-*.tar", "/x-{000000..000001}.tar", "/x-00000{0,1}.tar", "/shards.json"):
            for folder in (name, f"./{name}", f"~/{name}", str(tmp_path / name)):
                assert list_shards(folder + pattern).samples.tolist() == [8, 2]


EDITED_LISTINGS = [
    ({"samples": -3}, "samples of 'x-000000.tar' is -3; 10240 bytes hold 0 … 20"),
    ({"samples": 10**30}, "10240 bytes hold 0 … 20"),
    ({"samples": True}, "samples of shard 0 is True"),
    ({"bytes": "10240"}, "bytes of shard 0 is '10240'"),
    ({"sha256": None}, "sha256 of shard 0 is None"),
    ({"name": "x-000001.tar"}, "name of shard 1 is 'x-000001.tar'"),
    ({"name": ""}, "name of shard 0 is ''"),
]


def test_a_listing_edited_by_hand_is_refused_and_written_anew_by_index(tmp_path, subtests, capsys):
    worlds.write(tmp_path, "x", worlds.texts(10))
    listing = tmp_path / LISTING
    content = json.loads(listing.read_text())
    for change, message in EDITED_LISTINGS:
        with subtests.test(str(change)):
            first, second = content["shards"]
            listing.write_text(json.dumps(content | {"shards": [first | change, second]}))
            for pattern in (tmp_path, listing):
                with pytest.raises(ShardError, match=re.escape(message)):
                    list_shards(str(pattern))
            assert main(["data", "index", str(tmp_path)]) == 0
            assert message in capsys.readouterr().err and (tmp_path / "shards.json.damaged").is_file()
            assert list_shards(str(tmp_path)).samples.tolist() == [8, 2]


def test_a_listing_of_a_newer_version_is_not_written_over_and_one_is_of_one_place(tmp_path):
    worlds.write(tmp_path, "x", worlds.texts(10))
    listing = json.loads((tmp_path / LISTING).read_text())
    listing["shards"][1]["name"] = "http://example.org/a.tar"
    (tmp_path / "list.json").write_text(json.dumps(listing))
    with pytest.raises(ShardError, match="of several places"):
        list_shards(str(tmp_path / "list.json"), RemoteConfig(["http"]))
    (tmp_path / LISTING).write_text('{"version": 9, "shards": []}')
    assert main(["data", "index", str(tmp_path)]) == 2
    assert json.loads((tmp_path / LISTING).read_text())["version"] == 9


def test_files_without_key_or_suffix_belong_to_no_sample(tmp_path):
    """macOS puts `._x.jpg` before each file, and `.DS_Store` anywhere; a README has no suffix."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        worlds.add(tar, "README")
        for number in range(14):
            for suffix in ("jpg", "txt"):
                worlds.add(tar, f"set/._{number}.{suffix}")
                worlds.add(tar, f"set/{number}.{suffix}", f"{number}.{suffix}".encode())
                worlds.add(tar, "set/.DS_Store")
    read = list(read_shard(tmp_path / "a.tar"))
    assert read == [(f"set/{n}", {"jpg": f"{n}.jpg".encode(), "txt": f"{n}.txt".encode()}) for n in range(14)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_groups_are_those_of_webdataset(tmp_path, form):
    names = ["a.txt", "a.json", "b.JPG", "x/" + "n" * 80 + "/c.seg.png", "b.txt", "__key__", "noext", "d.e.f"]
    names += ["x/" + "y" * 150 + ".txt"] if form != tarfile.USTAR_FORMAT else []
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for name in names:
            worlds.add(tar, name, name.encode())
    theirs = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    expected = [
        (one.pop("__key__"), {k: v for k, v in one.items() if not k.startswith("__")}) for one in map(dict, theirs)
    ]
    assert list(read_shard(tmp_path / "a.tar")) == expected


def test_shards_of_webdataset_take_the_quick_way(tmp_path, monkeypatch):
    """It writes an extended header before each file, for the fraction of a second of its time."""
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(3):
            writer.write({"__key__": f"{number}", "txt": f"dog {number}"})
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert all(member.pax_headers for member in tar)
    monkeypatch.setattr(tarfile, "open", None)
    assert list(read_shard(tmp_path / "a.tar")) == [(f"{n}", {"txt": f"dog {n}".encode()}) for n in range(3)]
