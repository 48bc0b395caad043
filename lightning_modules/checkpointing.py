"""Checkpoints: folders that are complete or absent, intact before anything in them is believed, and free of pickles.

step-00000500/
  shard-*.safetensors  trainable weights, optimizer states and their average, one file a rank
  state.json           step, counts, identity of the data: plain values
  manifest.json        bytes and SHA-256 of each of these files

A checkpoint is written under a name that begins with a dot, fsynced and renamed. One rank, DDP and FSDP2 write and read
the same files, so a run may go on with another strategy or number of ranks. On several nodes the folder is on a file
system that all share. Tensors are named `model.`, `optimizer.` and `ema.` before the parameter's name.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from kosmosg.files import flush
from lightning_modules.step_guard import gather

Outcome = TypeVar("Outcome")
FORMAT = 2
NAME = re.compile(r"step-\d{8}")
TEMPORARY = re.compile(r"\.step-\d{8}(\.removed)?")
MANIFEST_FILE, STATE_FILE = "manifest.json", "state.json"
MODEL, OPTIMIZER, EMA = "model.", "optimizer.", "ema."
NAMED_IN_ERRORS = 3


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; nothing of it is left, and those before it are intact."""


class CheckpointDamagedError(ValueError):
    """A checkpoint that is not what was written."""


class CheckpointMismatchError(ValueError):
    """A checkpoint of another model or stage."""


# Folders.
def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps; names sort as steps do."""
    return f"step-{step:08d}"


def checkpoint_step(folder: Path) -> int:
    """Optimizer steps done in a checkpoint, by its name."""
    return int(folder.name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; files, links and other names are somebody else's."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir())


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write the checkpoint `folder`. All ranks call it together, with the same `state`.

    Args:
        tensors: whole, or sharded over the ranks.
        state: values that JSON holds.

    Raises:
        CheckpointWriteError: on all ranks alike.
    """
    temporary = folder.with_name(f".{folder.name}")
    try:
        _together(lambda: _make_room(temporary), rank_zero_only=True)
        _together(lambda: _save_tensors(temporary, tensors))
        # Each rank hashes what it wrote, as read back from the file.
        sums = _together(lambda: _checksums(temporary, f"shard-{_rank() + 1:05d}-*"))
        _together(lambda: _complete(temporary, folder, state, sums), rank_zero_only=True)
    except CheckpointWriteError:
        if _rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the `keep` latest checkpoints; one that is half removed is no longer found."""
    for old in checkpoints(folder)[:-keep]:
        if old.is_symlink():
            old.unlink()
            continue
        removed = old.with_name(f".{old.name}.removed")
        old.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest. Files that nothing reads, such as `.DS_Store`, are ignored.

    Raises:
        CheckpointDamagedError: names each file that is missing, changed or does not belong there.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
        version, listed = manifest["format"], manifest["files"]
        expected = {str(name): (int(file["bytes"]), str(file["sha256"])) for name, file in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointDamagedError(f"'{folder}' has no readable {MANIFEST_FILE}: {error}") from error
    if version != FORMAT:
        raise CheckpointDamagedError(f"'{folder}' is of format {version}; this version reads format {FORMAT}")
    problems = []
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size} bytes instead of {size}")
        elif _digest(file) != digest:
            problems.append(f"{name} has another content than was written")
    strangers = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in expected)
    problems += [f"{name} does not belong there" for name in strangers]
    if problems:
        raise CheckpointDamagedError(f"'{folder}' is damaged: {'; '.join(problems)}")


def read_state(folder: Path) -> dict[str, Any]:
    """The plain values. Raises CheckpointDamagedError."""
    try:
        return json.loads((folder / STATE_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointDamagedError(f"'{folder / STATE_FILE}' cannot be read: {error}") from error


def read_shapes(folder: Path) -> dict[str, torch.Size]:
    """Shape of each tensor. Raises CheckpointDamagedError."""
    try:
        return {
            name: tensor.size  # type: ignore[union-attr]
            for name, tensor in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items()
        }
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointDamagedError(f"'{folder}' holds no readable tensors: {error}") from error


def load_tensors(folder: Path, targets: Mapping[str, Tensor], *, alone: bool = False) -> None:
    """Fill `targets` in place, whole or sharded in whatever way. All ranks call it together unless `alone`.

    Raises:
        CheckpointDamagedError: a tensor is absent or cannot be read.
    """
    try:
        dcp.load(
            dict(targets),
            storage_reader=HuggingFaceStorageReader(str(folder)),
            planner=dcp.DefaultLoadPlanner(flatten_state_dict=False),
            no_dist=alone or not distributed.is_initialized(),
        )
    except CheckpointException as error:
        raise CheckpointDamagedError(f"'{folder}': {_first_cause(error)}") from error


# From a checkpoint to a module.
def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def load_weights(checkpoint: Path, module: nn.Module, average: bool = False) -> None:
    """Fill what trains in `module`, built afresh on one rank, from a checkpoint of any number; the rest is as built.

    Args:
        average: take the average of the weights instead of the weights.

    Raises:
        CheckpointMismatchError: the checkpoint is another model's, or has no average.
    """
    prefix = EMA if average else MODEL
    shapes = _below(prefix, read_shapes(checkpoint))
    if average and not shapes:
        raise CheckpointMismatchError(
            f"'{checkpoint}' holds no average of the weights; it was trained with ema.decay=0"
        )
    _require_same_model(module, shapes, checkpoint)
    targets = {f"{prefix}{name}": parameter.detach() for name, parameter in trainable_parameters(module).items()}
    load_tensors(checkpoint, targets, alone=True)


def _require_same_model(module: nn.Module, shapes: Mapping[str, torch.Size], checkpoint: Path) -> None:
    """Raises CheckpointMismatchError: names the first tensors that are absent, left over or of another shape."""
    expected = {name: parameter.shape for name, parameter in trainable_parameters(module).items()}
    problems = [f"{name} is absent" for name in expected if name not in shapes]
    problems += [f"{name} is not trainable here" for name in shapes if name not in expected]
    problems += [
        f"{name} is {tuple(shapes[name])} there and {tuple(shape)} here"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - NAMED_IN_ERRORS} more" if len(problems) > NAMED_IN_ERRORS else ""
        raise CheckpointMismatchError(
            f"'{checkpoint}' is a checkpoint of another model: {'; '.join(problems[:NAMED_IN_ERRORS])}{more}. Use the "
            "configuration it was trained with, or another run folder."
        )


# Lightning's strategies with these checkpoints.
class FolderCheckpoints(Strategy):
    """Goes before one of Lightning's strategies: checkpoints are folders that all ranks write and read together."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # when the parameters are on their devices, sharded or not

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False  # done by load_checkpoint

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trainable tensors, as they are on this rank."""
        return {name: parameter.detach() for name, parameter in self._trainable().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Its tensors as `<parameter>.<key>`; rates, betas and the like are the configuration's."""
        names = {id(parameter): name for name, parameter in self._trainable().items()}
        return {
            f"{names[id(parameter)]}.{key}": value
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the folder. Raises CheckpointWriteError on all ranks alike."""
        tensors = _prefixed(MODEL, checkpoint.pop("state_dict")) | _prefixed(EMA, checkpoint.pop("ema", {}))
        for state in checkpoint.pop("optimizer_states"):
            tensors |= _prefixed(OPTIMIZER, state)
        write_checkpoint(Path(filepath), tensors, checkpoint)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill the parameters and the optimizer; the plain values, and under `ema` the average if there is one.

        Raises:
            CheckpointMismatchError: a checkpoint of another model.
            CheckpointDamagedError: what cannot be read.
        """
        folder = Path(self.broadcast(str(checkpoint_path)))
        assert self.lightning_module is not None
        state, shapes = read_state(folder), read_shapes(folder)
        _require_same_model(self.lightning_module, _below(MODEL, shapes), folder)
        parameters = self._trainable()
        targets = {f"{MODEL}{name}": parameter.detach() for name, parameter in parameters.items()}
        average = {name: empty_average(parameters[name]) for name in _below(EMA, shapes)}
        targets |= _prefixed(EMA, average)
        optimizer: Any = self.optimizers[0]
        written = _below(OPTIMIZER, shapes)
        for name in {place.rpartition(".")[0] for place in written}:  # none before the first step
            optimizer.state[parameters[name]] = optimizer.empty_state(parameters[name])
        states = self.optimizer_state(optimizer)
        if states.keys() != written.keys():
            raise CheckpointMismatchError(
                f"'{folder}' holds optimizer states {sorted(written)[:NAMED_IN_ERRORS]} … and this run would read "
                f"{sorted(states)[:NAMED_IN_ERRORS]} …: use the optimizer.eight_bit it was trained with."
            )
        load_tensors(folder, targets | _prefixed(OPTIMIZER, states))
        return {**state, "ema": average}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Done by load_checkpoint."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Done by load_checkpoint."""

    def _trainable(self) -> dict[str, nn.Parameter]:
        assert self.lightning_module is not None
        return trainable_parameters(self.lightning_module)


class SingleDevice(FolderCheckpoints, SingleDeviceStrategy):
    """One rank, one device."""


class Replicated(FolderCheckpoints, DDPStrategy):
    """DDP: every rank has the whole model; gradients are averaged."""


class Sharded(FolderCheckpoints, ModelParallelStrategy):
    """FSDP2: parameters, gradients and optimizer states are divided among the ranks."""

    def _trainable(self) -> dict[str, nn.Parameter]:
        # A validation leaves the last layers gathered, since no backward pass follows that would divide them again.
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return super()._trainable()


def build_strategy(name: str, accelerator: str, world_size: int) -> Strategy:
    """fsdp2, ddp, or one device alone."""
    if name == "fsdp2":
        return Sharded(data_parallel_size=world_size, tensor_parallel_size=1)
    if name == "ddp":
        return Replicated()
    best = torch.accelerator.current_accelerator(check_available=True)
    kind = {"auto": best.type if best else "cpu", "gpu": best.type if best else "cuda"}.get(accelerator, accelerator)
    return SingleDevice(torch.device(kind) if kind == "cpu" else torch.device(kind, 0))


def empty_average(parameter: Tensor) -> Tensor:
    """Room for the average of a parameter, sharded as it is; float32 whatever the parameter's precision."""
    return torch.empty_like(parameter.detach(), dtype=torch.float32)


def _make_room(temporary: Path) -> None:
    """An empty folder; what an interrupted save or removal left is cleared away."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for left in temporary.parent.iterdir():
        if TEMPORARY.fullmatch(left.name):
            shutil.rmtree(left)
    temporary.mkdir()


def _save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        dcp.save(
            dict(tensors),
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
            planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
            no_dist=not distributed.is_initialized(),
        )
    except CheckpointException as error:
        raise OSError(f"{folder}: {_first_cause(error)}") from error


def _complete(temporary: Path, folder: Path, state: Mapping[str, Any], sums: list[dict[str, Any]]) -> None:
    (temporary / STATE_FILE).write_text(json.dumps(state, indent=1))
    files = {name: entry for of_rank in sums for name, entry in of_rank.items()} | _checksums(temporary, STATE_FILE)
    manifest = {"format": FORMAT, "step": checkpoint_step(folder), "ranks": len(sums), "files": files}
    (temporary / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))
    if folder.is_symlink():
        folder.unlink()
    for path in (temporary / STATE_FILE, temporary / MANIFEST_FILE, temporary):  # dcp has synced the tensors
        flush(path)
    temporary.rename(folder)
    flush(folder.parent)


def _checksums(folder: Path, pattern: str) -> dict[str, dict[str, Any]]:
    files = sorted(folder.glob(pattern))
    return {file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)} for file in files}


def _digest(file: Path) -> str:
    with open(file, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _together(action: Callable[[], Outcome], rank_zero_only: bool = False) -> list[Outcome]:
    """Run `action` on all ranks or on the first alone; its results in order. What fails on one fails on all."""
    outcome, failure = None, None
    if _rank() == 0 or not rank_zero_only:
        try:
            outcome = action()
        except (OSError, RuntimeError, SafetensorError) as error:
            failure = f"rank {_rank()}: {error}"
    outcomes: list[Any] = gather((outcome, failure))
    if failures := [failure for _, failure in outcomes if failure]:
        raise CheckpointWriteError(failures[0])
    return [result for result, _ in outcomes]


def _first_cause(error: CheckpointException) -> str:
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    return f"rank {rank}: {str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__}"


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _below(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
