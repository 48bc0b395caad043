"""kill -9 at any moment, of one process or of several: in the end the very bytes of an uninterrupted run.

Real processes, real models in miniature. They are forked from a server that has the libraries loaded, so that a test
can kill many in seconds.
"""

import json
import multiprocessing
import os
import random
import signal
import socket
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from rich.console import Console

from evaluation.images.generation import generate
from evaluation.images.manifest import LOCK, Manifest
from evaluation.images.systems import AFTER_STAGE_3, kosmosg_system
from evaluation.parallel.processes import Processes
from evaluation.protocols.dreambench import DreamBench
from evaluation.protocols.protocol import DreamBenchProtocol, Sampling
from tests import tiny

BATCH = 4
PROTOCOL = DreamBenchProtocol(
    name="dreambench/tiny",
    facts="dreambench.json",
    images_per_prompt=8,
    sampling=Sampling(sampler="ddim", steps=2, guidance_scale=3.0, image_size=tiny.IMAGE_SIZE),
)


def work(folder: Path, data: Path, model: Path, decoder: Path, environment: dict[str, str]) -> None:
    """One process of a launch, as evaluate.py makes its images."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    dataset = DreamBench(PROTOCOL, data)
    system = kosmosg_system(AFTER_STAGE_3, str(model), str(decoder), torch.device("cpu"))
    with Processes.of_environment() as processes:
        manifest = Manifest(folder, {"model": system.model} if processes.first else None)
        generate(
            system,
            dataset.requests(),
            PROTOCOL.sampling,
            manifest,
            inputs_folder=data,
            batch_size=BATCH,
            processes=processes,
            console=Console(quiet=True),
        )


class Launcher:
    """Starts launches of any number of processes into any folder."""

    def __init__(self, *paths: Path):
        self.paths = paths
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.evaluation.test_killed"])

    def start(self, folder: Path, count: int) -> list[ForkServerProcess]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        started = []
        for rank in range(count):
            numbers = {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = self.context.Process(target=work, args=(folder, *self.paths, {**address, **numbers}))
            process.start()
            started.append(process)
        return started

    def finish(self, folder: Path, count: int) -> None:
        for process in self.start(folder, count):
            process.join(60)
            assert process.exitcode == 0


@pytest.fixture(scope="module")
def launcher(dreambench_folder: Path, tiny_model: Path, tiny_stable_diffusion: Path) -> Launcher:
    return Launcher(dreambench_folder, tiny_model, tiny_stable_diffusion)


@pytest.fixture(scope="module")
def whole(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("whole") / "images"
    launcher.finish(folder, 1)
    return files_of(folder)


def files_of(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != LOCK]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def images_in(folder: Path) -> int:
    return len(list(folder.glob("images/[0-9]*.png")))


def interrupt(processes: list[ForkServerProcess], folder: Path, more: int, seconds: float, victim: int) -> bool:
    """Kill one process some time after so many more images, then the others, as torchrun does."""
    wanted = images_in(folder) + more
    while images_in(folder) < wanted and any(process.is_alive() for process in processes):
        time.sleep(0.0005)
    time.sleep(seconds)
    killed = processes[victim].is_alive()
    for process in (processes[victim], *processes):
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        process.join(30)
    return killed


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "counts"), [(10, [1]), (4, [2, 3])], ids=["one process", "two and three in turn"])
def test_killed_again_and_again(
    launcher: Launcher, whole: dict[str, bytes], tmp_path: Path, kills: int, counts: list[int]
) -> None:
    """At moments drawn by a seed: between batches and while their images and rows are written."""
    rng, folder, killed = random.Random(4), tmp_path / "images", []
    for kill in range(kills):
        count = counts[kill % len(counts)]
        processes, more = launcher.start(folder, count), rng.randint(1, BATCH + 1)
        killed.append(
            interrupt(processes, folder, more, rng.choice([0, 0, rng.uniform(0, 0.05)]), rng.randrange(count))
        )
    assert killed == [True] * kills
    launcher.finish(folder, counts[-1])
    assert files_of(folder) == whole
    indices = [json.loads(line)["index"] for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert indices == list(range(len(indices))) and len(indices) > 50


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(launcher: Launcher, whole: dict[str, bytes], tmp_path: Path) -> None:
    launcher.finish(tmp_path / "images", 2)
    assert files_of(tmp_path / "images") == whole


@pytest.mark.slow
def test_the_others_end_when_the_first_is_killed(launcher: Launcher, tmp_path: Path) -> None:
    """By themselves: its node kept the store. What they have made by then is not lost."""
    folder = tmp_path / "images"
    first, other = launcher.start(folder, 2)
    while not images_in(folder):
        time.sleep(0.001)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    other.join(60)
    assert other.exitcode not in (None, 0)
    rows = len(Manifest(folder, json.loads((folder / "identity.json").read_text())).rows)
    assert images_in(folder) >= rows > 0
