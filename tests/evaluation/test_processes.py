"""What the processes of one launch tell each other, and that their images and features are those of one.

Here they are threads over one store; tests/evaluation/test_killed.py has real ones.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.distributed import HashStore

from evaluation.images.generation import Batch, generate
from evaluation.images.manifest import Manifest, ManifestError
from evaluation.parallel import processes as module
from evaluation.parallel.processes import ProcessError, Processes
from evaluation.parallel.sharing import Sharing
from evaluation.protocols.protocol import Sampling
from evaluation.protocols.requests import Request
from tests.evaluation.test_generation import BATCH, IDENTITY, SAMPLING, SYSTEM, content, draw, requests, run

QUIET = Console(quiet=True)
__all__ = ["requests"]  # the fixture


def together(count: int, work: Callable[[Processes], Any], silence: float = 60.0) -> list[Any]:
    """What `work` gives, or raises, in each of `count` processes."""
    store = HashStore()

    def one(rank: int) -> Any:
        try:
            with Processes(rank, count, rank, store, silence) as processes:
                return work(processes)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_all_have_what_the_first_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it has to go in pieces."""
    monkeypatch.setattr(module, "PIECE", 7)
    values = [{"files": ["ä" * 40, "b"], "n": 3}, [], "x"]
    made: list[int] = []

    def work(processes: Processes) -> list[Any]:
        return [processes.share(lambda v=value: made.append(processes.rank) or v) for value in values]

    assert together(3, work) == [values] * 3 and made == [0, 0, 0]


def test_numbers_are_taken_once() -> None:
    def work(processes: Processes) -> list[int]:
        counter, taken = processes.counter(), []
        while (number := counter.take()) < 50:
            taken.append(number)
        return taken

    assert sorted(number for taken in together(3, work) for number in taken) == list(range(50))


def test_a_wait_is_as_long_as_it_takes() -> None:
    """Longer than the time after which one that gives no sign of life is taken for dead."""
    ended: list[float] = []

    def work(processes: Processes) -> float:
        if processes.rank == 1:
            time.sleep(0.8)
            ended.append(time.monotonic())
        processes.wait()
        return time.monotonic()

    assert all(now >= ended[0] for now in together(2, work, silence=0.4))


def test_a_failure_is_told_to_the_others() -> None:
    def work(processes: Processes) -> None:
        if processes.rank == 1:
            raise ValueError("no such image")
        processes.wait()

    first, own, other = together(3, work)
    assert isinstance(own, ValueError)
    for error in (first, other):
        assert isinstance(error, ProcessError) and "process 1 of 3" in str(error)
        assert "failed: ValueError: no such image" in str(error)


def test_a_silent_process_is_noticed() -> None:
    with Processes(0, 2, 0, HashStore(), silence=0.4) as processes:
        with pytest.raises(ProcessError, match=r"process 1 of 2 \(unknown host\) has given no sign of life"):
            processes.wait()
        processes._add("counter/1", 1)
        processes._add("counter/2", 1)
        processes._add("gone", 1)


def shared_run(folder: Path, requests: list[Request], count: int) -> tuple[list[Manifest], list[tuple[int, ...]]]:
    """The manifests of `count` processes and the seeds of every batch that was made."""
    seen: list[tuple[int, ...]] = []

    def slowly(batch: Batch, sampling: Sampling) -> list:
        seen.append(tuple(batch.seeds))
        time.sleep(0.05)  # so that the others get some
        return draw(batch, sampling)

    def work(processes: Processes) -> Manifest:
        manifest = Manifest(folder / "images-of-double", IDENTITY if processes.first else None)
        system = replace(SYSTEM, load=lambda: slowly)
        options = {"inputs_folder": folder, "batch_size": BATCH, "processes": processes, "console": QUIET}
        generate(system, requests, SAMPLING, manifest, **options)
        return manifest

    found = together(count, work)
    assert all(isinstance(manifest, Manifest) for manifest in found), found
    return found, seen


@pytest.mark.parametrize("count", [2, 3, 5])
def test_several_processes_equal_one(tmp_path: Path, requests: list[Request], count: int) -> None:
    whole = content(alone(tmp_path, requests))
    manifests, seen = shared_run(tmp_path, requests, count)
    assert content(manifests[0]) == whole, "bytes of all images and of the manifest, and no other files"
    assert sorted(seed for seeds in seen for seed in seeds) == sorted(request.seed for request in requests)
    assert {seeds[0] for seeds in seen} == {requests[start].seed for start in range(0, len(requests), BATCH)}


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
    (manifests, seen) = shared_run(tmp_path, requests, 2)
    assert content(manifests[0]) == whole and len(seen) == 3, "each of the three batches lacked something"


def test_nothing_missing_is_not_made_by_anyone(tmp_path: Path, requests: list[Request]) -> None:
    run(tmp_path, requests)
    assert shared_run(tmp_path, requests, 3)[1] == []


def test_a_process_that_was_left_behind_keeps_its_folder(tmp_path: Path, requests: list[Request]) -> None:
    """The first process of a launch is dead, another still writes: nobody may begin."""
    entered, leave = threading.Event(), threading.Event()
    store = HashStore()

    def left_behind(rank: int) -> None:
        processes = Processes(rank, 2, rank, store)
        manifest = Manifest(tmp_path / "images-of-double", IDENTITY if rank == 0 else None)
        try:
            with manifest.locked(processes):
                if rank == 0:
                    assert entered.wait(10)
                    raise KeyboardInterrupt  # its lock is gone, as after a kill
                entered.set()
                assert leave.wait(10)
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            return

    threads = [threading.Thread(target=left_behind, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    threads[0].join()
    with pytest.raises(ManifestError, match="another process is generating"):
        run(tmp_path, requests)
    leave.set()
    threads[1].join()
    assert len(run(tmp_path, requests).rows) == len(requests)


def test_features_are_those_of_one_process(tmp_path: Path) -> None:
    """Every batch is cut as it would be by one, and goes to one process."""
    items = [str(number) for number in range(23)]
    asked: list[tuple[str, ...]] = []

    def encode(batch) -> torch.Tensor:
        asked.append(tuple(batch))
        time.sleep(0.02)
        rows = torch.tensor([float(item) for item in batch])
        return torch.stack([rows, rows / 3, rows.sum().expand(len(batch))], dim=1)  # the sum tells the batch

    def work(processes: Processes) -> torch.Tensor | None:
        sharing = Sharing(processes, tmp_path / "features", 4, QUIET)
        if not processes.first:
            sharing.serve({"other": encode, "numbers": encode})
            return None
        first, second = sharing.compute("numbers", encode, items), sharing.compute("other", encode, items[:3])
        sharing.dismiss()
        return torch.cat([first, second])

    together(1, work)
    alone, asked_alone = together(1, work)[0], sorted(set(asked))
    for count in (2, 4):
        asked.clear()
        found = together(count, work)
        assert torch.equal(found[0], alone) and found[1:] == [None] * (count - 1)
        assert sorted(asked) == asked_alone and not (tmp_path / "features").exists()
