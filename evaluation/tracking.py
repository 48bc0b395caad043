"""A finished evaluation in Weights & Biases: a run of job type `evaluation` with its table and an artifact.

Summary: `<table>/<metric>/<system>`. Table `scores`: the rows of results.json. Artifact: results, samples and report.
The results are written before; where no server answers, the run is logged offline for `wandb sync`.
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
AGENTS_RUN = "WANDB_RUN_ID"
COLUMNS = ("table", "system", "metric", "value", "low", "high", "n", "protocol", "guidance_scale")

logger = logging.getLogger(__name__)


@dataclass
class Tracking:
    mode: Literal["disabled", "offline", "online"] = "disabled"
    """disabled: nothing; offline: into the output folder, for `wandb sync`; online: to the server."""
    project: str = "kosmosg"
    """Project of the run."""
    group: str | None = None
    """Group of the run; null is `evaluation`."""
    name: str | None = None
    """Name shown for the run; null is the name of the output folder's parent."""
    timeout: float = 30.0
    """Seconds that a server may take to answer at the start and to take the rest at the end."""

    def __post_init__(self) -> None:
        if self.timeout <= 0:
            raise ValueError(f"wandb.timeout={self.timeout} is not allowed; it must be above 0.")


def track(tracking: Tracking, output: Path, scores: Sequence[Score], config: dict[str, Any]) -> None:
    """Log the evaluation in `output`, unless these results are logged already. The run is that of a sweep's agent, if
    one started this; else its id is random and kept in the folder, so that a repeated evaluation is one run.

    Args:
        config: what provenance.json holds; its `key` tells the results.
    """
    logged = output / LOGGED
    if tracking.mode == "disabled" or (logged.is_file() and logged.read_text() == config["key"]):
        return
    try:
        run = start(tracking, output, config, tracking.mode)
    except (CommError, UsageError) as error:
        if tracking.mode == "offline":
            raise
        wandb.teardown()  # which still holds the run's id
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
        artifact = wandb.Artifact(f"evaluation-{run.id}", type="evaluation", metadata={"protocols": protocols(scores)})
        for name in STORED:
            if (output / name).is_file():
                artifact.add_file(str(output / name))
        run.log_artifact(artifact)
    finally:
        run.finish()
    write_text(logged, config["key"])


def start(tracking: Tracking, output: Path, config: dict[str, Any], mode: Literal["offline", "online"]) -> wandb.Run:
    """The evaluation's run. Raises CommError or UsageError: no server answers, or it does not know the key."""
    resolved = output.resolve()
    return wandb.init(
        project=tracking.project,
        group=tracking.group or "evaluation",
        job_type="evaluation",
        name=tracking.name or resolved.parent.name,
        id=os.environ.get(AGENTS_RUN) or run_id(output),
        dir=output,
        mode=mode,
        resume="allow",
        config=config,
        settings=wandb.Settings(
            x_disable_meta=True,  # it would record the command line, and with it what the configuration hides
            console="off",
            silent=mode == "offline",
            init_timeout=tracking.timeout,
            login_timeout=tracking.timeout,
            finish_timeout=tracking.timeout,
        ),
    )


def run_id(output: Path) -> str:
    """The folder's id, made when it is first logged."""
    file = output / "wandb.id"
    if not file.is_file():
        write_text(file, secrets.token_hex(6))
    return file.read_text().strip()


def summary_key(score: Score) -> str:
    """`dreambench/dino/KOSMOS-G after stage 3`; points of the curve end with their guidance scale."""
    point = "" if score.guidance_scale is None else f"/{score.guidance_scale:g}"
    return f"{score.table}/{score.metric}/{score.system}{point}"


def protocols(scores: Sequence[Score]) -> list[str]:
    """Every protocol of the scores, once."""
    return list(dict.fromkeys(score.protocol for score in scores))
