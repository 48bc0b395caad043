"""Resolve a configuration into benchmarks, systems and image requests."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from evaluation.benchmarks import BENCHMARKS, GUIDANCE
from evaluation.config import Curve, EvaluationConfig
from evaluation.images.external import External, read_external
from evaluation.images.generation import System, generate
from evaluation.images.provenance import hash_encoder, hash_files, hash_json
from evaluation.images.systems import (
    AFTER_STAGE_3,
    BEFORE_STAGE_3,
    kosmosg_system,
    run_folders,
    run_system,
    text_system,
)
from evaluation.processes import Processes
from evaluation.protocols.benchmark import Benchmark, EvaluationError, Request
from evaluation.protocols.protocol import DreamBenchProtocol, Encoder, identity, task_of
from kosmosg import looking

FOLDER_DIGITS = 8
CODE, LOOKING = Path(__file__).parent, Path(looking.__file__)
Images = Mapping[tuple[str, str], Mapping[int, Path]]
"""Image files by table and system, then by request index."""


@dataclass(frozen=True)
class Table:
    """A benchmark with its requests and systems: for a table, or for one guidance scale of the curve.

    Args:
        key: the benchmark's name.
        scale: guidance scale of a point of the curve, which has its own protocol and the same or fewer requests.
    """

    key: str
    benchmark: Benchmark
    protocol: str
    data: str
    requests: list[Request]
    systems: list[System]
    scale: float | None = None

    @property
    def name(self) -> str:
        return self.key if self.scale is None else f"{GUIDANCE} {self.scale:g}"

    @property
    def task(self) -> str:
        """Identity of the rows whose images were not sampled by the protocol."""
        return task_of(self.protocol)


class Evaluation:
    """A validated evaluation: data sets are complete and models fit before anything is generated.

    Args:
        data: hashes of the data sets by benchmark, if rank 0 has computed them already.

    Raises:
        FileNotFoundError, ValueError: names what is missing or does not fit.
    """

    def __init__(
        self, config: EvaluationConfig, console: Console, processes: Processes, data: Mapping[str, str] | None = None
    ):
        self.config, self.console, self.processes, self.output = config, console, processes, Path(config.output)
        self.device = config.torch_device(processes.local_rank)
        loaded = benchmarks(config)
        self.data = data or {name: hash_files(each.folder, each.files()) for name, each in loaded.items()}
        self.systems = self._systems()
        self.tables = [self._table(name, benchmark, self.systems) for name, benchmark in loaded.items()]
        self.points = self._points(loaded)
        self.external: dict[tuple[str, str], External] = {}
        for table in self.tables:
            size, only = table.benchmark.protocol.sampling.image_size, len(self.tables) == 1
            for name, folder in config.models.external.items():
                images = read_external(name, Path(folder), table.name, table.requests, size, only_table=only)
                if images is not None:
                    self.external[table.name, name] = images
        self.encoders = {
            f"{table.name}.{name}": hash_encoder(config.encoder_path(value))
            for table in self.tables
            for name, value in vars(table.benchmark.protocol).items()
            if isinstance(value, Encoder)
        }

    def generate(
        self, table: Table, system: System, requests: Sequence[Request], folder: str, label: str
    ) -> dict[int, Path]:
        """Generate `requests` into a folder named after a hash of all inputs, so that a changed model starts a new one.

        Returns:
            Image files by request index.
        """
        inputs = {
            "system": system.name,
            "protocol": table.protocol,
            "model": system.model,
            "data": table.data,
            "requests": hash_json([asdict(request) for request in requests]),
        }
        slug = re.sub(r"[^a-z0-9]+", "-", system.name.lower()).strip("-")
        return generate(
            system,
            requests,
            table.benchmark.protocol.sampling,
            self.output / folder / f"{slug}-{hash_json(inputs)[:FOLDER_DIGITS]}",
            inputs_folder=table.benchmark.folder,
            batch_size=self.config.batch_size,
            label=f"{label}: {system.name}",
            processes=self.processes,
            console=self.console,
        )

    def generate_all(self) -> Images:
        """Generate the images of all tables and of the curve; a point with a table's protocol reuses its images."""
        folders = {table.protocol: table.name for table in reversed(self.tables)}
        return {
            (table.name, system.name): self.generate(
                table, system, table.requests, folders.get(table.protocol, GUIDANCE), table.name
            )
            for table in (*self.tables, *self.points)
            for system in table.systems
        }

    def key(self) -> str:
        """Return a hash of everything that the results depend on, including the code."""
        return hash_json(
            [
                hash_files(CODE, (file for kind in ("*.py", "*.html") for file in CODE.rglob(kind))),
                hash_files(LOOKING.parent, [LOOKING]),
                [(table.protocol, table.data) for table in self.tables],
                [(system.name, system.model) for system in self.systems],
                [(table, images.name, images.model) for (table, _), images in self.external.items()],
                self.encoders,
                asdict(self.config.bootstrap),
                asdict(self.config.gallery),
                [(point.scale, point.protocol, [system.name for system in point.systems]) for point in self.points],
            ]
        )

    def row_names(self, table: Table) -> list[str]:
        """Return the names of a table's systems, then of its external models."""
        return [system.name for system in table.systems] + [name for of, name in self.external if of == table.name]

    def answers_folder(self, benchmark: str) -> Path:
        """Return the folder of cached answers of a benchmark's vision-language judge; each judge has its own."""
        root = self.config.judge_answers
        judge = getattr(getattr(self.config, benchmark), "vlm", None)
        judge_hash = hash_json([self.encoders.get(f"{benchmark}.vlm"), judge and judge.max_new_tokens])
        return (self.output / "answers" if root is None else Path(root)) / judge_hash[:12]

    def _table(self, key: str, benchmark: Benchmark, systems: list[System], scale: float | None = None) -> Table:
        protocol = identity(benchmark.protocol)
        return Table(key, benchmark, protocol, self.data[key], benchmark.requests(), systems, scale)

    def _points(self, loaded: Mapping[str, Benchmark]) -> list[Table]:
        curve, names = self.config.curve, [system.name for system in self.systems]
        if unknown := [name for name in curve.systems if name not in names]:
            raise EvaluationError(f"curve.systems={unknown} are not generated here; allowed: {', '.join(names)}.")
        systems = [system for system in self.systems if system.name in (curve.systems or names)]
        points = []
        for scale in curve.guidance_scales:
            whole = loaded["dreambench"]
            benchmark = type(whole)(protocol_at(whole.protocol, curve, scale), whole.folder)
            points.append(self._table("dreambench", benchmark, systems, scale))
        return points

    def _systems(self) -> list[System]:
        models, how = self.config.models, self.config.acceleration
        if models.image_decoder is None:
            if not models.external:
                raise EvaluationError(
                    "models is empty: set models.image_decoder, or models.external.NAME to a folder of images."
                )
            return []
        systems = [text_system(models.image_decoder, self.device, how)]
        for name, folder in ((BEFORE_STAGE_3, models.before_stage_3), (AFTER_STAGE_3, models.after_stage_3)):
            if folder is not None:
                systems.append(kosmosg_system(name, folder, models.image_decoder, self.device, how))
        for folder in run_folders(models.runs):
            systems.append(system := run_system(folder, models.image_decoder, self.device, how))
            if system.name in [other.name for other in systems[:-1]]:
                raise EvaluationError(
                    f"models.runs: '{folder}' is a second run called '{system.name}'; evaluate it separately, with "
                    "another output."
                )
        return systems


def benchmarks(config: EvaluationConfig) -> dict[str, Benchmark]:
    """Load and check the benchmarks of a configuration, by name.

    Raises:
        DataSetError: names what is missing.
    """
    return {name: BENCHMARKS[name](protocol, config.folder_of(name)) for name, protocol in config.protocols().items()}


def protocol_at(protocol: DreamBenchProtocol, curve: Curve, scale: float) -> DreamBenchProtocol:
    """Return the protocol with another guidance scale and the curve's limits on the number of requests."""
    return replace(
        protocol,
        sampling=replace(protocol.sampling, guidance_scale=scale),
        images_per_prompt=curve.images_per_prompt or protocol.images_per_prompt,
        max_subjects=curve.max_subjects or protocol.max_subjects,
        max_templates=curve.max_templates or protocol.max_templates,
    )
