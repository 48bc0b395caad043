"""Working on chunks with Ray Data: a pool of actors for each group of stages, on one machine or a cluster.

A row of the Ray dataset is a whole chunk, so that batches are cut inside chunks as by the local runner; chunks pass
from pool to pool and come out in any order. The folder of the output is shared; the last pool writes there.
"""

import logging
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datamodules.curation.chunks import Chunk
from datamodules.curation.config import Curation
from datamodules.curation.output import Output, Record
from datamodules.curation.work import Group, GroupWorker, begin, groups
from datamodules.errors import DataError

PASSED_ON = ("HF_", "TRANSFORMERS_", "DIFFUSERS_", "TOKENIZERS_")
"""Variables of the environment that workers have too."""
Block = dict[str, Any]
"""One Ray row: `work`, pickled; or, at the end, `record`."""


class Actor:
    """A worker of one group's pool."""

    def __init__(self, config: Curation, group: Group, first: bool, last: bool):
        self.config, self.first = config, first
        self.worker = GroupWorker(group, config.seed)
        self.output = Output(config) if last else None

    def __call__(self, block: Block) -> Block:
        """Take a chunk one group further."""
        work = pickle.loads(block["work"])  # packed by this engine, a process before
        work = self.worker(begin(work, self.config) if self.first else work)
        if self.output is not None:
            return {"record": pickle.dumps(self.output.publish(work))}
        return {"work": pickle.dumps(work)}


def run_ray(config: Curation, chunks: Iterable[Chunk]) -> Iterator[Record]:
    """Work on every chunk; yields its record when it is written.

    Raises:
        DataError: Ray is not installed, no cluster is at the address, or a worker raised one.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise DataError("engine=ray needs the extra [curate]: pip install 'kosmosg[curate]'") from error
    listed = groups(config)
    start(config)
    try:
        if config.ray.address is None:
            check_room(listed, ray.cluster_resources())
        items = [{"work": pickle.dumps(chunk)} for chunk in chunks]
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        for group in listed:
            dataset = dataset.map(
                type(group.name, (Actor,), {}),  # type: ignore[arg-type]  # named, as Ray's own pages show it
                fn_constructor_args=(config, group, group is listed[0], group is listed[-1]),
                compute=ray.data.ActorPoolStrategy(size=group.pool.actors),
                num_cpus=group.pool.cpus,
                num_gpus=group.pool.gpus,
            )
        for row in dataset.iter_rows():
            yield pickle.loads(row["record"])
    except ray.exceptions.RayError as error:
        raise as_data_error(error) from error
    finally:
        ray.shutdown()


def start(config: Curation) -> None:
    """Connect to the cluster, or start Ray on this machine. Raises DataError."""
    import ray
    import ray.data

    variables = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    variables |= {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    options: dict[str, Any] = {"num_cpus": config.ray.cpus} if config.ray.address is None else {}
    try:
        ray.init(
            address=config.ray.address,
            runtime_env={"env_vars": variables},
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False,
            **options,
        )
    except ConnectionError as error:
        raise DataError(f"no Ray cluster answers at ray.address='{config.ray.address}': {error}") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the curation has a bar of its own
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def check_room(listed: list[Group], resources: Mapping[str, float]) -> None:
    """Raises DataError where not all pools fit at once: Ray would wait for ever for the last of them."""
    for resource, name in (("CPU", "cpus"), ("GPU", "gpus")):
        asked = sum(group.pool.actors * getattr(group.pool, name) for group in listed)
        there = resources.get(resource, 0)
        if asked > there:
            pools = ", ".join(f"{group.name} {group.pool.actors} × {getattr(group.pool, name):g}" for group in listed)
            remedy = f"; or set ray.cpus={-(-asked // 1):.0f}, so that they share the cores" if name == "cpus" else ""
            raise DataError(
                f"the pools ask for {asked:g} {name} ({pools}), Ray has {there:g}. Make them smaller{remedy}."
            )


def as_data_error(error: Exception) -> DataError:
    """A worker's own DataError, out of what Ray wraps it in."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DataError):
            return DataError(str(cause))
        cause = getattr(cause, "cause", None) or cause.__cause__
    # Of a worker that could not even be built, Ray keeps the text alone.
    _, found, told = str(error).rpartition(f"{DataError.__name__}: ")
    return DataError(told.strip() if found else f"a worker of engine=ray failed: {error}")
