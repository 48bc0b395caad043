"""Fault-injection test: ranks killed by SIGKILL at random moments leave the bytes of an uninterrupted run.

The ranks use tiny real models and are forked from the test to save imports. The slow tests kill three times, or more
with `--faults N`.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from evaluation.images.generation import generate
from evaluation.images.systems import AFTER_STAGE_3, kosmosg_system
from evaluation.processes import Processes
from evaluation.protocols.dreambench import DreamBench
from evaluation.protocols.protocol import DreamBenchProtocol, Sampling
from tests import tiny
from tests.evaluation.test_generation import content
from tests.lightning_modules.processes import run_together, start, wait

BATCH = 4
SAMPLING = Sampling(sampler="ddim", steps=2, guidance_scale=3.0, image_size=tiny.IMAGE_SIZE)


def images_in(folder: Path) -> int:
    return len(list(folder.glob("images/[0-9]*.png")))


@pytest.mark.slow
@pytest.mark.one_fault
def test_killed_again_and_again(
    faults: int, dreambench_folder: Path, tiny_model: Path, tiny_stable_diffusion: Path, tmp_path: Path
) -> None:
    """One, two and three ranks in turn, at seeded random moments: between batches and while images are written. Any
    rank is killed first, then the others, as by torchrun."""

    def work(folder: Path) -> None:
        """Generate images on one rank, as evaluate.py does."""
        dataset = DreamBench(protocol, dreambench_folder)
        system = kosmosg_system(AFTER_STAGE_3, str(tiny_model), str(tiny_stable_diffusion), torch.device("cpu"))
        options = {"inputs_folder": dreambench_folder, "batch_size": BATCH, "console": Console(quiet=True)}
        with Processes.from_environment() as processes:
            generate(system, dataset.requests(), SAMPLING, folder, processes=processes, **options)

    kills = 2 + faults
    protocol = DreamBenchProtocol("dreambench/tiny", 1, SAMPLING, facts="dreambench.json", images_per_prompt=2 * kills)
    rng, whole, folder, log = random.Random(4), tmp_path / "whole", tmp_path / "images", tmp_path / "log"
    assert run_together(1, lambda: work(whole), log) == [0], log.with_name("log.0").read_text()
    killed = []
    for kill in range(kills):
        count = 1 + kill % 3
        children = start(count, lambda: work(folder), log)
        wanted, until = images_in(folder) + rng.randint(1, BATCH + 1), time.monotonic() + 120
        while images_in(folder) < wanted and time.monotonic() < until:
            time.sleep(0.0005)
        time.sleep(rng.choice([0, 0, rng.uniform(0, 0.05)]))
        for child in rng.sample(children, count):
            os.kill(child, signal.SIGKILL)
        killed += wait(children)
    assert set(killed) == {-signal.SIGKILL}, "a rank ended before it was killed"
    assert run_together(2, lambda: work(folder), log) == [0, 0]
    assert content(folder) == content(whole)
    indices = [json.loads(line)["index"] for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert indices == list(range(len(indices))) and len(indices) == 18 * kills
