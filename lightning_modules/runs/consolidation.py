"""From a checkpoint, of however many processes, to a module with whole weights."""

from pathlib import Path

from lightning_modules.base import StageModule
from lightning_modules.runs.tensor_storage import load_tensors, read_index
from lightning_modules.runs.trained_weights import CheckpointMismatchError, check_trained, trained_parameters
from lightning_modules.scale.strategies import EMA, MODEL


def load_whole(checkpoint: Path, module: StageModule, average: bool = False) -> StageModule:
    """Fill what trains in `module`, which was built afresh, from a checkpoint; the frozen rest is as it was built.

    Args:
        average: take the average of the weights instead of the weights.

    Raises:
        CheckpointMismatchError: the checkpoint is another model's, or has no average.
    """
    prefix = EMA if average else MODEL
    index = read_index(checkpoint)
    shapes = {name.removeprefix(prefix): entry["shape"] for name, entry in index.items() if name.startswith(prefix)}
    if average and not shapes:
        raise CheckpointMismatchError(
            f"'{checkpoint}' holds no average of the weights; it was trained with ema.decay=0"
        )
    check_trained(module, {name: tuple(shape) for name, shape in shapes.items()}, f"'{checkpoint}'")
    targets = {f"{prefix}{name}": parameter.detach() for name, parameter in trained_parameters(module).items()}
    load_tensors(checkpoint, targets, alone=True)
    return module
