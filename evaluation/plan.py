"""What one evaluation consists of: its benchmarks, its systems, and the images that they are asked for."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from evaluation.benchmarks import BENCHMARKS, GUIDANCE
from evaluation.config import Curve, EvaluationConfig
from evaluation.images.external import External, read_external
from evaluation.images.generation import System, generate
from evaluation.images.manifest import Manifest
from evaluation.images.provenance import hash_files, hash_json
from evaluation.images.systems import (
    AFTER_STAGE_3,
    BEFORE_STAGE_3,
    kosmosg_system,
    run_folders,
    run_system,
    text_system,
)
from evaluation.images.weights import hash_encoder
from evaluation.parallel.processes import Processes
from evaluation.protocols.benchmark import Benchmark
from evaluation.protocols.protocol import DreamBenchProtocol, Encoder, identity, task_of
from evaluation.protocols.requests import EvaluationError, Request
from kosmosg import looking

FOLDER_DIGITS = 8
CODE, LOOKING = Path(__file__).parent, Path(looking.__file__)


@dataclass(frozen=True)
class Table:
    """A benchmark, and what is asked of every system.

    Args:
        name: of its images' folder and its scores.
        key: the benchmark's own name.
    """

    name: str
    key: str
    benchmark: Benchmark
    protocol: str
    data: str
    requests: list[Request]

    @property
    def task(self) -> str:
        """What rows are scored under that were not sampled by the protocol."""
        return task_of(self.protocol)


@dataclass(frozen=True)
class Point:
    """One guidance scale of the curve: fewer requests, or as many, under a protocol of their own."""

    scale: float
    table: Table
    systems: list[System]

    @property
    def name(self) -> str:
        return f"{GUIDANCE} {self.scale:g}"

    def folder(self, tables: Sequence[Table]) -> str:
        """Of its images: those of a table that asks for the very same."""
        return next((table.name for table in tables if table.protocol == self.table.protocol), self.table.name)


class Evaluation:
    """What a configuration asks for, checked: data sets are whole, models fit, before anything is generated.

    Args:
        data: the hashes of the data sets by benchmark, where another process has computed them.

    Raises:
        FileNotFoundError, ValueError: what is missing or does not fit, by name.
    """

    def __init__(
        self, config: EvaluationConfig, console: Console, processes: Processes, data: dict[str, str] | None = None
    ):
        self.config, self.console, self.processes, self.output = config, console, processes, Path(config.output)
        self.device = config.torch_device(processes.local_rank)
        self.tables = [
            table_of(name, name, benchmark, (data or {}).get(name)) for name, benchmark in benchmarks(config).items()
        ]
        self.systems = self._systems()
        self.points = self._points()
        self.external = {
            (table.name, name): found
            for table in self.tables
            for name, folder in config.models.external.items()
            if (found := self._external(name, Path(folder), table)) is not None
        }
        self.encoders = {
            f"{table.name}.{name}": hash_encoder(config.encoder_path(value))
            for table in self.tables
            for name, value in vars(table.benchmark.protocol).items()
            if isinstance(value, Encoder)
        }

    def generate_into(
        self, folder: str, table: Table, system: System, requests: Sequence[Request], label: str = ""
    ) -> Manifest:
        """The images of `requests`, in a folder named after all they depend on: a changed model starts a new one."""
        values = {
            "system": system.name,
            "protocol": table.protocol,
            "model": system.model,
            "data": table.data,
            "requests": hash_json([asdict(request) for request in requests]),
        }
        name = f"{slug(system.name)}-{hash_json(values)[:FOLDER_DIGITS]}"
        manifest = Manifest(self.output / folder / name, values if self.processes.first else None)
        generate(
            system,
            requests,
            table.benchmark.protocol.sampling,
            manifest,
            inputs_folder=table.benchmark.folder,
            batch_size=self.config.batch_size,
            label=label or f"{folder}: {system.name}",
            processes=self.processes,
            console=self.console,
        )
        return manifest

    def key(self) -> str:
        """Hash of everything that the results depend on, the code that makes them among it."""
        curve = [(p.scale, p.table.protocol, [system.name for system in p.systems]) for p in self.points]
        return hash_json(
            [
                hash_files(CODE, (file for kind in ("*.py", "*.html") for file in CODE.rglob(kind))),
                hash_files(LOOKING.parent, [LOOKING]),
                [(table.protocol, table.data) for table in self.tables],
                [(system.name, system.model) for system in self.systems],
                [(table, rival.name, rival.model) for (table, _), rival in self.external.items()],
                self.encoders,
                asdict(self.config.bootstrap),
                asdict(self.config.gallery),
                curve,
            ]
        )

    def rows(self, table: Table) -> list[str]:
        """The models of a table: those that draw, then those whose images were given."""
        return [system.name for system in self.systems] + [name for of, name in self.external if of == table.name]

    def answers(self, benchmark: str) -> Path:
        """The file that keeps what the vision-language judge of a benchmark answers; another judge has another one."""
        kept = self.config.judge_answers
        folder = self.output / "answers" if kept is None else Path(kept)
        judge = getattr(getattr(self.config, benchmark), "vlm", None)
        told = hash_json([self.encoders.get(f"{benchmark}.vlm"), judge and judge.max_new_tokens])
        return folder / f"{told[:12]}.jsonl"

    def _points(self) -> list[Point]:
        curve = self.config.curve
        names = [system.name for system in self.systems]
        if unknown := [name for name in curve.systems if name not in names]:
            raise EvaluationError(f"curve.systems={unknown} are no rows that are made; allowed: {', '.join(names)}.")
        systems = [system for system in self.systems if system.name in (curve.systems or names)]
        return [
            Point(
                scale,
                table_of(
                    GUIDANCE,
                    table.key,
                    type(table.benchmark)(protocol_at(table.benchmark.protocol, curve, scale), table.benchmark.folder),
                    table.data,
                ),
                systems,
            )
            for table in self.tables
            if table.key == "dreambench"
            for scale in curve.guidance_scales
        ]

    def _external(self, name: str, folder: Path, table: Table) -> External | None:
        size = table.benchmark.protocol.sampling.image_size
        return read_external(name, folder, table.name, table.requests, size, alone=len(self.tables) == 1)

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
                    f"models.runs: '{folder}' is a second run called '{system.name}'; evaluate it by itself, with "
                    "another output."
                )
        return systems


def benchmarks(config: EvaluationConfig) -> dict[str, Benchmark]:
    """The benchmarks of a configuration by name, checked.

    Raises:
        DataSetError: what is missing.
    """
    return {name: BENCHMARKS[name](protocol, config.folder_of(name)) for name, protocol in config.protocols().items()}


def table_of(name: str, key: str, benchmark: Benchmark, data: str | None = None) -> Table:
    """`data` is the hash of the benchmark's files where it is known."""
    data = data or hash_files(benchmark.folder, benchmark.files())
    return Table(name, key, benchmark, identity(benchmark.protocol), data, benchmark.requests())


def protocol_at(protocol: DreamBenchProtocol, curve: Curve, scale: float) -> DreamBenchProtocol:
    """The protocol with another guidance scale, and with fewer requests where `curve` says so."""
    return replace(
        protocol,
        sampling=replace(protocol.sampling, guidance_scale=scale),
        images_per_prompt=curve.images_per_prompt or protocol.images_per_prompt,
        max_subjects=curve.max_subjects or protocol.max_subjects,
        max_templates=curve.max_templates or protocol.max_templates,
    )


def slug(name: str) -> str:
    """A system's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
