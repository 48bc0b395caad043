"""A run folder: what a run was told, with what versions, where it stands, what it made.

config.yaml    resolved configuration, itself a valid argument of train.py
versions.json  packages, Python, git revision of every start
metrics.csv    everything logged
checkpoints/   step-*/, see checkpoint_folder.py
grids/         pictures of fixed prompts
compute.json   FLOPs of an update and the number of updates, where `trainer.max_flops` sets the length
model/         the finished model, written beside and renamed
finished.json  the last thing written: the run is complete
"""

import fcntl
import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from kosmosg.config import RUN_CONFIG, ConfigError, load_config, save_config
from lightning_modules.runs.checkpoint_folder import CHECKPOINT_PATTERN, CheckpointDamagedError, require_intact

PACKAGES = ("torch", "lightning", "diffusers", "transformers", "webdataset", "omegaconf", "wandb", "sentencepiece")
DAMAGED = "damaged-"  # goes before the name of a checkpoint that is set aside
# What may differ between two starts of one run: nothing that the weights depend on.
FREE_KEYS = (
    "run",
    "runs",
    "wandb",
    "grids",
    "trainer.val_every",
    "trainer.checkpoint_every",
    "trainer.keep_checkpoints",
)
FREE_KEYS += ("trainer.log_every", "trainer.strategy", "trainer.devices", "trainer.num_nodes", "trainer.accelerator")
FREE_KEYS += ("trainer.recompute", "trainer.compile", "trainer.max_skipped_steps", "hardware", "dry_run")
# Their product must not change, which the checkpoint itself is asked for.
FREE_KEYS += ("data.batch_size", "trainer.global_batch_size")
FREE_KEYS += ("data.num_workers", "data.prefetch_factor", "data.pin_memory", "data.accept_changed_data")
FREE_KEYS += ("data.max_bad_share", "data.min_bad_count")


logger = logging.getLogger(__name__)


class RunFolderError(ValueError):
    """A run folder that cannot be started: in use, or of another configuration."""


class RunFolder:
    """The folder `path`; nothing is created before `held`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def grids(self) -> Path:
        return self.path / "grids"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def latest_checkpoint(self) -> Path | None:
        """The last complete checkpoint; names are complete ones, for they are written beside and renamed."""
        return max(self.checkpoints.glob(CHECKPOINT_PATTERN), default=None)

    def intact_checkpoint(self) -> Path | None:
        """The last checkpoint whose every byte is what was written; None if the run has not saved yet.

        Damaged ones are told, and set aside under another name so that the run can save that step again.

        Raises:
            RunFolderError: all of them are damaged.
        """
        damaged = []
        while (checkpoint := self.latest_checkpoint()) is not None:
            try:
                require_intact(checkpoint)
                return checkpoint
            except CheckpointDamagedError as error:
                aside = free_name(checkpoint.with_name(DAMAGED + checkpoint.name))
                logger.warning("%s. It is set aside as '%s'; the one before is tried.", error, aside.name)
                checkpoint.rename(aside)
                damaged.append(aside)
        if damaged:
            raise RunFolderError(
                f"run folder '{self.path}' holds no intact checkpoint: {', '.join(path.name for path in damaged)} are "
                "damaged. Put an intact copy of one in its place, or delete the folder to begin anew."
            )
        return None

    def finished(self) -> dict[str, Any] | None:
        """What finished.json says, or None while the run is not complete."""
        file = self.path / "finished.json"
        return json.loads(file.read_text()) if file.is_file() else None

    @contextmanager
    def held(self, config: Any, write: bool = True) -> Iterator["RunFolder"]:
        """Take the folder for this process while inside, and record configuration and versions.

        Args:
            write: False on processes other than the first, which then change nothing.

        Raises:
            RunFolderError: another process has it, or its run was started with another configuration.
        """
        if not write:
            yield self
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w") as lock:
            # Workers that read data outlive a killed run by seconds, and would hold the folder for so long.
            os.register_at_fork(after_in_child=lock.close)
            self._take(lock)
            self._record(config)
            yield self

    def _record(self, config: Any) -> None:
        recorded = self.path / RUN_CONFIG
        if recorded.is_file() and (self.latest_checkpoint() or self.finished()):
            different = _differences(self._recorded(config), _plain(config))
            if different:
                raise RunFolderError(
                    f"run folder '{self.path}' holds a run with another configuration: {'; '.join(different)}. Give "
                    "the same values to go on with it, run=… for a new one, or delete the folder."
                )
        save_config(config, recorded)
        self._record_versions()

    def _recorded(self, config: Any) -> dict[str, Any]:
        """What config.yaml says, completed by the defaults of keys that came with a later version."""
        try:
            return _plain(load_config([str(self.path)], type(config)))
        except ConfigError as error:
            raise RunFolderError(f"run folder '{self.path}' holds a run of another version: {error}") from error

    def updates(self, max_flops: float, count: Callable[[], int]) -> int:
        """How many updates cost `max_flops`; `count` gives the FLOPs of one, and is not asked again by a resumed run.

        Raises:
            ValueError: not one.
        """
        file = self.path / "compute.json"
        if not (file.is_file() and self.latest_checkpoint()):
            flops = count()
            if max_flops < flops:
                raise ValueError(f"trainer.max_flops is {max_flops:.3g}, but one update costs {flops:.3g} FLOPs")
            self.path.mkdir(parents=True, exist_ok=True)
            _write_json(file, {"flops_of_update": flops, "max_flops": max_flops, "updates": int(max_flops // flops)})
        return json.loads(file.read_text())["updates"]

    def write_model(self, save: Callable[[Path], None]) -> None:
        """Fill model/ through `save(folder)`: beside it first, then renamed, so that it is never half there."""
        beside = self.path / ".model"
        shutil.rmtree(beside, ignore_errors=True)
        save(beside)
        shutil.rmtree(self.model, ignore_errors=True)
        beside.replace(self.model)

    def mark_finished(self, **facts: Any) -> None:
        """Write finished.json."""
        _write_json(self.path / "finished.json", {"finished": _now(), **facts})

    def _take(self, lock: TextIO) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(
                f"run folder '{self.path}' is in use by another process; wait for it, stop it, or give run=…"
            ) from error

    def _record_versions(self) -> None:
        file = self.path / "versions.json"
        starts = json.loads(file.read_text()) if file.is_file() else []
        starts.append(
            {
                "started": _now(),
                "python": platform.python_version(),
                "packages": {package: version(package) for package in PACKAGES},
                "git": _git_revision(),
            }
        )
        _write_json(file, starts)


def free_name(path: Path) -> Path:
    """`path`, or with a number after it if there is something already."""
    candidates = (path, *(path.with_name(f"{path.name}.{number}") for number in range(2, 1000)))
    return next(candidate for candidate in candidates if not candidate.exists())


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config)))


def _differences(recorded: Any, given: Any, key: str = "") -> list[str]:
    """`key is X there and Y here` for every value that may not differ."""
    if key in FREE_KEYS:
        return []
    if isinstance(recorded, dict) and isinstance(given, dict):
        names = dict.fromkeys([*recorded, *given])
        below = (_differences(recorded.get(n), given.get(n), f"{key}.{n}".lstrip(".")) for n in names)
        return [difference for differences in below for difference in differences]
    return [] if recorded == given else [f"{key} is {recorded!r} there and {given!r} here"]


def _git_revision() -> str | None:
    """Commit of the source, with `+changes` when tracked files differ; None outside a repository."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write_json(file: Path, value: Any) -> None:
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=2) + "\n")
    beside.replace(file)
