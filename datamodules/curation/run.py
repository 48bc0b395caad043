"""Run a curation with Ray Data, on this machine or on a cluster.

A row of the Ray dataset is a whole chunk (datamodules/curation/stages.py). Tasks read and prepare images, a pool of
actors runs each model, and tasks cut crops and write shards to the output folder, which all nodes share. Chunks may
finish in any order, which does not affect their content.
"""

import logging
import math
import os
import pickle
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn

from datamodules.curation.config import Curation, Pool
from datamodules.curation.output import Output, Record
from datamodules.curation.reading import Source, list_sources
from datamodules.curation.report import Counts, report, write_sheet
from datamodules.curation.stages import Worker, groups, read_chunks
from datamodules.errors import DataError
from datamodules.folder_lock import folder_lock
from kosmosg.config import save_config
from kosmosg.files import write_text

WORKER_VARIABLES = ("HF_", "TRANSFORMERS_", "DIFFUSERS_", "TOKENIZERS_")
"""Prefixes of environment variables that are passed on to workers."""
READING_MEMORY = 256 * 2**20
"""Bytes reserved for the chunk of a reading task. The reservation also keeps Ray from fusing reading into an actor."""
RayRow = dict[str, bytes]


def curate(config: Curation, console: Console, written: dict[str, Any] | None = None) -> None:
    """Process all unfinished chunks; then write counts, report and contact sheet.

    Args:
        written: the configuration to record, see `kosmosg.config.written_config`.

    Raises:
        DataError: the input or output cannot be used, a model is missing, too many images fail, no sample remains, or
            another process is writing to the output.
    """
    output = Output(config)
    with folder_lock(output.folder):
        sources, fingerprint = list_sources(config.input)
        output.prepare(fingerprint)
        save_config(written or config, output.own / "config.yaml")
        counts = Counts(config, len(sources))
        for record in output.done():
            counts.add(record)
        missing = [source for source in sources if source.number not in counts.finished]
        if not missing and output.counts.is_file():
            console.print(f"The curation in '{output.folder}' is finished.", highlight=False, soft_wrap=True)
            return
        columns = (*Progress.get_default_columns(), TextColumn("{task.fields[state]}"))
        with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
            task = bar.add_task("sources", total=len(sources), state="")
            for record in work(config, [(source, counts.parts[source.number]) for source in missing]):
                counts.add(record)
                state = f"{counts.written:,} of {counts.images:,} images kept, {counts.failed.total():,} failed"
                bar.update(task, completed=len(counts.finished), state=state)
        shards, text = counts.shards(), report(counts)
        write_text(output.own / "report.md", f"# Curation of `{config.input.images or config.input.shards}`\n\n{text}")
        if config.sheet:
            write_sheet(counts, output.folder, output.own / "sheet.png")
        output.finish(shards, counts.summary())
        text = f"{text.split(chr(10) * 2)[0]}\nShards in '{output.folder}'; throughput in '{output.own / 'report.md'}'."
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def work(config: Curation, missing: list[tuple[Source, set[int]]]) -> Iterator[Record]:
    """Process sources except for their finished parts; yield the record of each chunk when it has been written.

    Raises:
        DataError: Ray is not installed, there is no cluster at the address, or a worker raised an error.
    """
    if not missing:
        return
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise DataError("curation needs the extra [curate]: pip install 'kosmosg[curate]'") from error
    started = not ray.is_initialized()
    if started:
        start_ray(config.ray.address, config.ray.cpus)
    try:
        if config.ray.address is None:  # a cluster may grow
            check_resources(config, ray.cluster_resources())
        items = [{"source": pickle.dumps(item)} for item in missing]
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        dataset = dataset.flat_map(read, fn_args=(config,), memory=READING_MEMORY)  # type: ignore[arg-type]
        for number, pool in enumerate(pools(config).values(), 1):
            dataset = dataset.map(
                Actor,  # type: ignore[arg-type]
                fn_constructor_args=(config, number),
                compute=ray.data.ActorPoolStrategy(size=pool.actors),
                num_cpus=pool.cpus,
                num_gpus=pool.gpus,
            )
        for row in dataset.map(write, fn_args=(config,)).iter_rows():  # type: ignore[arg-type]
            yield pickle.loads(row["record"])
    except ray.exceptions.RayError as error:
        # If the constructor of a worker fails, Ray keeps only the text of the error.
        _, is_data_error, message = str(error).rpartition(f"{DataError.__name__}: ")
        raise DataError(message.strip() if is_data_error else f"a worker failed: {error}") from error
    finally:
        if started:
            ray.shutdown()


# The functions below run in workers. Unpickling is safe, because chunks come from other workers of this curation.


def read(row: RayRow, config: Curation) -> Iterator[RayRow]:
    """Read and prepare the chunks of a source."""
    source, done = pickle.loads(row["source"])
    worker = Worker(groups(config)[0])
    for chunk in read_chunks(source, config, done):
        yield {"chunk": pickle.dumps(worker(chunk))}


class Actor:
    """Runs a group of stages with a model."""

    def __init__(self, config: Curation, number: int):
        self.worker = Worker(groups(config)[number])

    def __call__(self, row: RayRow) -> RayRow:
        """Process one chunk."""
        return {"chunk": pickle.dumps(self.worker(pickle.loads(row["chunk"])))}


def write(row: RayRow, config: Curation) -> RayRow:
    """Run the last group of stages on a chunk, write its shard and return its record."""
    chunk = Worker(groups(config)[-1])(pickle.loads(row["chunk"]))
    return {"record": pickle.dumps(Output(config).publish(chunk))}


def start_ray(address: str | None = None, cpus: int | None = None) -> None:
    """Connect to a cluster, or start Ray on this machine. Raises DataError if there is no cluster at the address."""
    import ray
    import ray.data

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    variables = {name: value for name, value in os.environ.items() if name.startswith(WORKER_VARIABLES)}
    paths = (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH"))  # workers import the same code
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            num_cpus=cpus if address is None else None,
            runtime_env={"env_vars": variables},
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False,
        )
    except ConnectionError as error:
        raise DataError(f"no Ray cluster answers at ray.address='{address}': {error}") from error
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray's handler would abort the process
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the curation has its own progress bar
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 1  # byte, so that each chunk is passed on as soon as it is read


def pools(config: Curation) -> dict[str, Pool]:
    """Return the actor pool of each model by stage."""
    return {step.name: step.pool for group in groups(config) for step in group[:1] if step.pool}


def check_resources(config: Curation, resources: Mapping[str, float]) -> None:
    """Raise DataError if the actors of all models and one task do not fit at the same time: Ray would wait forever."""
    for resource, name, tasks in (("CPU", "cpus", 1), ("GPU", "gpus", 0)):
        wanted = {stage: pool.actors * getattr(pool, name) for stage, pool in pools(config).items()}
        needed = tasks + sum(wanted.values())
        if needed > (available := resources.get(resource, 0)):
            actors = ", ".join(f"{stage} {number:g}" for stage, number in wanted.items())
            remedy = f"; or set ray.cpus={math.ceil(needed)}, so that they share the cores" if tasks else ""
            raise DataError(
                f"the actors need {needed - tasks:g} {name} ({actors}), reading and writing {tasks}; Ray has "
                f"{available:g}. Reduce pool.actors{remedy}."
            )
