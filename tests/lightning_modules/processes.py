"""Processes that train together, forked from the test's own so that nothing is imported again."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only

LIMIT_SECONDS = 500


def run_together(
    count: int, action: Callable[[], int | None], log: Path, kill_after: float = LIMIT_SECONDS
) -> list[int]:
    """Exit statuses of `count` processes that run `action` with the environment a launcher gives them; a negative one
    is a signal. What they print goes to `log`.<rank>. One that is not done in time is killed."""
    return wait(start(count, action, log), kill_after)


def start(count: int, action: Callable[[], int | None], log: Path) -> list[int]:
    """Ids of the processes, see `run_together`."""
    port = free_port()
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            _be_a_process(rank, count, port, action, log.with_name(f"{log.name}.{rank}"))
        children.append(child)
    return children


def wait(children: list[int], kill_after: float = LIMIT_SECONDS) -> list[int]:
    """Exit statuses, in order."""
    until, statuses = time.monotonic() + kill_after, {}
    for child in children:
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[child] = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
    return [statuses[child] for child in children]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _be_a_process(rank: int, count: int, port: int, action: Callable[[], int | None], log: Path) -> None:
    status = 70
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)  # the threads of OpenMP's pool stayed with the parent: waiting for them would not end
        if count > 1:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), RANK=str(rank))
            os.environ.update(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
            rank_zero_only.rank = rank
        status = action() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # pytest's own endings are the parent's
