"""Weights & Biases: losses, learning rate, gradient norm, throughput and picture grids. Offline unless told otherwise.

Offline runs lie in the run folder's `wandb/`; `wandb sync` uploads them later. No key is ever needed here.
"""

import hashlib
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only


@dataclass
class WandbConfig:
    mode: Literal["offline", "online", "disabled"] = "offline"
    """offline: into the run folder; online: to the server, with the key that wandb finds; disabled: nothing."""
    project: str = "kosmosg"
    """Project of the run."""
    group: str | None = None
    """Group of the run; null is the name of the experiment's stage."""
    job_type: str = "train"
    """Kind of the run within its group."""
    name: str | None = None
    """Name shown for the run; null is the name of the run folder."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""


class RunWandbLogger(WandbLogger):
    """Ends its run with the training, and not when the process happens to exit."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(status != "success"))
            self._experiment = None


def wandb_logger(config: WandbConfig, run: Path, experiment: Any) -> WandbLogger | None:
    """The logger of run folder `run`, whose parameters are the dataclass `experiment`; None when disabled.

    The id is the folder's, so that a resumed run goes on in the same W&B run; in a sweep it is the one that W&B's agent
    gave.
    """
    if config.mode == "disabled":
        return None
    # `mode` and not `offline=True`, which Lightning puts into the environment of all later loggers.
    logger = RunWandbLogger(
        project=config.project,
        name=config.name or run.name,
        id=os.environ.get("WANDB_RUN_ID") or hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12],
        save_dir=run,
        mode=config.mode,
        resume="allow",
        group=config.group or experiment.stage,
        job_type=config.job_type,
        tags=list(config.tags),
        # Our own lines stay as they are on the terminal; offline there is no address to tell either.
        settings=wandb.Settings(console="off", silent=config.mode == "offline"),
    )
    logger._wandb_init.pop("anonymous", None)  # Lightning passes it as None, and wandb warns of it on every start
    logger.log_hyperparams(asdict(experiment))
    return logger
