"""A finished evaluation in Weights & Biases: a run of job type `evaluation` with its table and an artifact.

Summary: `<table>/<metric>/<system>`. Table `scores`: the rows of results.json. Artifact: results, samples and report.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import wandb

from evaluation.scores.results import Score

STORED = ("results.json", "results.md", "samples.csv", "breakdown.csv", "report.html", "provenance.json")
AGENTS_RUN = "WANDB_RUN_ID"
COLUMNS = ("table", "system", "metric", "value", "low", "high", "n", "protocol", "guidance_scale")


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


def track(tracking: Tracking, output: Path, scores: Sequence[Score], config: dict[str, Any]) -> None:
    """Log the evaluation in `output`. The run is that of a sweep's agent, if one started this; else its id is the
    folder's, so that a repeated evaluation is one run."""
    if tracking.mode == "disabled":
        return
    resolved = output.resolve()
    run = wandb.init(
        project=tracking.project,
        group=tracking.group or "evaluation",
        job_type="evaluation",
        name=tracking.name or resolved.parent.name,
        id=os.environ.get(AGENTS_RUN) or hashlib.sha256(str(resolved).encode()).hexdigest()[:12],
        dir=output,
        mode=tracking.mode,
        resume="allow",
        config=config,
        settings=wandb.Settings(console="off", silent=tracking.mode == "offline"),
    )
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


def summary_key(score: Score) -> str:
    """`dreambench/dino/KOSMOS-G after stage 3`; points of the curve end with their guidance scale."""
    point = "" if score.guidance_scale is None else f"/{score.guidance_scale:g}"
    return f"{score.table}/{score.metric}/{score.system}{point}"


def protocols(scores: Sequence[Score]) -> list[str]:
    """Every protocol of the scores, once."""
    return list(dict.fromkeys(score.protocol for score in scores))
