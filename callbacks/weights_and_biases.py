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
import wandb.errors
from lightning.pytorch.loggers import WandbLogger
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
    """Ends its run with the training, and not when the process happens to exit."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        self.experiment.finish(exit_code=int(status != "success"))


def wandb_logger(config: WandbConfig, run: Path, stage: str, written: dict[str, Any]) -> WandbLogger | None:
    """The logger of run folder `run`; None when disabled, and on ranks other than the first.

    The id is random and kept in the run folder, so that a resumed run continues the same W&B run; in a sweep it is the
    one that W&B's agent gave.

    Args:
        written: the configuration as it was written, without secrets: the run's parameters.
    """
    if config.mode == "disabled" or rank_zero_only.rank != 0:
        return None
    mode: Any = config.mode
    if mode == "online" and (why := unreachable(config.timeout)):
        mode = offline_because(why, run)
    options: dict[str, Any] = {
        "project": config.project,
        "name": config.name or run.name,
        "id": os.environ.get("WANDB_RUN_ID") or run_id(run),
        "dir": run,
        "resume": "allow",
        "group": config.group or stage,
        "job_type": config.job_type,
        "tags": list(config.tags),
        "config": written,
    }
    try:
        started = wandb.init(mode=mode, settings=settings(config, mode), **options)
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        wandb.teardown()  # which still holds the run's id
        mode = offline_because(str(error), run)
        started = wandb.init(mode=mode, settings=settings(config, mode), **options)
    return RunWandbLogger(experiment=started)


def settings(config: WandbConfig, mode: str) -> wandb.Settings:
    """Our own lines stay as they are on the terminal; offline there is no address to print either.

    The metadata would record the command line, and with it what the configuration hides.
    """
    return wandb.Settings(
        x_disable_meta=True,
        console="off",
        silent=mode == "offline",
        init_timeout=config.timeout,
        login_timeout=config.timeout,
        finish_timeout=config.timeout,
    )


def offline_because(why: str, run: Path) -> str:
    """The offline mode, said aloud."""
    logger.warning(
        "W&B cannot be reached (%s). The run is logged offline; 'wandb sync' uploads it from '%s'.",
        why.splitlines()[0],
        run / "wandb",
    )
    return "offline"


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
