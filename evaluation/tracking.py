"""Log a finished evaluation to Weights & Biases, as a run of job type `evaluation`.

The summary has `<table>/<metric>/<system>`, the table `scores` the rows of results.json, and the artifact the results,
samples and report. If no server answers, the run is logged offline for `wandb sync`.
"""

import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import wandb
from wandb.errors import CommError, UsageError

from evaluation.scores.results import Score
from kosmosg.files import write_text

STORED = ("results.json", "results.md", "samples.csv", "breakdown.csv", "report.html", "provenance.json")
LOGGED = "wandb.logged"
COLUMNS = ("table", "system", "metric", "value", "low", "high", "n", "protocol", "guidance_scale")

logger = logging.getLogger(__name__)


@dataclass
class Tracking:
    mode: Literal["disabled", "offline", "online"] = "disabled"
    """disabled: no logging; offline: to the output folder, for `wandb sync`; online: to the server."""
    project: str = "kosmosg"
    """Project of the run."""
    group: str | None = None
    """Group of the run; null uses `evaluation`."""
    name: str | None = None
    """Name of the run; null uses the name of the output folder's parent."""
    timeout: float = 30.0
    """Seconds to wait for the server at the start and for the upload at the end."""

    def __post_init__(self) -> None:
        if self.timeout <= 0:
            raise ValueError(f"wandb.timeout={self.timeout} is not allowed; it must be above 0.")


def track(tracking: Tracking, output: Path, scores: Sequence[Score], config: dict[str, Any]) -> None:
    """Log the evaluation in `output`, unless these results have been logged already.

    In a sweep, the run is the agent's. Otherwise its random id is stored in the folder, so that repeated evaluations
    update the same run.

    Args:
        config: content of provenance.json; its `key` identifies the results.
    """
    logged = output / LOGGED
    if tracking.mode == "disabled" or (logged.is_file() and logged.read_text() == config["key"]):
        return
    try:
        run = start(tracking, output, config, tracking.mode)
    except (CommError, UsageError) as error:
        if tracking.mode == "offline":
            raise
        wandb.teardown()  # it still holds the run's id
        logger.warning(
            "W&B cannot be reached (%s). The evaluation is logged offline; 'wandb sync' uploads it from '%s'.",
            str(error).splitlines()[0],
            output / "wandb",
        )
        run = start(tracking, output, config, "offline")
    try:
        rows = [asdict(score) for score in scores]
        run.log({"scores": wandb.Table(columns=list(COLUMNS), data=[[row[name] for name in COLUMNS] for row in rows])})
        run.summary.update({summary_key(score): score.value for score in scores})
        protocols = list(dict.fromkeys(score.protocol for score in scores))
        artifact = wandb.Artifact(f"evaluation-{run.id}", type="evaluation", metadata={"protocols": protocols})
        for name in STORED:
            if (output / name).is_file():
                artifact.add_file(str(output / name))
        run.log_artifact(artifact)
    finally:
        run.finish()
    write_text(logged, config["key"])


def start(tracking: Tracking, output: Path, config: dict[str, Any], mode: Literal["offline", "online"]) -> wandb.Run:
    """Start the W&B run. Raises CommError or UsageError if no server answers or it rejects the key."""
    resolved = output.resolve()
    return wandb.init(
        project=tracking.project,
        group=tracking.group or "evaluation",
        job_type="evaluation",
        name=tracking.name or resolved.parent.name,
        id=os.environ.get("WANDB_RUN_ID") or run_id(output),  # the agent's in a sweep
        dir=output,
        mode=mode,
        resume="allow",
        config=config,
        settings=wandb.Settings(
            x_disable_meta=True,  # its command line may contain secrets
            console="off",
            silent=mode == "offline",
            init_timeout=tracking.timeout,
            login_timeout=tracking.timeout,
            finish_timeout=tracking.timeout,
        ),
    )


def run_id(output: Path) -> str:
    """Return the run id stored in the folder, creating it at first use."""
    file = output / "wandb.id"
    if not file.is_file():
        write_text(file, secrets.token_hex(6))
    return file.read_text().strip()


def summary_key(score: Score) -> str:
    """Return `<table>/<metric>/<system>`, with the guidance scale for points of the curve."""
    point = "" if score.guidance_scale is None else f"/{score.guidance_scale:g}"
    return f"{score.table}/{score.metric}/{score.system}{point}"
