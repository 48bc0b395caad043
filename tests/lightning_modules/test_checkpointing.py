"""Checkpoints as folders: complete or absent, intact or set aside, and without a pickle."""

import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed
from safetensors.torch import save_file
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from lightning_modules.checkpointing import (
    CheckpointDamagedError,
    CheckpointWriteError,
    checkpoint_name,
    checkpoints,
    load_tensors,
    read_shapes,
    read_state,
    remove_old,
    verify,
    write_checkpoint,
)
from lightning_modules.run_folder import RunFolder, RunFolderError
from tests.lightning_modules.processes import run_together

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TENSORS = {"model.a": torch.arange(12.0).view(4, 3), "optimizer.a.step": torch.tensor(3.0)}
TENSOR_FILE = "shard-00001-model-00001-of-00001.safetensors"


def save(folder: Path, step: int) -> Path:
    checkpoint = folder / checkpoint_name(step)
    write_checkpoint(checkpoint, {name: tensor + step for name, tensor in TENSORS.items()}, {"global_step": step})
    return checkpoint


def load(checkpoint: Path) -> dict[str, torch.Tensor]:
    targets = {name: torch.full_like(tensor, -1) for name, tensor in TENSORS.items()}
    load_tensors(checkpoint, targets)
    return targets


def test_what_is_written_is_read(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 4)
    verify(checkpoint)
    assert read_state(checkpoint) == {"global_step": 4}
    assert read_shapes(checkpoint) == {"model.a": torch.Size([4, 3]), "optimizer.a.step": torch.Size([])}
    assert all(torch.equal(tensor, TENSORS[name] + 4) for name, tensor in load(checkpoint).items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004"]
    with pytest.raises(CheckpointDamagedError, match=r"model\.b"):
        load_tensors(checkpoint, {"model.b": torch.zeros(4)})


def test_shards_are_read_by_another_number_of_ranks(tmp_path: Path) -> None:
    """Two ranks' halves are whole to one, and the other way round; also rows that cannot be halved."""
    tensors = {"model.a": torch.arange(20.0).view(5, 4), "model.b": torch.tensor([[7.0]])}
    by_two, by_one = tmp_path / checkpoint_name(2), tmp_path / checkpoint_name(1)
    write_checkpoint(by_one, tensors, {})

    def on_rank() -> None:
        distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,))
        halves, empty = (
            {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in given.items()}
            for given in (tensors, {name: torch.zeros_like(value) for name, value in tensors.items()})
        )
        write_checkpoint(by_two, halves, {})
        load_tensors(by_one, empty)
        assert all(torch.equal(empty[name].full_tensor(), value) for name, value in tensors.items())

    assert run_together(2, on_rank, tmp_path / "log") == [0, 0], (tmp_path / "log.0").read_text()
    assert len(list(by_two.glob("*.safetensors"))) == 2
    verify(by_two)
    whole = {name: torch.zeros_like(value) for name, value in tensors.items()}
    load_tensors(by_two, whole)
    assert all(torch.equal(whole[name], value) for name, value in tensors.items())


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped bit": flip_a_bit,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "deleted": Path.unlink,
    "foreign": lambda file: file.write_bytes(b"{}"),
}


def test_damage_is_found_and_the_checkpoint_before_is_used(
    tmp_path: Path, subtests: pytest.Subtests, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (TENSOR_FILE, "state.json", "manifest.json"):
        for how, damage in DAMAGES.items():
            with subtests.test(f"{name} {how}"):
                run = RunFolder(tmp_path / f"{name}-{how}")
                caplog.clear()
                first, second = save(run.checkpoints, 2), save(run.checkpoints, 4)
                damage(second / name)
                assert run.intact_checkpoint() == first
                # A bit of the manifest may be one of another file's checksum.
                assert (name in caplog.text or name == "manifest.json") and "damaged-step-00000004" in caplog.text
                assert save(run.checkpoints, 4).is_dir(), "the step can be saved again"
                assert run.intact_checkpoint() == run.checkpoints / checkpoint_name(4)


def test_without_an_intact_checkpoint_nothing_is_begun_anew(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.intact_checkpoint() is None
    (save(run.checkpoints, 2) / "state.json").unlink()
    with pytest.raises(RunFolderError, match="holds no intact checkpoint: damaged-step-00000002"):
        run.intact_checkpoint()


def test_strangers_are_left_alone(tmp_path: Path) -> None:
    """What file systems, backups and users leave among checkpoints, and inside of one."""
    run = RunFolder(tmp_path)
    latest = save(run.checkpoints, 4)
    (run.checkpoints / "step-00000004-backup").mkdir()
    (run.checkpoints / "step-00000009").write_text("a file")
    (run.checkpoints / ".DS_Store").write_text("x")
    for name in (".DS_Store", ".nfs000001", "notes.txt", ".metadata"):
        (latest / name).write_bytes(pickle.dumps(OSError))
    elsewhere = save(tmp_path / "elsewhere", 2)
    (run.checkpoints / "step-00000002").symlink_to(elsewhere)
    assert run.intact_checkpoint() == latest
    save(run.checkpoints, 6)
    remove_old(run.checkpoints, keep=1)
    assert [path.name for path in checkpoints(run.checkpoints)] == ["step-00000006"]
    assert (run.checkpoints / "step-00000004-backup").is_dir() and (run.checkpoints / "step-00000009").is_file()
    verify(elsewhere)  # a link was removed, and not what it names
    (run.checkpoints / "step-00000008").symlink_to(tmp_path / "gone")
    verify(save(run.checkpoints, 8))


def test_foreign_tensors_and_pickles_are_never_read(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 2)
    save_file({"model.a": torch.zeros(4, 3)}, checkpoint / "other.safetensors")
    with pytest.raises(CheckpointDamagedError, match=r"other\.safetensors does not belong there"):
        verify(checkpoint)
    (checkpoint / "other.safetensors").unlink()
    marker = tmp_path / "marker"

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    for name in (TENSOR_FILE, "state.json", ".metadata"):
        (checkpoint / name).write_bytes(pickle.dumps(Malicious()))
    for read in (read_state, read_shapes, verify):
        with pytest.raises(CheckpointDamagedError):
            read(checkpoint)
    assert not marker.exists()


def test_failed_save_leaves_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # bytes of a file; as a full disk, an OSError
    try:
        with pytest.raises(CheckpointWriteError, match="File too large"):
            save(tmp_path, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    verify(tmp_path / "step-00000002")


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
        save(run.checkpoints, 6)  # what was left does not disturb
        remove_old(run.checkpoints, keep=1)
        assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000006"]
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
    else:
        raise AssertionError("the save never came to its end")
    assert kills >= 10, "mkdir, three files, rename and a removal are more file operations than that"
