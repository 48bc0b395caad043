"""Checkpoints as folders: complete or absent, intact or set aside, and never executed."""

import json
import logging
import os
import pickle
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed
from lightning_modules.runs import checkpoint_folder
from lightning_modules.runs.checkpoint_folder import (
    CheckpointDamagedError,
    CheckpointWriteError,
    checkpoint_name,
    read_state,
    remove_old,
    require_intact,
    write_checkpoint,
)
from lightning_modules.runs.run_folder import RunFolder, RunFolderError
from lightning_modules.runs.tensor_storage import StorageError, load_tensors, read_index
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from tests.lightning_modules.processes import run_together

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TENSORS = {"model.a": torch.arange(12.0).view(4, 3), "optimizer.a.step": torch.tensor(3.0)}


def save(folder: Path, step: int) -> Path:
    checkpoint = folder / checkpoint_name(step)
    write_checkpoint(checkpoint, {name: tensor + step for name, tensor in TENSORS.items()}, {"global_step": step})
    return checkpoint


def reseal(checkpoint: Path) -> None:
    """Make the manifest fit what lies there, as one who tampers could."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] = checkpoint_folder._sums(checkpoint, "[!m]*")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def load(checkpoint: Path) -> dict[str, torch.Tensor]:
    targets = {name: torch.full_like(tensor, -1) for name, tensor in TENSORS.items()}
    load_tensors(checkpoint, targets)
    return targets


def test_what_is_written_is_read(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 4)
    require_intact(checkpoint)
    assert read_state(checkpoint) == {"global_step": 4}
    assert all(torch.equal(tensor, TENSORS[name] + 4) for name, tensor in load(checkpoint).items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004"]


@pytest.mark.parametrize("saved_by", [1, 2])
def test_shards_are_read_by_another_number_of_processes(saved_by: int, tmp_path: Path) -> None:
    """Two processes' halves are whole to one, and the other way round."""
    checkpoint, whole = tmp_path / checkpoint_name(1), torch.arange(20.0).view(5, 4)

    def in_halves(action) -> int:
        distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,))
        action(distribute_tensor(whole if saved_by == 2 else torch.zeros(5, 4), mesh, [Shard(0)]))
        return 0

    def check(half: DTensor) -> None:
        load_tensors(checkpoint, {"model.a": half})
        assert torch.equal(half.full_tensor(), whole)

    if saved_by == 2:
        save_halves = lambda half: write_checkpoint(checkpoint, {"model.a": half}, {})  # noqa: E731
        assert run_together(2, lambda: in_halves(save_halves), tmp_path / "log") == [0, 0]
        assert len(list(checkpoint.glob("__*"))) == 2
        target = torch.zeros(5, 4)
        load_tensors(checkpoint, {"model.a": target})
        assert torch.equal(target, whole)
    else:
        write_checkpoint(checkpoint, {"model.a": whole}, {})
        assert run_together(2, lambda: in_halves(check), tmp_path / "log") == [0, 0], (tmp_path / "log.0").read_text()


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "deleted":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped bit", "truncated", "deleted"])
@pytest.mark.parametrize("name", ["__0_0.distcp", "state.pt", "tensors.json", "manifest.json"])
def test_damage_is_found_told_and_the_checkpoint_before_is_taken(
    name: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(tmp_path)
    first, second = save(run.checkpoints, 2), save(run.checkpoints, 4)
    damage(second / name, how)
    with caplog.at_level(logging.WARNING):
        assert run.intact_checkpoint() == first
    assert name in caplog.text and "damaged-step-00000004" in caplog.text
    assert save(run.checkpoints, 4).is_dir(), "the step can be saved again"
    assert run.intact_checkpoint() == run.checkpoints / checkpoint_name(4)


def test_no_intact_checkpoint_is_no_fresh_start(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.intact_checkpoint() is None
    damage(save(run.checkpoints, 2) / "state.pt", "deleted")
    with pytest.raises(RunFolderError, match="holds no intact checkpoint: damaged-step-00000002"):
        run.intact_checkpoint()


class Malicious:
    """Unpickled, it would write `marker`."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("where", [".metadata", "state.pt", "pieces"])
def test_pickle_that_calls_a_function_is_refused_by_name(where: str, tmp_path: Path) -> None:
    marker, checkpoint = tmp_path / "marker", save(tmp_path, 2)
    poison = pickle.dumps(Malicious(marker))
    if where == ".metadata":  # what PyTorch would execute; it is no file of ours, and not opened
        (checkpoint / ".metadata").write_bytes(poison)
        with pytest.raises(CheckpointDamagedError, match=r"\.metadata does not belong there, a pickle, which is never"):
            require_intact(checkpoint)
        assert all(torch.equal(tensor, TENSORS[name] + 2) for name, tensor in load(checkpoint).items())
    elif where == "state.pt":
        torch.save(Malicious(marker), checkpoint / "state.pt")
        reseal(checkpoint)
        require_intact(checkpoint)
        with pytest.raises(StorageError, match=r"state\.pt: .*(posix|os)\.system"):
            read_state(checkpoint)
    else:
        torch.save(Malicious(marker), checkpoint / "__0_0.distcp")
        index = read_index(checkpoint)
        for entry in index.values():
            entry["pieces"][0][3:] = [0, (checkpoint / "__0_0.distcp").stat().st_size]
        (checkpoint / "tensors.json").write_text(json.dumps(index))
        reseal(checkpoint)
        require_intact(checkpoint)
        with pytest.raises(StorageError, match=r"(posix|os)\.system"):
            load(checkpoint)
    assert not marker.exists()


@pytest.mark.parametrize("place", ["../../secret", "/etc/passwd", ".."])
def test_index_cannot_point_outside(place: str, tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 2)
    index = json.loads((checkpoint / "tensors.json").read_text())
    index["model.a"]["pieces"][0][2] = place
    (checkpoint / "tensors.json").write_text(json.dumps(index))
    with pytest.raises(StorageError, match="which is no file here"):
        load(checkpoint)


def test_other_shapes_and_absent_tensors_are_named(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 2)
    with pytest.raises(StorageError, match=r"model\.a is \[4, 3\] there and \[4, 4\] here"):
        load_tensors(checkpoint, {"model.a": torch.zeros(4, 4)})
    with pytest.raises(StorageError, match=r"model\.b is absent"):
        load_tensors(checkpoint, {"model.b": torch.zeros(4)})


def test_full_disk_leaves_what_stands_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 2)

    def full(content: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def full_at_once(tensors: object, folder: Path) -> None:
        full(tensors, folder / "__0_0.distcp")

    for place, failing in (("write_plain", full), ("save_tensors", full_at_once)):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_folder, place, failing)
            with pytest.raises(CheckpointWriteError, match="No space left on device"):
                save(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    require_intact(tmp_path / "step-00000002")


def test_old_ones_are_removed(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step)
    remove_old(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]


FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def save_and_die(folder: Path, at: int) -> int:
    """Save step 4 and remove step 2, as a run does; killed at file operation number `at`. 0: not reached."""
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in FILE_EVENTS and str(folder) in str(arguments[0]):
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    save(folder, 4)
    remove_old(folder, keep=1)
    return 0


@pytest.mark.slow
def test_kill_at_every_file_operation_of_a_save_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    kills = 0
    for at in range(1, 200):
        run = RunFolder(tmp_path / str(at))
        save(run.checkpoints, 2)
        [status] = run_together(1, lambda at=at, run=run: save_and_die(run.checkpoints, at), tmp_path / "log")
        found = run.intact_checkpoint()
        assert found is not None and not list(run.checkpoints.glob("damaged-*"))
        step = read_state(found)["global_step"]
        assert all(torch.equal(tensor, TENSORS[name] + step) for name, tensor in load(found).items())
        save(run.checkpoints, 6)  # what was left lying does not disturb
        remove_old(run.checkpoints, keep=1)
        assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000006"]
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
    else:
        raise AssertionError("the save never came to its end")
    assert kills >= 10, "mkdir, four files, rename and a removal are more file operations than that"
