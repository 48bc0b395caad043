"""The run folder: configuration, software versions, checkpoints, metrics and results of one training run.

config.yaml    configuration as written; a valid argument of train.py
versions.json  package versions, Python version and git revision of every start
metrics.csv    logged metrics
wandb.id       id of the W&B run
checkpoints/   step-*/, see checkpointing.py
grids/         images of fixed prompts
model/         the finished model
finished.json  written last: the run is complete
"""

import fcntl
import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kosmosg.config import RUN_CONFIG, ConfigError, save_config, written_config
from kosmosg.files import write_json
from lightning_modules.checkpointing import CheckpointDamagedError, checkpoints, verify

PACKAGES = ("torch", "lightning", "diffusers", "transformers", "webdataset", "omegaconf", "wandb", "sentencepiece")
DAMAGED = "damaged-"  # prefix of renamed files and folders
# Keys that may change when a run is resumed, because the weights do not depend on them. The micro-batch size may, as
# long as the rows per optimizer step stay the same; this is checked against the checkpoint.
RESUMABLE_KEYS = {
    *("run", "runs", "wandb", "grids", "hardware", "dry_run"),
    *("data.micro_batch_size", "data.num_workers", "data.prefetch_factor", "data.pin_memory"),
    *("data.accept_changed_data", "data.max_bad_share", "data.min_bad_count"),
    *("trainer.global_batch_size", "trainer.val_every", "trainer.checkpoint_every", "trainer.keep_checkpoints"),
    *("trainer.log_every", "trainer.strategy", "trainer.devices", "trainer.num_nodes", "trainer.accelerator"),
    *("trainer.activation_checkpointing", "trainer.compile", "trainer.max_skipped_steps"),
}

logger = logging.getLogger(__name__)


class RunFolderError(ValueError):
    """The run folder is in use, has another configuration, or has no intact checkpoint."""


class RunFolder:
    """Paths and records of the run in folder `path`, which is created by `lock`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints, self.grids, self.model = (self.path / name for name in ("checkpoints", "grids", "model"))

    def latest_checkpoint(self) -> Path | None:
        """Return the last checkpoint, or None."""
        return next(reversed(checkpoints(self.checkpoints)), None)

    def intact_checkpoint(self) -> Path | None:
        """Return the last checkpoint that passes `verify`, or None if the run has not saved one yet.

        Damaged checkpoints are reported and renamed, so that the run can save that step again.

        Raises:
            RunFolderError: all checkpoints are damaged.
        """
        damaged = []
        for checkpoint in reversed(checkpoints(self.checkpoints)):
            try:
                verify(checkpoint)
                return checkpoint
            except CheckpointDamagedError as error:
                damaged.append(set_aside(checkpoint))
                logger.warning("%s. Renamed it to '%s'; trying the checkpoint before.", error, damaged[-1].name)
        if damaged:
            raise RunFolderError(
                f"run folder '{self.path}' holds no intact checkpoint: {', '.join(path.name for path in damaged)} are "
                "damaged. Restore an intact copy of one, or delete the folder to start again."
            )
        return None

    def finished(self) -> dict[str, Any] | None:
        """Return the content of finished.json, or None if the run is not finished."""
        return read_json(self.path / "finished.json", None)

    def mark_finished(self, **facts: Any) -> None:
        """Write finished.json."""
        write_json(self.path / "finished.json", {"finished": now(), **facts})

    @contextmanager
    def lock(self, written: dict[str, Any], schema: Any, write: bool = True) -> Iterator["RunFolder"]:
        """Hold an exclusive lock on the folder, and record configuration and versions.

        Args:
            written: the configuration, see `kosmosg.config.written_config`.
            schema: schema of the recorded configuration.
            write: False on ranks other than 0, which then neither lock nor write.

        Raises:
            RunFolderError: the folder is in use, or its run was started with another configuration.
        """
        if not write:
            yield self
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w") as lock:
            # Data workers outlive a killed run by some seconds and must not hold its lock.
            os.register_at_fork(after_in_child=lock.close)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunFolderError(
                    f"run folder '{self.path}' is in use by another process; wait for it, stop it, or set run=…"
                ) from error
            self._record(written, schema)
            yield self

    def _record(self, written: dict[str, Any], schema: Any) -> None:
        recorded = self.path / RUN_CONFIG
        has_started = recorded.is_file() and (self.latest_checkpoint() or self.finished())
        if has_started and (different := differences(self._recorded(schema), written)):
            raise RunFolderError(
                f"run folder '{self.path}' holds a run with another configuration: {'; '.join(different)}. Use "
                "the same values to resume it, set run=… for a new run, or delete the folder."
            )
        if self.finished():
            return  # the record of a finished run does not change
        save_config(written, recorded)
        starts = read_json(self.path / "versions.json", [])
        starts.append(
            {
                "started": now(),
                "python": platform.python_version(),
                "packages": {package: package_version(package) for package in PACKAGES},
                "git": git_revision(),
            }
        )
        write_json(self.path / "versions.json", starts)

    def _recorded(self, schema: Any) -> dict[str, Any]:
        """Read config.yaml; keys that were added later get their defaults."""
        try:
            return written_config([str(self.path)], schema)
        except ConfigError as error:
            raise RunFolderError(f"run folder '{self.path}' holds a run of another version: {error}") from error


def differences(recorded: Any, given: Any, key: str = "") -> list[str]:
    """Describe the differences, as `key is X there and Y here`, except for RESUMABLE_KEYS."""
    if key in RESUMABLE_KEYS:
        return []
    if isinstance(recorded, dict) and isinstance(given, dict):
        names = dict.fromkeys([*recorded, *given])
        nested = (differences(recorded.get(n), given.get(n), f"{key}.{n}".lstrip(".")) for n in names)
        return [difference for part in nested for difference in part]
    return [] if recorded == given else [f"{key} is {recorded!r} there and {given!r} here"]


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to a free name; returns the new path."""
    names = (f"{DAMAGED}{path.name}", *(f"{DAMAGED}{path.name}.{number}" for number in range(2, 1000)))
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    path.rename(aside)
    return aside


def read_json(file: Path, default: Any) -> Any:
    """Read a JSON file. A damaged one is renamed with a warning, and `default` is returned."""
    if not file.is_file():
        return default
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        logger.warning("'%s' is damaged (%s); renamed it to '%s'.", file, error, set_aside(file).name)
        return default


def package_version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """Return the commit of the source, with `+changes` if tracked files differ; None outside of a repository."""
    try:
        commit, changes = (
            subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
