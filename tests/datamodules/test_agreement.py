"""What one rank meets stops all of them, and counts are those of the whole run. Two real ranks each time."""

import json
import multiprocessing
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed

from datamodules.alignment import AlignmentData, AlignmentDataConfig
from datamodules.data_config import Source
from datamodules.errors import DataError
from datamodules.mixture import MixtureDataset
from tests.datamodules import worlds

WORLD = 2
PATIENCE = 120


class BrokenDataset(MixtureDataset):
    """Rows until position 12; there the second rank's data are gone."""

    def __getitem__(self, positions):
        if torch.distributed.get_rank() == 1 and positions[0] >= 12:
            raise DataError("the disk is gone")
        return super().__getitem__(positions)


def read(rank: int, folder: Path, data: AlignmentData, steps: int, broken: bool) -> None:
    """One rank: reads its batches as a trainer would, each followed by something that waits for the others."""
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", timeout=timedelta(seconds=PATIENCE), rank=rank, world_size=WORLD
    )
    data.trainer = SimpleNamespace(max_steps=steps, global_step=0, global_rank=rank, world_size=WORLD)
    data.setup()
    if broken:
        data.train_dataset.__class__ = BrokenDataset
    seen, error = 0, ""
    try:
        for _ in data.train_dataloader():
            torch.distributed.barrier()
            seen += 1
    except DataError as caught:
        error = str(caught)
    (folder / f"rank{rank}.json").write_text(json.dumps(data.counter.state_dict() | {"error": error, "steps": seen}))


def run(folder: Path, data: AlignmentData, steps: int, broken: bool = False) -> list[dict]:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read, args=(rank, folder, data, steps, broken)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        process.kill()
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(WORLD)]


def alignment(folder: Path, tokenizer: Path, bad, **options) -> AlignmentData:
    groups = [(f"k{i:04d}", {"txt": b"" if i in bad else b"a dog"}) for i in range(80)]
    source = Source(worlds.write_members(folder / "a.tar", groups))
    config = AlignmentDataConfig(captions=source, **({"micro_batch_size": 3, "num_workers": 0} | options))
    return AlignmentData(config, worlds.encoder(tokenizer), worlds.clip())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_both_ranks_stop_where_one_cannot_go_on(tmp_path, tiny_tokenizer, workers):
    found = run(tmp_path, alignment(tmp_path, tiny_tokenizer, set(), num_workers=workers), 10, broken=True)
    assert [rank["error"] for rank in found] == ["rank 1: the disk is gone"] * 2
    assert [rank["steps"] for rank in found] == [2, 2]  # its third batch begins at position 15


@pytest.mark.slow
def test_the_share_of_bad_samples_is_that_of_all_ranks(tmp_path, tiny_tokenizer):
    data = alignment(tmp_path, tiny_tokenizer, range(0, 80, 4), max_bad_share=0.05, min_bad_count=6)
    found = run(tmp_path, data, 13)
    assert found[0] == found[1]
    assert "max_bad_share is 0.05" in found[0]["error"]
    assert found[0]["failed"] >= 6 and 0 < found[0]["steps"] < 13


@pytest.mark.slow
def test_counts_are_exact_over_both_ranks(tmp_path, tiny_tokenizer):
    bad = set(range(0, 80, 10))
    found = run(tmp_path, alignment(tmp_path, tiny_tokenizer, bad, max_bad_share=0.9), 14)
    assert found[0] == found[1] and not found[0]["error"]
    assert found[0]["dropped"] == {"empty_caption": len(bad)}
    assert found[0]["reads"] == 14 * 6 + found[0]["failed"]
