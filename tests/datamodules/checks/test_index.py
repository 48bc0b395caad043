"""kosmosg data index: what training needs to know of shards that others wrote."""

import json
from pathlib import Path

import pytest

from datamodules.remote import RemoteConfig
from datamodules.shards import LISTING, list_shards
from kosmosg.cli import main
from tests.datamodules import worlds


def index(*arguments: object) -> int:
    return main(["data", "index", *map(str, arguments)])


def foreign(folder: Path, shards: int = 3, samples: int = 4) -> Path:
    for number in range(shards):
        groups = [(f"{number}{i:08d}", {"txt": b"a dog", "jpg": worlds.png(i)}) for i in range(samples)]
        worlds.write_members(folder / f"{number:05d}.tar", groups)
    (folder / LISTING).unlink(missing_ok=True)
    return folder


def test_a_listing_lies_beside_foreign_tars(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = foreign(tmp_path / "laion")
    (folder / "00002_stats.json").write_text('{"count": 9, "successes": 7}')
    assert index(folder) == 0
    assert "15 samples in 3 shard(s)" in capsys.readouterr().out
    assert list_shards(str(folder)).samples.tolist() == [4, 4, 7]
    assert list_shards(f"{folder}/{{00000..00001}}.tar").samples.tolist() == [4, 4]


def test_shards_of_the_same_size_are_not_counted_again(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "a")
    assert index(folder) == 0
    listing = json.loads((folder / LISTING).read_text())
    listing["shards"][0]["samples"] = 3  # of which the second start cannot know
    (folder / LISTING).write_text(json.dumps(listing))
    worlds.write_members(tmp_path / "b" / "00001.tar", [("a", {"txt": b"a dog", "jpg": bytes(20_000)})])
    (tmp_path / "b" / "00001.tar").replace(folder / "00001.tar")
    (folder / "00002.tar").unlink()
    assert index(f"{folder}/*.tar") == 0
    assert list_shards(str(folder)).samples.tolist() == [3, 1]


def test_a_folder_that_cannot_be_written_is_listed_elsewhere(tmp_path: Path) -> None:
    folder, listing = foreign(tmp_path / "a"), tmp_path / "lists" / "laion.json"
    foreign(tmp_path / "b", shards=1, samples=2)
    listing.parent.mkdir()
    assert index(f"{tmp_path}/{{a,b}}/*.tar", "--output", listing) == 0
    shards = list_shards(str(listing))
    assert shards.samples.tolist() == [4, 4, 4, 2] and all(path.is_file() for path in shards.paths)
    assert not (folder / LISTING).exists()


def test_what_cannot_be_read_is_named_and_the_rest_listed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = foreign(tmp_path)
    (folder / "00001.tar").write_bytes(b"not a tar" * 1000)
    assert index(folder) == 1
    told = capsys.readouterr()
    assert "00001.tar: " in told.err and "not a readable tar" in told.err and "8 samples in 2" in told.out
    assert json.loads((folder / LISTING).read_text())["shards"][1]["name"] == "00002.tar"
    assert index(folder / "00001.tar") == 2


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_interrupt_keeps_what_was_counted(elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, output = foreign(tmp_path / "a", shards=4), tmp_path / "a.json"
    arguments = (folder, "--output", output) if elsewhere else (folder,)

    def interrupted(done, *arguments, **options):
        next(done)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("rich.progress.track", interrupted)
        assert index(*arguments) == 130
    assert not output.exists()
    unfinished = tmp_path / "a.json.unfinished" if elsewhere else folder / LISTING
    kept = [Path(shard["name"]).name for shard in json.loads(unfinished.read_text())["shards"]]
    for name in kept:  # of the listed size, but without a sample: it is not counted again
        (folder / name).write_bytes(bytes((folder / name).stat().st_size))
    assert kept and index(*arguments) == 0
    assert len(list_shards(str(output if elsewhere else folder))) == 16
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.json"] * elsewhere


def test_each_shard_of_a_store_is_fetched_once(server, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (server.folder / LISTING).unlink()
    urls, output = f"{server.address}/captions-{{000000..000025}}.tar", tmp_path / "captions.json"
    assert index(urls) == 2 and "set --output" in capsys.readouterr().err
    assert index(urls, "--output", output) == 0
    fetched = len(server.shards())
    shards = list_shards(str(output), RemoteConfig(["http"]))
    assert len(shards) == 260 and shards.urls[0] == f"{server.address}/captions-000000.tar"
    server.requests.clear()
    assert index(urls, "--output", output) == 0
    assert len(server.shards()) == fetched - 26  # their sizes alone are asked for
