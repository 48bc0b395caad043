"""Weights & Biases: losses, learning rate, gradient norm, throughput and image grids. Offline unless told otherwise.

Offline runs lie in the run folder's `wandb/`; `wandb sync` uploads them later. No key is ever needed here. A server
that does not answer never stops a training run, and keeps it waiting for `wandb.timeout` seconds at most: at the start
the run is logged offline instead, later what was not uploaded stays on disk.
"""

import logging
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import requests
import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from kosmosg.files import write_text


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
    timeout: float = 5.0
    """Seconds that the server may keep a run waiting at its start, and again at its end."""

    def __post_init__(self) -> None:
        if self.timeout <= 0:
            raise ValueError(f"wandb.timeout is {self.timeout}; allowed: above 0")


logger = logging.getLogger(__name__)


class RunWandbLogger(WandbLogger):
    """Ends its run with the training, and not when the process happens to exit; offline where no server answers."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run."""
        try:
            return super().experiment
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            wandb.teardown()  # which still holds the run's id
            self.go_offline(str(error))
            return super().experiment

    def go_offline(self, why: str) -> None:
        """Log to disk alone, from a run on that has not begun."""
        logger.warning(
            "W&B cannot be reached (%s). The run is logged offline; 'wandb sync' uploads it from '%s'.",
            why.splitlines()[0],
            Path(self.save_dir or ".") / "wandb",
        )
        self._wandb_init["mode"] = "offline"
        self._wandb_init["settings"].silent = True

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(status != "success"))
            self._experiment = None


def wandb_logger(config: WandbConfig, run: Path, stage: str, written: dict[str, Any]) -> WandbLogger | None:
    """The logger of run folder `run`; None when disabled.

    The id is random and kept in the run folder, so that a resumed run continues the same W&B run; in a sweep it is the
    one that W&B's agent gave.

    Args:
        written: the configuration as it was written, without secrets: the run's parameters.
    """
    if config.mode == "disabled":
        return None
    # Our own lines stay as they are on the terminal; offline there is no address to tell either.
    settings = wandb.Settings(
        console="off",
        silent=config.mode == "offline",
        init_timeout=config.timeout,
        login_timeout=config.timeout,
        finish_timeout=config.timeout,
    )
    # `mode` and not `offline=True`, which Lightning puts into the environment of all later loggers.
    found = RunWandbLogger(
        project=config.project,
        name=config.name or run.name,
        id=os.environ.get("WANDB_RUN_ID") or run_id(run),
        save_dir=run,
        mode=config.mode,
        resume="allow",
        group=config.group or stage,
        job_type=config.job_type,
        tags=list(config.tags),
        settings=settings,
    )
    if config.mode == "online" and (why := unreachable(config.timeout)):
        found.go_offline(why)
    found.log_hyperparams(written)
    return found


@rank_zero_only
def run_id(run: Path) -> str:
    """The folder's id, made at its first start."""
    file = run / "wandb.id"
    if not file.is_file():
        write_text(file, secrets.token_hex(6))
    return file.read_text().strip()


def unreachable(timeout: float) -> str | None:
    """Why no server answers, or None where one does. wandb itself asks several times, each as long as it may."""
    url = wandb.setup().settings.base_url
    try:
        with requests.get(url, timeout=timeout, stream=True) as answer:
            return f"{url} answers {answer.status_code}" if answer.status_code >= 500 else None
    except requests.RequestException as error:
        return f"{url}: {type(error).__name__}"
