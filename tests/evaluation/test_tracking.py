"""Logging to Weights & Biases, offline and with an unreachable server."""

import json
import logging
import socket

import pytest
import wandb

from evaluation import tracking
from evaluation.scores.results import Score
from evaluation.tracking import Tracking, track

SCORES = [
    Score("dreambench", "KOSMOS-G after stage 3", "dino", 0.5, 0.4, 0.6, 750, "dreambench/x@1#aa"),
    Score("coco", "KOSMOS-G after stage 3", "fid", 7.0, 6.0, 8.0, 500, "coco/x@1#bb"),
]


@pytest.fixture(autouse=True)
def fresh_wandb():
    """Reset wandb's global state, such as the run of a sweep."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "run" / "evaluation"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("[]")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("sweep_run", [None, "run1"], ids=["alone", "in a sweep"])
def test_an_offline_run_has_summary_table_and_artifact(output, monkeypatch, sweep_run):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    if sweep_run:
        monkeypatch.setenv("WANDB_RUN_ID", sweep_run)
    seen = {}
    init = wandb.init

    def remember(**options):
        run = init(**options)
        seen.update(options, run=run)
        finish = run.finish

        def finished(*arguments, **named):
            seen["summary"] = dict(run.summary)
            return finish(*arguments, **named)

        monkeypatch.setattr(run, "finish", finished)
        return run

    monkeypatch.setattr(wandb, "init", remember)
    track(Tracking(mode="offline", project="p"), output, SCORES, {"key": "k"})
    assert (seen["group"], seen["job_type"], seen["name"], seen["project"]) == ("evaluation", "evaluation", "run", "p")
    assert seen["id"] == (sweep_run or (output / "wandb.id").read_text()), "repeated evaluations update one run"
    assert not list(output.rglob("wandb-metadata.json")), "it would have the command line"
    assert seen["summary"]["coco/fid/KOSMOS-G after stage 3"] == 7.0
    assert list(output.glob(f"wandb/offline-run-*-{seen['id']}/*.wandb"))
    tables = list(output.glob("wandb/offline-run-*/files/media/table/scores*.json"))
    assert (output / tracking.LOGGED).read_text() == "k"
    assert json.loads(tables[0].read_text())["data"][0][:3] == ["dreambench", "KOSMOS-G after stage 3", "dino"]


@pytest.mark.slow
def test_an_unreachable_server_falls_back_to_offline(output, monkeypatch, caplog):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    with caplog.at_level(logging.WARNING):
        track(Tracking(mode="online", project="p", timeout=2.0), output, SCORES, {"key": "k"})
    assert "W&B cannot be reached" in caplog.text and str(output / "wandb") in caplog.text
    assert list(output.glob("wandb/offline-run-*/*.wandb"))


def test_results_are_logged_once(output, monkeypatch):
    """And again after a kill, because the marker is written last."""
    started = []

    def start(*_):
        started.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(tracking, "start", start)
    for logged in ("another key", None):
        if logged:
            (output / tracking.LOGGED).write_text(logged)
        with pytest.raises(KeyboardInterrupt):
            track(Tracking(mode="offline"), output, SCORES, {"key": "k"})
    (output / tracking.LOGGED).write_text("k")
    track(Tracking(mode="offline"), output, SCORES, {"key": "k"})
    assert len(started) == 2


def test_disabled_writes_nothing(output, monkeypatch):
    monkeypatch.setattr(wandb, "init", None)
    track(Tracking(), output, SCORES, {})
    assert [path.name for path in output.iterdir()] == ["results.json"]
