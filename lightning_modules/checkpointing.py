"""Checkpoints as folders of safetensors and JSON, written atomically and verified by checksums before they are loaded.

step-00000500/
  shard-*.safetensors  trainable weights, their moving average and optimizer states, one file per rank
  state.json           step, number of skipped steps, fingerprint of the data and other plain values
  manifest.json        size and SHA-256 of each of these files

A checkpoint is written to a temporary folder, fsynced and renamed, so it is either complete or absent. One device, DDP
and FSDP2 use the same format: a run can be resumed with another strategy or number of ranks. Several nodes need a
shared file system. Tensors are named by the parameter with the prefix `model.`, `optimizer.` or `ema.`.
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
NAMED_IN_ERRORS = 3  # tensors


class CheckpointWriteError(OSError):
    """A checkpoint could not be written. Its files are removed, and earlier checkpoints are intact."""


class CheckpointDamagedError(ValueError):
    """Files of a checkpoint are missing, changed or unreadable."""


class CheckpointMismatchError(ValueError):
    """The checkpoint is of another model or stage."""


# Reading and writing checkpoint folders.
def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` optimizer steps; names sort by step."""
    return f"step-{step:08d}"


def checkpoint_step(folder: Path) -> int:
    """Return the number of optimizer steps of a checkpoint, from its name."""
    return int(folder.name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, oldest first; files and other names are ignored."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir())


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write the checkpoint `folder`. All ranks must call it together, with the same `state`.

    Args:
        tensors: replicated or sharded over the ranks.
        state: values that JSON can represent.

    Raises:
        CheckpointWriteError: writing failed on some rank; raised on all ranks.
    """
    temporary = folder.with_name(f".{folder.name}")
    try:
        _on_ranks(lambda: _create_temporary(temporary), rank_zero_only=True)
        _on_ranks(lambda: _save_tensors(temporary, tensors))
        # Each rank reads back and hashes its own file.
        checksums = _on_ranks(lambda: _checksums(temporary, f"shard-{_rank() + 1:05d}-*"))
        _on_ranks(lambda: _finalize(temporary, folder, state, checksums), rank_zero_only=True)
    except CheckpointWriteError:
        if _rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the `keep` latest checkpoints. Each is renamed first, so that it is never found half removed."""
    for old in checkpoints(folder)[:-keep]:
        if old.is_symlink():
            old.unlink()
            continue
        removed = old.with_name(f".{old.name}.removed")
        old.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def verify(folder: Path) -> None:
    """Compare the files of a checkpoint with its manifest. Files that are never read, such as `.DS_Store`, are ignored.

    Raises:
        CheckpointDamagedError: names each file that is missing, changed or unexpected.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
        version, listed = manifest["format"], manifest["files"]
        expected = {str(name): (int(file["bytes"]), str(file["sha256"])) for name, file in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointDamagedError(f"'{folder / MANIFEST_FILE}' cannot be read: {error}") from error
    if version != FORMAT:
        raise CheckpointDamagedError(f"'{folder}' has checkpoint format {version}; this version reads format {FORMAT}")
    problems = []
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size} bytes instead of {size}")
        elif _digest(file) != digest:
            problems.append(f"{name} does not match its checksum")
    unexpected = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in expected)
    problems += [f"{name} does not belong there" for name in unexpected]
    if problems:
        raise CheckpointDamagedError(f"'{folder}' is damaged: {'; '.join(problems)}")


def read_state(folder: Path) -> dict[str, Any]:
    """Read the plain values in state.json. Raises CheckpointDamagedError."""
    try:
        return json.loads((folder / STATE_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointDamagedError(f"'{folder / STATE_FILE}' cannot be read: {error}") from error


def read_shapes(folder: Path) -> dict[str, torch.Size]:
    """Read the shape of each tensor. Raises CheckpointDamagedError."""
    try:
        return {
            name: tensor.size  # type: ignore[union-attr]
            for name, tensor in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items()
        }
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointDamagedError(f"the tensors in '{folder}' cannot be read: {error}") from error


def load_tensors(folder: Path, targets: Mapping[str, Tensor], *, alone: bool = False) -> None:
    """Load tensors in place into `targets`, replicated or sharded. All ranks must call it together, unless `alone`.

    Raises:
        CheckpointDamagedError: a tensor is missing or cannot be read.
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


# Loading weights into a module.
def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def load_weights(checkpoint: Path, module: nn.Module, average: bool = False) -> None:
    """Load the trainable weights of an unsharded `module` from a checkpoint written by any number of ranks.

    Args:
        average: load the moving average of the weights instead.

    Raises:
        CheckpointMismatchError: the checkpoint is of another model, or has no moving average.
    """
    prefix = EMA if average else MODEL
    shapes = _strip_prefix(prefix, read_shapes(checkpoint))
    if average and not shapes:
        raise CheckpointMismatchError(
            f"'{checkpoint}' has no moving average of the weights; it was trained with ema.decay=0"
        )
    _require_same_model(module, shapes, checkpoint)
    targets = {f"{prefix}{name}": parameter.detach() for name, parameter in trainable_parameters(module).items()}
    load_tensors(checkpoint, targets, alone=True)


def _require_same_model(module: nn.Module, shapes: Mapping[str, torch.Size], checkpoint: Path) -> None:
    """Raises CheckpointMismatchError: trainable parameters and tensors differ; names the first differences."""
    expected = {name: parameter.shape for name, parameter in trainable_parameters(module).items()}
    problems = [f"{name} is missing" for name in expected if name not in shapes]
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


# Lightning's strategies, with checkpoints in this format.
class FolderCheckpoints(Strategy):
    """Mixin for Lightning's strategies: all ranks write and read a checkpoint folder together."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # after the parameters were moved to their devices and sharded

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False  # done by load_checkpoint

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trainable parameters, sharded or whole as they are on this rank."""
        return {name: parameter.detach() for name, parameter in self._trainable().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Optimizer states as `<parameter>.<key>`. Hyperparameters come from the configuration instead."""
        names = {id(parameter): name for name, parameter in self._trainable().items()}
        return {
            f"{names[id(parameter)]}.{key}": value
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the checkpoint folder. Raises CheckpointWriteError on all ranks."""
        tensors = _add_prefix(MODEL, checkpoint.pop("state_dict")) | _add_prefix(EMA, checkpoint.pop("ema", {}))
        for state in checkpoint.pop("optimizer_states"):
            tensors |= _add_prefix(OPTIMIZER, state)
        write_checkpoint(Path(filepath), tensors, checkpoint)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load parameters and optimizer states in place; returns the plain values, and the moving average as `ema`.

        Raises:
            CheckpointMismatchError: the checkpoint is of another model, or of another optimizer.
            CheckpointDamagedError: a file cannot be read.
        """
        folder = Path(self.broadcast(str(checkpoint_path)))
        assert self.lightning_module is not None
        state, shapes = read_state(folder), read_shapes(folder)
        _require_same_model(self.lightning_module, _strip_prefix(MODEL, shapes), folder)
        parameters = self._trainable()
        targets = {f"{MODEL}{name}": parameter.detach() for name, parameter in parameters.items()}
        average = {name: empty_average(parameters[name]) for name in _strip_prefix(EMA, shapes)}
        targets |= _add_prefix(EMA, average)
        optimizer: Any = self.optimizers[0]
        written = _strip_prefix(OPTIMIZER, shapes)
        for name in {key.rpartition(".")[0] for key in written}:  # empty before the first step
            optimizer.state[parameters[name]] = optimizer.empty_state(parameters[name])
        states = self.optimizer_state(optimizer)
        if states.keys() != written.keys():
            raise CheckpointMismatchError(
                f"'{folder}' has optimizer states {sorted(written)[:NAMED_IN_ERRORS]} …, but this run expects "
                f"{sorted(states)[:NAMED_IN_ERRORS]} …: use the optimizer.eight_bit it was trained with."
            )
        load_tensors(folder, targets | _add_prefix(OPTIMIZER, states))
        return {**state, "ema": average}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Done by load_checkpoint."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Done by load_checkpoint."""

    def _trainable(self) -> dict[str, nn.Parameter]:
        assert self.lightning_module is not None
        return trainable_parameters(self.lightning_module)


class SingleDevice(FolderCheckpoints, SingleDeviceStrategy):
    """Training on one device."""


class Replicated(FolderCheckpoints, DDPStrategy):
    """DDP: parameters are replicated and gradients averaged."""


class Sharded(FolderCheckpoints, ModelParallelStrategy):
    """FSDP2: parameters, gradients and optimizer states are sharded over the ranks."""

    def _trainable(self) -> dict[str, nn.Parameter]:
        # A validation leaves the last layers gathered, because resharding happens in the backward pass.
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return super()._trainable()


def build_strategy(name: str, accelerator: str, world_size: int) -> Strategy:
    """Build the strategy: `fsdp2`, `ddp`, or a single device for any other name."""
    if name == "fsdp2":
        return Sharded(data_parallel_size=world_size, tensor_parallel_size=1)
    if name == "ddp":
        return Replicated()
    best = torch.accelerator.current_accelerator(check_available=True)
    kind = {"auto": best.type if best else "cpu", "gpu": best.type if best else "cuda"}.get(accelerator, accelerator)
    return SingleDevice(torch.device(kind) if kind == "cpu" else torch.device(kind, 0))


def empty_average(parameter: Tensor) -> Tensor:
    """Return an uninitialised float32 tensor with the shape and sharding of a parameter, for its moving average."""
    return torch.empty_like(parameter.detach(), dtype=torch.float32)


def _create_temporary(temporary: Path) -> None:
    """Create the temporary folder and remove those of interrupted saves and removals."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for path in temporary.parent.iterdir():
        if TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path)
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


def _finalize(temporary: Path, folder: Path, state: Mapping[str, Any], checksums: list[dict[str, Any]]) -> None:
    (temporary / STATE_FILE).write_text(json.dumps(state, indent=1))
    files = {name: entry for rank in checksums for name, entry in rank.items()} | _checksums(temporary, STATE_FILE)
    manifest = {"format": FORMAT, "step": checkpoint_step(folder), "ranks": len(checksums), "files": files}
    (temporary / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))
    if folder.is_symlink():
        folder.unlink()
    for path in (temporary / STATE_FILE, temporary / MANIFEST_FILE, temporary):  # dcp has fsynced the tensors
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


def _on_ranks(action: Callable[[], Outcome], rank_zero_only: bool = False) -> list[Outcome]:
    """Run `action` on all ranks, or on rank 0 only; returns the results by rank. A failure on one raises on all."""
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


def _add_prefix(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _strip_prefix(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
