"""A checkpoint to a model folder, while its run goes on or after it: python train.py export RUN output=FOLDER …"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kosmosg.config import ConfigError, load_config
from kosmosg.tokenizer import Tokenizer
from lightning_modules.base import build_stage
from lightning_modules.runs.checkpoint_folder import checkpoint_name, require_intact
from lightning_modules.runs.consolidation import load_whole
from lightning_modules.runs.run_folder import RunFolder

WEIGHTS = ("ema", "raw")


def export(arguments: Sequence[str], schema: Callable[[dict[str, Any]], type]) -> str:
    """Write the folder; what was done, in a sentence.

    Args:
        arguments: RUN output=FOLDER [step=N] [weights=ema|raw]; the last checkpoint and the run's own choice of weights
            by default.
        schema: gives the schema of the run's configuration.

    Raises:
        ConfigError: arguments that are missing, unknown or not allowed; no checkpoint.
        CheckpointDamagedError, CheckpointMismatchError: what the checkpoint holds is of no use.
    """
    runs = [argument for argument in arguments if "=" not in argument]
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    output, step, weights = options.pop("output", None), options.pop("step", None), options.pop("weights", None)
    if len(runs) != 1 or output is None or options:
        raise ConfigError("export takes a run folder and output=FOLDER; step=N and weights=ema or raw may be added.")
    if weights not in (None, *WEIGHTS) or not (step is None or step.isdecimal()):
        raise ConfigError(
            f"export: step={step} weights={weights} is not allowed; step is a number, weights ema or raw."
        )
    experiment, run = load_config(runs, schema), RunFolder(runs[0])
    checkpoint = run.checkpoints / checkpoint_name(int(step)) if step else run.latest_checkpoint()
    if checkpoint is None:
        raise ConfigError(f"run folder '{run.path}' holds no checkpoint yet.")
    require_intact(checkpoint)
    try:
        tokenizer = Tokenizer.from_pretrained(Path(experiment.model.tokenizer))
        module = build_stage(experiment, tokenizer)
    except (ValueError, FileNotFoundError) as error:  # parts that are missing or do not fit, named by the message
        raise ConfigError(str(error)) from error
    average = experiment.ema.exported if weights is None else weights == "ema"
    load_whole(checkpoint, module, average).save_model(Path(output), tokenizer)
    return f"The {'average' if average else 'weights'} of '{checkpoint}' are the model in '{output}'."
