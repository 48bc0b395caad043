"""A W&B server that cannot be reached, at the start, in mid-run or at the end, changes where the log lies alone."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import wandb

import train
from callbacks.weights_and_biases import RunWandbLogger
from lightning_modules.base import StageModule
from tests.callbacks.wandb_server import wandb_server
from tests.lightning_modules import miniature

pytestmark = pytest.mark.slow
TIMEOUT = 2.0
PATIENCE = 30.0  # seconds; wandb's own would be 90 at the start and without end at the end


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_configs: Callable[..., dict[str, Path]]) -> Path:
    return write_configs(tmp_path_factory.mktemp("wandb"))["alignment"]


@pytest.fixture(scope="module")
def without(config: Path) -> tuple[Path, float]:
    """A run without W&B and its seconds."""
    run = config.parent / "without"
    return run, trained(config, run, "disabled")


@pytest.fixture(autouse=True)
def fresh_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    wandb.teardown()  # what earlier tests told it
    yield
    wandb.teardown()


def trained(config: Path, run: Path, mode: str) -> float:
    """Seconds of a run."""
    started = time.monotonic()
    assert train.main([str(config), f"run={run}", f"wandb.mode={mode}", f"wandb.timeout={TIMEOUT}"]) == 0
    return time.monotonic() - started


@pytest.mark.parametrize("when", ["start", "mid-run", "end"])
def test_unreachable_server_costs_seconds_and_no_number(
    when: str,
    config: Path,
    without: tuple[Path, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, (plain, seconds) = tmp_path / "run", without
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")

        def fall_silent() -> None:
            server.shutdown()
            server.server_close()

        if when == "start":
            fall_silent()
        elif when == "mid-run":
            step = StageModule.training_step

            def silent_from_the_second(self, batch, batch_idx: int):
                if self.trainer.global_step == 1:
                    fall_silent()
                return step(self, batch, batch_idx)

            monkeypatch.setattr(StageModule, "training_step", silent_from_the_second)
        else:
            finish = RunWandbLogger.finalize

            def silent_at_the_end(self, status: str) -> None:
                fall_silent()
                finish(self, status)

            monkeypatch.setattr(RunWandbLogger, "finalize", silent_at_the_end)
        taken = trained(config, run, "online")
    assert taken < seconds + PATIENCE
    names = ("train/loss", "grad_norm")
    assert miniature.losses(run, names) == miniature.losses(plain, names)
    kept = list((run / "wandb").glob("*run-*/*.wandb"))
    assert kept
    if when == "start":
        assert "W&B cannot be reached" in caplog.text
        assert kept[0].parent.name.startswith("offline-run-")
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        command = [sys.executable, "-m", "wandb", "sync", "--include-online", str(kept[0].parent)]
        synced = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert synced.returncode == 0, synced.stdout + synced.stderr
