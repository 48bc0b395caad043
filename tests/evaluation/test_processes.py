"""What the processes of one launch tell each other, and that their images and features are those of one.

Real processes, forked from the test's own; tests/evaluation/test_killed.py kills them at any moment.
"""

import fcntl
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

from evaluation.images.generation import Batch, generate
from evaluation.images.manifest import LOCK, Manifest, ManifestError
from evaluation.parallel.processes import ProcessError, Processes
from evaluation.parallel.sharing import Sharing
from evaluation.protocols.protocol import Sampling
from evaluation.protocols.requests import Request
from tests.evaluation.test_generation import BATCH, IDENTITY, SAMPLING, SYSTEM, content, draw, requests, run
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
        counter, taken = processes.counter(), []
        while (number := counter.take()) < 50:
            taken.append(number)
        return taken

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


def shared_run(folder: Path, requests: list[Request], count: int) -> tuple[list[list[int]], list[tuple[int, ...]]]:
    """The rows that each of `count` processes knows afterwards, and the seeds of every batch that was made."""

    def work(processes: Processes) -> tuple[list[int], list[tuple[int, ...]]]:
        seen: list[tuple[int, ...]] = []

        def slowly(batch: Batch, sampling: Sampling) -> list:
            seen.append(tuple(batch.seeds))
            time.sleep(0.05)  # so that the others get some
            return draw(batch, sampling)

        manifest = Manifest(folder / "images-of-double", IDENTITY if processes.first else None)
        system = replace(SYSTEM, load=lambda: slowly)
        options = {"inputs_folder": folder, "batch_size": BATCH, "processes": processes, "console": QUIET}
        generate(system, requests, SAMPLING, manifest, **options)
        return list(manifest.rows), seen

    found = together(folder, count, work)
    assert all(isinstance(one, tuple) for one in found), found
    return [rows for rows, _ in found], [seeds for _, seen in found for seeds in seen]


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_equal_one(tmp_path: Path, requests: list[Request], count: int) -> None:
    whole = content(alone(tmp_path, requests))
    rows, seen = shared_run(tmp_path, requests, count)
    assert made(tmp_path) == whole, "bytes of all images and of the manifest, and no other files"
    assert rows == [list(range(len(requests)))] * count
    assert sorted(seed for seeds in seen for seed in seeds) == sorted(request.seed for request in requests)
    assert {seeds[0] for seeds in seen} == {requests[start].seed for start in range(0, len(requests), BATCH)}


def made(folder: Path) -> dict[str, bytes]:
    return content(Manifest(folder / "images-of-double", IDENTITY))


def alone(folder: Path, requests: list[Request]) -> Manifest:
    (folder / "alone").mkdir()
    (folder / "alone" / "input.png").write_bytes((folder / "input.png").read_bytes())
    return run(folder / "alone", requests)


def test_what_many_left_behind_one_takes_over(tmp_path: Path, requests: list[Request]) -> None:
    """A launch of four was killed: rows in files of their own, one torn, one of them twice, one without its image."""
    whole = content(alone(tmp_path, requests))
    manifest = run(tmp_path, requests)
    lines = manifest.file.read_bytes().splitlines(keepends=True)
    manifest.file.write_bytes(b"".join(lines[:2]))
    (manifest.folder / "manifest.1.jsonl").write_bytes(b"".join([*lines[4:6], lines[6][:30]]))
    (manifest.folder / "manifest.3.jsonl").write_bytes(b"".join([lines[1], *lines[8:]]))
    manifest.image_file(9).unlink()
    assert sorted(Manifest(manifest.folder, IDENTITY).rows) == [0, 1, 4, 5, 8]
    _, seen = shared_run(tmp_path, requests, 2)
    assert made(tmp_path) == whole and len(seen) == 3, "each of the three batches lacked something"


def test_nothing_missing_is_not_made_by_anyone(tmp_path: Path, requests: list[Request]) -> None:
    run(tmp_path, requests)
    assert shared_run(tmp_path, requests, 3)[1] == []


def test_a_process_that_was_left_behind_keeps_its_folder(tmp_path: Path, requests: list[Request]) -> None:
    """The first process of a launch is dead, another still writes: nobody may begin."""
    manifest = run(tmp_path, requests)
    left_behind = (manifest.folder / LOCK).open("a+")
    fcntl.flock(left_behind, fcntl.LOCK_SH)
    with pytest.raises(ManifestError, match="another process is generating"):
        run(tmp_path, requests)
    left_behind.close()
    assert len(run(tmp_path, requests).rows) == len(requests)


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
        numbers = torch.stack(sharing.compute("numbers", encode, items))
        return numbers, sharing.compute("words", lambda batch: [f"<{item}>" for item in batch], items), asked

    (alone, words, asked_alone), *_ = together(tmp_path, 1, work)
    assert words == [f"<{item}>" for item in items]
    found = together(tmp_path, 3, work)
    assert all(torch.equal(numbers, alone) and told == words for numbers, told, _ in found)
    assert sorted(batch for _, _, asked in found for batch in asked) == sorted(asked_alone)
