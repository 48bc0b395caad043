"""What the processes of one launch tell each other, and that their images and features are those of one.

Real processes, forked from the test's own; tests/evaluation/test_killed.py kills them at any moment.
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
from evaluation.processes import ProcessError, Processes, Remembered, Sharing, progress
from evaluation.protocols.benchmark import Request
from evaluation.protocols.protocol import Sampling
from tests.evaluation.test_generation import BATCH, SYSTEM, content, draw, requests, run
from tests.lightning_modules.processes import run_together

QUIET = Console(quiet=True)
__all__ = ["requests"]  # the fixture


def together(folder: Path, count: int, work: Callable[[Processes], Any]) -> list[Any]:
    """What `work` gives, or raises, in each of `count` processes; None of one that was killed."""

    def one() -> None:
        rank = int(os.environ.get("RANK", "0"))
        try:
            with Processes.of_environment() as processes:
                found = work(processes)
        except Exception as error:
            found = error
        (folder / f"found.{rank}").write_bytes(pickle.dumps(found))

    run_together(count, one, folder / "log", kill_after=60)
    files = [folder / f"found.{rank}" for rank in range(count)]
    return [pickle.loads(file.read_bytes()) if file.is_file() else None for file in files]


def test_all_have_what_the_first_made(tmp_path: Path) -> None:
    values = [{"files": ["ä" * 40, "b"], "n": 3}, [], "x"]

    def work(processes: Processes) -> tuple[list[Any], list[int]]:
        made: list[int] = []
        found = [processes.share(lambda v=value: made.append(processes.rank) or v) for value in values]
        return found, made

    assert together(tmp_path, 3, work) == [(values, [0, 0, 0]), (values, []), (values, [])]


def test_numbers_are_taken_once(tmp_path: Path) -> None:
    def work(processes: Processes) -> list[int]:
        return list(processes.take(50))

    assert sorted(number for taken in together(tmp_path, 3, work) for number in taken) == list(range(50))


def test_a_failure_is_told_to_the_others(tmp_path: Path) -> None:
    def work(processes: Processes) -> None:
        if processes.rank == 1:
            raise ValueError("no such image")
        processes.wait()

    first, own, other = together(tmp_path, 3, work)
    assert isinstance(own, ValueError)
    for error in (first, other):
        assert isinstance(error, ProcessError) and "process 1 of 3" in str(error)
        assert "failed: ValueError: no such image" in str(error)


@pytest.mark.parametrize("dies", [0, 1])
def test_a_dead_process_ends_the_run_by_name(tmp_path: Path, dies: int) -> None:
    """At once, though the others would wait for days for one that works."""

    def work(processes: Processes) -> None:
        processes.wait()
        if processes.rank == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        processes.wait()

    started = time.monotonic()
    found = together(tmp_path, 2, work)
    error = found[1 - dies]
    assert found[dies] is None and isinstance(error, ProcessError), found
    assert f"process {dies} of 2" in str(error) and "start the same command again" in str(error)
    assert time.monotonic() - started < 30


def shared_run(folder: Path, requests: list[Request], count: int) -> list[list[int]]:
    """The seeds of every batch that `count` processes made."""

    def work(processes: Processes) -> list[list[int]]:
        seen: list[list[int]] = []

        def slowly(batch: Batch, sampling: Sampling) -> list:
            seen.append(batch.seeds)
            time.sleep(0.05)  # so that the others get some
            return draw(batch, sampling)

        run(folder, requests, replace(SYSTEM, load=lambda: slowly), processes)
        return seen

    found = together(folder, count, work)
    assert all(isinstance(one, list) for one in found), found
    return [seeds for seen in found for seeds in seen]


def alone(folder: Path, requests: list[Request]) -> dict[str, bytes]:
    (folder / "alone").mkdir()
    (folder / "alone" / "input.png").write_bytes((folder / "input.png").read_bytes())
    return content(run(folder / "alone", requests))


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_equal_one(tmp_path: Path, requests: list[Request], count: int) -> None:
    seen = shared_run(tmp_path, requests, count)
    assert content(tmp_path / "made") == alone(tmp_path, requests), "bytes of all images and of the manifest, no others"
    assert sorted(seed for seeds in seen for seed in seeds) == sorted(request.seed for request in requests)
    assert {seeds[0] for seeds in seen} == {requests[start].seed for start in range(0, len(requests), BATCH)}
    assert shared_run(tmp_path, requests, count) == [], "nothing missing is not made by anyone"


def test_what_many_left_behind_others_take_over(tmp_path: Path, requests: list[Request]) -> None:
    """A launch was killed before its manifest was written: some images are there, one half written."""
    folder = run(tmp_path, requests)
    (folder / MANIFEST).unlink()
    for index in (2, 6, 9):
        (folder / "images" / f"{index:06d}.png").unlink()
    (folder / "images" / f".000002.png.{'0' * 16}.new").write_bytes(b"half")
    assert len(shared_run(tmp_path, requests, 2)) == 3, "each of the three batches lacked something"
    assert content(folder) == alone(tmp_path, requests)


def test_features_are_those_of_one_process(tmp_path: Path) -> None:
    """In every process; each batch is cut as it would be by one, and goes to one process."""
    items = [str(number) for number in range(23)]

    def work(processes: Processes) -> tuple[torch.Tensor, list[str], list[tuple[str, ...]]]:
        asked: list[tuple[str, ...]] = []

        def encode(batch: list[str]) -> torch.Tensor:
            asked.append(tuple(batch))
            time.sleep(0.02)
            rows = torch.tensor([float(item) for item in batch])
            return torch.stack([rows, rows / 3, rows.sum().expand(len(batch))], dim=1)  # the sum tells the batch

        sharing = Sharing(processes, 4, QUIET)
        numbers = Remembered("numbers", encode, sharing)(items)
        return numbers, Remembered("words", lambda batch: [f"<{i}>" for i in batch], sharing).answers(items), asked

    (alone, words, asked_alone), *_ = together(tmp_path, 1, work)
    assert words == [f"<{item}>" for item in items]
    found = together(tmp_path, 3, work)
    assert all(torch.equal(numbers, alone) and told == words for numbers, told, _ in found)
    assert sorted(batch for _, _, asked in found for batch in asked) == sorted(asked_alone)


def test_progress_ends_with_a_line_where_there_is_no_terminal() -> None:
    console = Console(file=io.StringIO(), width=80)
    with progress("images", 10, there=2, console=console) as show:
        show(3)
    assert console.file.getvalue().startswith("images 5/10  ")  # type: ignore[attr-defined]
