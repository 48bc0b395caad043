"""What a killed run leaves behind is what the next start needs: rows of the log, and a folder that is free."""

import csv
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from callbacks.checkpoint import StepCheckpoint
from kosmosg.config import written_config
from lightning_modules.run_folder import RunFolder
from tests.lightning_modules.miniature import losses
from tests.lightning_modules.runs import back_to, run


@pytest.mark.parametrize("validates", [True, False])
def test_log_has_the_rows_of_a_checkpoint_when_it_is_saved(
    validates: bool, configs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed right after a save resumes behind it, so these rows are never written again."""
    saved: dict[int, list[dict[str, str]]] = {}

    def note(self: StepCheckpoint, trainer) -> bool:
        if trainer.global_step:
            with open(tmp_path / "alignment" / "metrics.csv", newline="") as log:
                saved[trainer.global_step] = list(csv.DictReader(log))
        return save(self, trainer)

    save = StepCheckpoint.save
    monkeypatch.setattr(StepCheckpoint, "save", note)
    held_out = [] if validates else ["data.captions.validation=''"]
    assert run(configs["alignment"], "trainer.checkpoint_every=1", *held_out) == 0
    assert sorted(saved) == [1, 2, 3, 4]
    for step, rows in saved.items():
        assert [row["step"] for row in rows] == [str(done) for done in range(1, step + 1)]
        assert all(row["train/loss"] and row["samples_per_second"] for row in rows)
        assert [bool(row.get("val/loss")) for row in rows] == [
            validates and done % 2 == 0 for done in range(1, step + 1)
        ]


def test_resumed_run_may_validate_at_other_steps(
    finished: Callable[[str], Path], configs: dict[str, Path], tmp_path: Path
) -> None:
    first = finished("alignment")
    for every in (1, 3):
        folder = Path(shutil.copytree(first, tmp_path / str(every)))
        back_to(folder, 2)
        assert run(configs["alignment"], f"run={folder}", f"trainer.val_every={every}") == 0
        assert [row[:2] for row in losses(folder)] == [row[:2] for row in losses(first)]
        with open(folder / "metrics.csv", newline="") as log:
            validated = [int(row["step"]) for row in csv.DictReader(log) if row["val/loss"]]
        assert validated == [2, *(step for step in (3, 4) if step % every == 0)]


def test_what_a_killed_run_leaves_running_does_not_hold_its_folder(configs: dict[str, Path], tmp_path: Path) -> None:
    """As workers that read data do for some seconds."""
    written, folder = written_config([str(configs["alignment"])], train.stage_schema), tmp_path / "alignment"
    told, tell = os.pipe()
    killed = os.fork()
    if killed == 0:
        with RunFolder(folder).lock(written, train.stage_schema):
            if os.fork() == 0:  # told from here, where what a fork closes is closed
                os.write(tell, str(os.getpid()).encode())
                signal.pause()
            os.kill(os.getpid(), signal.SIGKILL)
    worker = int(os.read(told, 20))
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == -signal.SIGKILL
        os.kill(worker, 0)  # still there
        with RunFolder(folder).lock(written, train.stage_schema):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
