"""What an evaluation gives to Weights & Biases, offline."""

import json

import pytest
import wandb

from evaluation.scores.results import Score
from evaluation.tracking import Tracking, track

SCORES = [
    Score("dreambench", "KOSMOS-G after stage 3", "dino", 0.5, 0.4, 0.6, 750, "dreambench/x@1#aa"),
    Score("coco", "KOSMOS-G after stage 3", "fid", 7.0, 6.0, 8.0, 500, "coco/x@1#bb"),
]


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "run" / "evaluation"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("[]")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("agents", [None, "agents1"], ids=["alone", "in a sweep"])
def test_an_offline_run_holds_summary_table_and_artifact(output, monkeypatch, agents):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    if agents:
        monkeypatch.setenv("WANDB_RUN_ID", agents)
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
    assert agents in (None, seen["id"])
    assert seen["summary"]["coco/fid/KOSMOS-G after stage 3"] == 7.0
    assert list(output.glob(f"wandb/offline-run-*-{seen['id']}/*.wandb"))
    tables = list(output.glob("wandb/offline-run-*/files/media/table/scores*.json"))
    assert json.loads(tables[0].read_text())["data"][0][:3] == ["dreambench", "KOSMOS-G after stage 3", "dino"]


def test_disabled_touches_nothing(output, monkeypatch):
    monkeypatch.setattr(wandb, "init", None)
    track(Tracking(), output, SCORES, {})
    assert [path.name for path in output.iterdir()] == ["results.json"]
