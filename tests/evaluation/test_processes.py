"""Several ranks exchange values and errors, and generate the images and features of a single one.

The ranks are processes forked from the test; tests/evaluation/test_killed.py kills them at random moments.
"""

import io
import os
import pickle
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from evaluation.images.generation import MANIFEST, Batch
from evaluation.processes import Batching, Cached, ProcessError, Processes, progress
from evaluation.protocols.benchmark import Request
from evaluation.protocols.protocol import Sampling
from tests.evaluation.test_generation import BATCH, SYSTEM, content, draw, requests, run
from tests.lightning_modules.processes import run_together

QUIET = Console(quiet=True)
__all__ = ["requests"]  # the fixture


def together(folder: Path, count: int, work: Callable[[Processes], Any]) -> list[Any]:
    """Return the value or exception of `work` on each of `count` ranks; None for one that was killed."""

    def one() -> None:
        rank = int(os.environ.get("RANK", "0"))
        try:
            with Processes.from_environment() as processes:
                result = work(processes)
        except Exception as error:
            result = error
        (folder / f"result.{rank}").write_bytes(pickle.dumps(result))

    run_together(count, one, folder / "log", kill_after=60)
    files = [folder / f"result.{rank}" for rank in range(count)]
    return [pickle.loads(file.read_bytes()) if file.is_file() else None for file in files]


def test_broadcast_calls_rank_0_only(tmp_path: Path) -> None:
    values = [{"files": ["ä" * 40, "b"], "n": 3}, [], "x"]

    def work(processes: Processes) -> tuple[list[Any], list[int]]:
        made: list[int] = []
        return [processes.broadcast(lambda v=value: made.append(processes.rank) or v) for value in values], made

    assert together(tmp_path, 3, work) == [(values, [0, 0, 0]), (values, []), (values, [])]


def test_each_number_is_distributed_once(tmp_path: Path) -> None:
    def work(processes: Processes) -> list[int]:
        return list(processes.distribute(50))

    assert sorted(number for taken in together(tmp_path, 3, work) for number in taken) == list(range(50))


def test_an_error_is_raised_on_all_ranks(tmp_path: Path) -> None:
    def work(processes: Processes) -> None:
        if processes.rank == 1:
            raise ValueError("no such image")
        processes.barrier()

    first, own, other = together(tmp_path, 3, work)
    assert isinstance(own, ValueError)
    for error in (first, other):
        assert isinstance(error, ProcessError) and "process 1 of 3" in str(error)
        assert "failed: ValueError: no such image" in str(error)


@pytest.mark.parametrize("dies", [0, 1])
def test_a_dead_rank_is_named(tmp_path: Path, dies: int) -> None:
    """At once, although collectives wait for days."""

    def work(processes: Processes) -> None:
        processes.barrier()
        if processes.rank == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        processes.barrier()

    started = time.monotonic()
    results = together(tmp_path, 2, work)
    error = results[1 - dies]
    assert results[dies] is None and isinstance(error, ProcessError), results
    assert f"process {dies} of 2" in str(error) and "start the same command again" in str(error)
    assert time.monotonic() - started < 30


def shared_run(folder: Path, requests: list[Request], count: int) -> list[list[int]]:
    """Generate on `count` ranks and return the seeds of all batches."""

    def work(processes: Processes) -> list[list[int]]:
        seen: list[list[int]] = []

        def slowly(batch: Batch, sampling: Sampling) -> list:
            seen.append(batch.seeds)
            time.sleep(0.05)  # so that all ranks get some
            return draw(batch, sampling)

        run(folder, requests, replace(SYSTEM, load=lambda: slowly), processes)
        return seen

    results = together(folder, count, work)
    assert all(isinstance(result, list) for result in results), results
    return [seeds for result in results for seeds in result]


def alone(folder: Path, requests: list[Request]) -> dict[str, bytes]:
    (folder / "alone").mkdir()
    (folder / "alone" / "input.png").write_bytes((folder / "input.png").read_bytes())
    return content(run(folder / "alone", requests))


@pytest.mark.parametrize("count", [2, 3])
def test_several_ranks_equal_one(tmp_path: Path, requests: list[Request], count: int) -> None:
    seen = shared_run(tmp_path, requests, count)
    assert content(tmp_path / "made") == alone(tmp_path, requests), "byte-identical images and manifest, no other files"
    assert sorted(seed for seeds in seen for seed in seeds) == sorted(request.seed for request in requests)
    assert {seeds[0] for seeds in seen} == {requests[start].seed for start in range(0, len(requests), BATCH)}
    assert shared_run(tmp_path, requests, count) == [], "no image is missing"


def test_other_ranks_resume_a_killed_launch(tmp_path: Path, requests: list[Request]) -> None:
    """Without a manifest, with some images missing and one half written."""
    folder = run(tmp_path, requests)
    (folder / MANIFEST).unlink()
    for index in (2, 6, 9):
        (folder / "images" / f"{index:06d}.png").unlink()
    (folder / "images" / f".000002.png.{'0' * 16}.new").write_bytes(b"half")
    assert len(shared_run(tmp_path, requests, 2)) == 3, "all three batches were incomplete"
    assert content(folder) == alone(tmp_path, requests)


def test_features_are_those_of_one_rank(tmp_path: Path) -> None:
    """On all ranks; batches do not depend on the world size and are computed once."""
    items = [str(number) for number in range(23)]

    def work(processes: Processes) -> tuple[torch.Tensor, list[str], list[tuple[str, ...]]]:
        asked: list[tuple[str, ...]] = []

        def encode(batch: list[str]) -> torch.Tensor:
            asked.append(tuple(batch))
            time.sleep(0.02)
            rows = torch.tensor([float(item) for item in batch])
            return torch.stack([rows, rows / 3, rows.sum().expand(len(batch))], dim=1)  # the sum depends on the batch

        batching = Batching(processes, 4, QUIET)
        numbers = Cached("numbers", encode, batching)(items)
        return numbers, Cached("words", lambda batch: [f"<{i}>" for i in batch], batching).answers(items), asked

    (alone, words, asked_alone), *_ = together(tmp_path, 1, work)
    assert words == [f"<{item}>" for item in items]
    results = together(tmp_path, 3, work)
    assert all(torch.equal(numbers, alone) and answers == words for numbers, answers, _ in results)
    assert sorted(batch for _, _, asked in results for batch in asked) == sorted(asked_alone)


def test_progress_ends_with_a_line_without_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=80)
    with progress("images", 10, done=2, console=console) as show:
        show(3)
    assert console.file.getvalue().startswith("images 5/10  ")  # type: ignore[attr-defined]
