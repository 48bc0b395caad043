"""How a run uses its devices: alone, by whole copies (ddp), or with parameters sharded over all processes (fsdp2).

All three write and read the same checkpoints (checkpoint_folder.py), so a run may go on with another strategy or number
of processes. A checkpoint holds tensors under `model.`, `optimizer.` and, with an average of the weights, `ema.`,
named as the parameters are.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lightning_modules.runs.checkpoint_folder import read_state, write_checkpoint
from lightning_modules.runs.tensor_storage import load_tensors, read_index
from lightning_modules.runs.trained_weights import check_trained, trained_parameters

MODEL, OPTIMIZER, EMA = "model.", "optimizer.", "ema."


class FolderCheckpoints(Strategy):
    """Goes before one of Lightning's strategies: checkpoints are folders that all processes write and read together."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # when the parameters lie on their devices, sharded or not

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False  # done by load_checkpoint

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The tensors that train, as they lie on this process."""
        return {name: parameter.detach() for name, parameter in self._trained().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Groups as in the optimiser's own state; its tensors as `<parameter>.<key>`."""
        names = {id(parameter): name for name, parameter in self._trained().items()}
        tensors = {
            f"{names[id(parameter)]}.{key}": value
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }
        return {"param_groups": optimizer.state_dict()["param_groups"], "tensors": tensors}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the folder. Raises CheckpointWriteError on all processes alike."""
        states = checkpoint.pop("optimizer_states")
        tensors = _prefixed(MODEL, checkpoint.pop("state_dict")) | _prefixed(EMA, checkpoint.pop("ema", {}))
        for state in states:
            tensors |= _prefixed(OPTIMIZER, state["tensors"])
        checkpoint["param_groups"] = [state["param_groups"] for state in states]
        write_checkpoint(Path(filepath), tensors, checkpoint)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill the parameters and the optimiser; the plain values, and under `ema` the average if there is one.

        Raises:
            CheckpointMismatchError: a checkpoint of another model.
            StorageError: what cannot be read, or is refused.
        """
        folder = Path(self.broadcast(str(checkpoint_path)))
        module, state, index = self._module(), read_state(folder), read_index(folder)
        shapes = {name: tuple(entry["shape"]) for name, entry in index.items()}
        check_trained(module, _below(MODEL, shapes), f"'{folder}'")
        parameters = trained_parameters(module)
        targets = {f"{MODEL}{name}": parameter.detach() for name, parameter in parameters.items()}
        average = {name: empty_average(parameters[name]) for name in _below(EMA, shapes)}
        targets |= _prefixed(EMA, average)
        states: dict[str, dict[str, Tensor]] = {}
        for place, shape in _below(OPTIMIZER, shapes).items():
            name, _, key = place.rpartition(".")
            target = torch.empty_like(parameters[name]) if shape else torch.empty(())
            states.setdefault(name, {})[key] = targets[f"{OPTIMIZER}{place}"] = target.detach()
        load_tensors(folder, targets)
        for optimizer, groups in zip(self.optimizers, state.pop("param_groups"), strict=True):
            numbers = {id(parameter): number for number, parameter in enumerate(_parameters_of(optimizer))}
            by_number = {numbers[id(parameters[name])]: values for name, values in states.items()}
            optimizer.load_state_dict({"state": by_number, "param_groups": groups})
        return {**state, "ema": average}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Done by load_checkpoint."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Done by load_checkpoint."""

    def _module(self) -> nn.Module:
        assert self.lightning_module is not None
        return self.lightning_module

    def _trained(self) -> dict[str, nn.Parameter]:
        return trained_parameters(self._module())


class SingleDevice(FolderCheckpoints, SingleDeviceStrategy):
    """One process, one device."""


class WholeCopies(FolderCheckpoints, DDPStrategy):
    """Every process has the whole model; gradients are averaged."""


class Sharded(FolderCheckpoints, ModelParallelStrategy):
    """FSDP2: parameters, gradients and the optimiser's states are divided among the processes."""

    def _trained(self) -> dict[str, nn.Parameter]:
        # A validation leaves the last layers gathered, since no backward pass follows that would divide them again.
        for module in self._module().modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return super()._trained()


def build_strategy(name: str, accelerator: str, processes: int) -> Strategy:
    """The strategy of `trainer.strategy`: auto is one device alone, and fsdp2 beyond one."""
    if name == "fsdp2" or (name == "auto" and processes > 1):
        return Sharded(data_parallel_size=processes, tensor_parallel_size=1)
    if name == "ddp":
        return WholeCopies()
    return SingleDevice(single_device(accelerator))


def single_device(accelerator: str) -> torch.device:
    """The first device of `accelerator`; of the best there is for auto and gpu."""
    best = torch.accelerator.current_accelerator(check_available=True)
    kind = {"auto": best.type if best else "cpu", "gpu": best.type if best else "cuda"}.get(accelerator, accelerator)
    return torch.device(kind) if kind == "cpu" else torch.device(kind, 0)


def empty_average(parameter: Tensor) -> Tensor:
    """Room for the average of a parameter, sharded as it is; float32 whatever the parameter's precision."""
    return torch.empty_like(parameter.detach(), dtype=torch.float32)


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _below(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
