"""Weights & Biases logging of losses, learning rate, gradient norm, throughput and image grids.

By default runs are logged offline, in the run folder's `wandb/`, without an API key; `wandb sync` uploads them later. A
server that does not respond never stops training; it delays the start and the end by at most `wandb.timeout` seconds.
If it does not respond at the start, the run is logged offline; later, metrics that were not uploaded stay on disk.
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
    """offline: log to the run folder; online: also to the server, with wandb's usual API key; disabled: do not log."""
    project: str = "kosmosg"
    """W&B project of the run."""
    group: str | None = None
    """Group of the run; null: the name of the stage."""
    job_type: str = "train"
    """Job type of the run within its group."""
    name: str | None = None
    """Display name of the run; null: the name of the run folder."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""
    timeout: float = 5.0
    """Maximal wait for the server in seconds, at the start and again at the end of the run."""

    def __post_init__(self) -> None:
        if self.timeout <= 0:
            raise ValueError(f"wandb.timeout is {self.timeout}; allowed: above 0")


logger = logging.getLogger(__name__)


class RunWandbLogger(WandbLogger):
    """Finishes the W&B run when training ends, rather than when the process exits."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        self.experiment.finish(exit_code=int(status != "success"))


def wandb_logger(config: WandbConfig, run: Path, stage: str, written: dict[str, Any]) -> WandbLogger | None:
    """Build the logger of run folder `run`; returns None if disabled, and on ranks other than 0.

    The W&B run id is random and stored in the run folder, so that a resumed run continues the same W&B run. In a sweep
    it is the one set by W&B's agent.

    Args:
        written: the configuration as written, without secrets; logged as the run's parameters.
    """
    if config.mode == "disabled" or rank_zero_only.rank != 0:
        return None
    mode: Any = config.mode
    if mode == "online" and (reason := unreachable(config.timeout)):
        mode = fall_back_offline(reason, run)
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
        experiment = wandb.init(mode=mode, settings=settings(config, mode), **options)
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        wandb.teardown()  # releases the run id
        mode = fall_back_offline(str(error), run)
        experiment = wandb.init(mode=mode, settings=settings(config, mode), **options)
    return RunWandbLogger(experiment=experiment)


def settings(config: WandbConfig, mode: str) -> wandb.Settings:
    """Settings without console capture and without metadata, which would record secrets on the command line."""
    return wandb.Settings(
        x_disable_meta=True,
        console="off",
        silent=mode == "offline",
        init_timeout=config.timeout,
        login_timeout=config.timeout,
        finish_timeout=config.timeout,
    )


def fall_back_offline(reason: str, run: Path) -> str:
    """Log a warning and return the offline mode."""
    logger.warning(
        "W&B cannot be reached (%s). The run is logged offline; 'wandb sync' uploads it from '%s'.",
        reason.splitlines()[0],
        run / "wandb",
    )
    return "offline"


def run_id(run: Path) -> str:
    """Read the W&B run id of a run folder, or create it."""
    file = run / "wandb.id"
    if not file.is_file():
        write_text(file, secrets.token_hex(6))
    return file.read_text().strip()


def unreachable(timeout: float) -> str | None:
    """Return why the server does not respond, or None if it does. wandb itself would retry several times."""
    url = wandb.setup().settings.base_url
    try:
        with requests.get(url, timeout=timeout, stream=True) as response:
            return f"{url} responds with {response.status_code}" if response.status_code >= 500 else None
    except requests.RequestException as error:
        return f"{url}: {type(error).__name__}"
