"""Working on chunks in this process, one after the other."""

from collections.abc import Iterable, Iterator

from datamodules.curation.chunks import Chunk
from datamodules.curation.config import Curation
from datamodules.curation.output import Output, Record
from datamodules.curation.work import GroupWorker, begin, groups


def run_local(config: Curation, chunks: Iterable[Chunk]) -> Iterator[Record]:
    """Work on every chunk; yields its record when it is written. All models are held at once."""
    workers = [GroupWorker(group, config.seed) for group in groups(config)]
    output = Output(config)
    for chunk in chunks:
        work = begin(chunk, config)
        for worker in workers:
            work = worker(work)
        yield output.publish(work)
