"""What one process meets stops all of them, and counts are those of the whole run."""

import json
from pathlib import Path

import pytest
import torch

from datamodules.alignment import AlignmentData, AlignmentDataConfig
from datamodules.data_config import Source
from datamodules.errors import DataError
from tests.datamodules import worlds
from tests.datamodules.test_datamodule import Recorder, fit

TWO = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}


class WrittenData(AlignmentData):
    """Leaves in a file what each process counted, and with what error it ended."""

    folder: Path

    def write(self, error: str = "") -> None:
        found = self.counter.state_dict() | {"error": error, "steps": len(self.trainer.lightning_module.seen)}
        (self.folder / f"rank{self.trainer.global_rank}.json").write_text(json.dumps(found))

    def on_exception(self, exception):
        self.write(f"{type(exception).__name__}: {exception}")
        torch.distributed.barrier()  # the launcher ends the others at the first exit; a lone one would wait here


class CountRecorder(Recorder):
    def on_train_end(self):
        self.trainer.datamodule.write()


class BrokenOnOneRank(WrittenData):
    """A data module of which the second process finds nothing usable any more from some step on."""

    def setup(self, stage=None):
        super().setup(stage)
        dataset, rank = self.train_dataset, self.trainer.global_rank

        class Broken(type(dataset)):
            def __getitem__(self, positions):
                if rank == 1 and positions[0] >= 12:
                    raise DataError("the disk is gone")
                return super().__getitem__(positions)

        dataset.__class__ = Broken


def alignment(tmp_path, tokenizer, bad, kind=WrittenData, **options):
    groups = [(f"k{i:04d}", {"txt": b"" if i in bad else b"a dog"}) for i in range(80)]
    config = AlignmentDataConfig(
        captions=Source(worlds.write_members(tmp_path / "a.tar", groups)), batch_size=3, **options
    )
    module = kind(config, worlds.encoder(tokenizer), worlds.clip_tokenize)
    module.folder = tmp_path
    return module


def run(tmp_path, data, steps) -> list[dict]:
    recorder = CountRecorder()
    try:
        fit(tmp_path, data, steps, recorder, **TWO)
    except Exception as error:
        assert "DataError" in type(error).__name__ or "DataError" in str(error) or "terminated" in str(error)
    return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_both_processes_stop_where_one_cannot_go_on(tmp_path, tiny_tokenizer, workers):
    data = alignment(tmp_path, tiny_tokenizer, set(), BrokenOnOneRank, num_workers=workers)
    found = run(tmp_path, data, 10)
    assert [rank["error"] for rank in found] == ["DataError: process 1: the disk is gone"] * 2
    assert [rank["steps"] for rank in found] == [2, 2]  # positions 9 … 11 were the second process's last


@pytest.mark.slow
def test_the_share_of_bad_samples_is_that_of_all_processes(tmp_path, tiny_tokenizer):
    """A quarter is bad: each process alone would stop later than both together."""
    data = alignment(tmp_path, tiny_tokenizer, range(0, 80, 4), max_bad_share=0.05, min_bad_count=6)
    found = run(tmp_path, data, 13)
    assert found[0] == found[1]
    assert found[0]["error"].startswith("DataError") and "max_bad_share" in found[0]["error"]
    assert found[0]["failed"] >= 6 and 0 < found[0]["steps"] < 13


@pytest.mark.slow
def test_counts_are_exact_over_both_processes(tmp_path, tiny_tokenizer):
    bad = set(range(0, 80, 10))
    found = run(tmp_path, alignment(tmp_path, tiny_tokenizer, bad, max_bad_share=0.9), 14)
    assert [rank["error"] for rank in found] == ["", ""]
    assert found[0] == found[1]
    assert found[0]["dropped"] == {"empty_caption": len(bad)}
    assert found[0]["reads"] == 14 * 6 + found[0]["failed"]
