"""What a killed run leaves behind is what the next start needs. Resumes bit for bit are in tests/test_train.py."""

import csv
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import train
from kosmosg.config import written_config
from lightning_modules.run_folder import RunFolder
from tests.lightning_modules.miniature import losses
from tests.lightning_modules.runs import back_to, run


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
