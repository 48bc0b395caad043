"""What one rank meets stops all of them, and counts are those of the whole run. Two real ranks each time."""

import json
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as distributed

from datamodules.alignment import AlignmentData, AlignmentDataConfig
from datamodules.data_config import Source
from datamodules.errors import DataError
from datamodules.mixture import MixtureDataset
from tests.datamodules import worlds
from tests.lightning_modules.processes import run_together

pytestmark = pytest.mark.slow


class BrokenDataset(MixtureDataset):
    """Rows until position 12; there the second rank's data are gone."""

    def __getitem__(self, positions):
        if distributed.get_rank() == 1 and positions[0] >= 12:
            raise DataError("the disk is gone")
        return super().__getitem__(positions)


@pytest.fixture
def read(tmp_path: Path, tiny_tokenizer: Path):
    """What both ranks met and counted in so many steps over 80 captions, some of them bad."""

    def run(steps: int, bad=(), broken: bool = False, **options) -> list[dict]:
        groups = [(f"k{i:04d}", {"txt": b"" if i in bad else b"a dog"}) for i in range(80)]
        source = Source(worlds.write_members(tmp_path / "a.tar", groups))
        config = AlignmentDataConfig(captions=source, **({"micro_batch_size": 3, "num_workers": 0} | options))
        data = AlignmentData(config, worlds.encoder(tiny_tokenizer), worlds.clip())

        def on_rank() -> None:
            """As a trainer reads; each batch is followed by something that waits for the others."""
            distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
            rank = distributed.get_rank()
            data.trainer = SimpleNamespace(max_steps=steps, global_step=0, global_rank=rank, world_size=2)
            data.setup()
            if broken:
                data.train_dataset.__class__ = BrokenDataset
            seen, error = 0, ""
            try:
                for _ in data.train_dataloader():
                    distributed.barrier()
                    seen += 1
            except DataError as caught:
                error = str(caught)
            found = data.counter.state_dict() | {"error": error, "steps": seen}
            (tmp_path / f"rank{rank}.json").write_text(json.dumps(found))

        assert run_together(2, on_rank, tmp_path / "log") == [0, 0], (tmp_path / "log.0").read_text()
        return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]

    return run


@pytest.mark.parametrize("workers", [0, 1])
def test_both_ranks_stop_where_one_cannot_go_on(read, workers):
    found = read(10, broken=True, num_workers=workers)
    assert [rank["error"] for rank in found] == ["rank 1: the disk is gone"] * 2
    assert [rank["steps"] for rank in found] == [2, 2]  # its third batch begins at position 15


def test_the_share_of_bad_samples_is_that_of_all_ranks(read):
    first, second = read(13, range(0, 80, 4), max_bad_share=0.05, min_bad_count=6)
    assert first == second and "max_bad_share is 0.05" in first["error"]
    assert first["failed"] >= 6 and 0 < first["steps"] < 13


def test_counts_are_exact_over_both_ranks(read):
    bad = range(0, 80, 10)
    first, second = read(14, bad, max_bad_share=0.9)
    assert first == second and not first["error"] and first["dropped"] == {"empty_caption": len(bad)}
    assert first["reads"] == 14 * 6 + first["failed"]
