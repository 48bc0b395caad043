"""What one evaluation consists of: its tables, its systems, and the images that they are asked for."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from evaluation.config import EvaluationConfig
from evaluation.images.external import External, read_external
from evaluation.images.generation import System, generate
from evaluation.images.manifest import Manifest
from evaluation.images.provenance import hash_files, hash_json
from evaluation.images.systems import (
    AFTER_STAGE_3,
    BEFORE_STAGE_3,
    REAL_IMAGES,
    kosmosg_system,
    run_folders,
    run_system,
    text_system,
)
from evaluation.images.weights import hash_encoder
from evaluation.parallel.processes import Processes
from evaluation.protocols.coco import Coco
from evaluation.protocols.dreambench import DreamBench
from evaluation.protocols.protocol import identity, task_of
from evaluation.protocols.requests import EvaluationError, Request
from evaluation.reports import guidance
from evaluation.reports.guidance import protocol_at
from evaluation.scores.results import JUDGED, Score
from evaluation.scores.scoring import NEAR_COPY

FOLDER_DIGITS = 8


@dataclass(frozen=True)
class Table:
    """A data set under its protocol, and what is asked of every system."""

    name: str
    dataset: DreamBench | Coco
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
        return f"{guidance.TABLE} {self.scale:g}"

    def folder(self, tables: Sequence[Table]) -> str:
        """Of its images: those of a table that asks for the very same."""
        return next((table.name for table in tables if table.protocol == self.table.protocol), self.table.name)


class Evaluation:
    """What a configuration asks for, checked: data sets are whole, models fit, before anything is generated.

    Args:
        data: the hashes of the data sets by table, where another process has computed them.

    Raises:
        FileNotFoundError, ValueError: what is missing or does not fit, by name.
    """

    def __init__(
        self, config: EvaluationConfig, console: Console, processes: Processes, data: dict[str, str] | None = None
    ):
        self.config, self.console, self.processes, self.output = config, console, processes, Path(config.output)
        self.tables = [table_of(name, dataset, (data or {}).get(name)) for name, dataset in datasets(config)]
        self.systems = self._systems()
        self.points = self._points()
        self.external = {
            (table.name, name): found
            for table in self.tables
            for name, folder in config.models.external.items()
            if (found := self._external(name, Path(folder), table)) is not None
        }
        self.encoders = {
            f"{table.name}.{name}": hash_encoder(config.encoder_path(encoder))
            for table in self.tables
            for name in ("clip", "dino", "fid", "judge")
            if (encoder := getattr(table.dataset.protocol, name, None)) is not None
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
            table.dataset.protocol.sampling,
            manifest,
            inputs_folder=table.dataset.folder,
            batch_size=self.config.batch_size,
            label=label or f"{folder}: {system.name}",
            processes=self.processes,
            console=self.console,
        )
        return manifest

    def key(self) -> str:
        """Hash of everything that the results depend on."""
        curve = [(p.scale, p.table.protocol, [system.name for system in p.systems]) for p in self.points]
        return hash_json(
            [
                [(table.protocol, table.data) for table in self.tables],
                [(system.name, system.model) for system in self.systems],
                [(table, rival.name, rival.model) for (table, _), rival in self.external.items()],
                self.encoders,
                asdict(self.config.bootstrap),
                asdict(self.config.gallery),
                curve,
            ]
        )

    def kinds(self) -> dict[str, str]:
        """Of DreamBench's subjects: object or live."""
        found = [table.dataset.subjects for table in self.tables if isinstance(table.dataset, DreamBench)]
        return {name: subject.kind for subjects in found for name, subject in subjects.items()}

    def sorts(self) -> dict[str, str]:
        """Of DreamBench's templates: the label groups that the words ask for, `colour + dress`; others are left out."""
        found = [table.dataset.protocol.prompts for table in self.tables if isinstance(table.dataset, DreamBench)]
        lists = [templates for prompts in found for templates in prompts.values()]
        return {
            original: " + ".join(labels) for templates in lists for original, _, labels in templates.rows() if labels
        }

    def notes(self, scores: Sequence[Score]) -> list[str]:
        """What a reader of the tables must know; `scores` tell how far the judge is right on real images."""
        bootstrap = self.config.bootstrap
        notes = []
        for table in self.tables:
            if isinstance(table.dataset, DreamBench):
                against = "the input image" if table.dataset.protocol.references == "kept_image" else "all real images"
                notes.append(
                    f"Subjects: {len(table.dataset.subjects)}, compared with {against}, so that a mere copy of the "
                    f"input is the upper end of DINO and CLIP-I. Intervals: {bootstrap.replicates} bootstrap draws of "
                    "subjects."
                )
                notes.append(
                    f"Near copies: the share of images whose DINO cosine with the input image is at least {NEAR_COPY}, "
                    "under every protocol. The row of real images tells how many other photos of a subject reach that."
                )
                notes += judge_notes(table, scores)
            else:
                references = len(table.dataset.references())
                notes.append(
                    f"FID against {references} real images; it depends on n, so compare rows of equal n only. "
                    f"Intervals: {bootstrap.fid_replicates} draws of generated images, centred on the value; "
                    f"{bootstrap.replicates} of captions for CLIP-T."
                )
                kid = table.dataset.protocol.kid
                if kid is not None:
                    notes.append(
                        f"KID: the mean over {kid.subsets} subsets of {kid.subset_size} images of each side; its "
                        "interval is ±1.96 standard deviations over them, so how it varies at that size, not at n."
                    )
        return notes

    def _points(self) -> list[Point]:
        curve, found = self.config.curve, []
        names = [system.name for system in self.systems]
        if unknown := [name for name in curve.systems if name not in names]:
            raise EvaluationError(f"curve.systems={unknown} are no rows that are made; allowed: {', '.join(names)}.")
        systems = [system for system in self.systems if system.name in (curve.systems or names)]
        for table in self.tables:
            if not isinstance(table.dataset, DreamBench):
                continue
            for scale in curve.guidance_scales:
                protocol = protocol_at(table.dataset.protocol, curve, scale)
                dataset = DreamBench(protocol, table.dataset.folder)
                found.append(Point(scale, table_of(guidance.TABLE, dataset, table.data), systems))
        return found

    def rows(self, table: Table) -> list[str]:
        """The models of a table: those that draw, then those whose images were given."""
        return [system.name for system in self.systems] + [name for of, name in self.external if of == table.name]

    def _external(self, name: str, folder: Path, table: Table) -> External | None:
        size = table.dataset.protocol.sampling.image_size
        return read_external(name, folder, table.name, table.requests, size, alone=len(self.tables) == 1)

    def _systems(self) -> list[System]:
        models, how = self.config.models, self.config.acceleration
        if models.image_decoder is None:
            if not models.external:
                raise EvaluationError(
                    "models is empty: set models.image_decoder, or models.external.NAME to a folder of images."
                )
            return []
        device = self.config.torch_device(self.processes.local_rank)
        systems = [text_system(models.image_decoder, device, how)]
        for name, folder in ((BEFORE_STAGE_3, models.before_stage_3), (AFTER_STAGE_3, models.after_stage_3)):
            if folder is not None:
                systems.append(kosmosg_system(name, folder, models.image_decoder, device, how))
        for folder in run_folders(models.runs):
            systems.append(system := run_system(folder, models.image_decoder, device, how))
            if system.name in [other.name for other in systems[:-1]]:
                raise EvaluationError(
                    f"models.runs: '{folder}' is a second run called '{system.name}'; evaluate it by itself, with "
                    "another output."
                )
        return systems


def datasets(config: EvaluationConfig) -> list[tuple[str, DreamBench | Coco]]:
    """The data sets of a configuration by table, checked.

    Raises:
        DataSetError: what is missing.
    """
    found: list[tuple[str, DreamBench | Coco]] = []
    if config.dreambench is not None and config.data.dreambench is not None:
        found.append(("dreambench", DreamBench(config.dreambench, Path(config.data.dreambench))))
    if config.coco is not None and config.data.coco is not None:
        found.append(("coco", Coco(config.coco, Path(config.data.coco))))
    return found


def table_of(name: str, dataset: DreamBench | Coco, data: str | None = None) -> Table:
    """The table of a data set; `data` is the hash of its files where it is known."""
    data = data or hash_files(dataset.folder, dataset.files())
    return Table(name, dataset, identity(dataset.protocol), data, dataset.requests())


def judge_notes(table: Table, scores: Sequence[Score]) -> list[str]:
    """How far to trust the judge, and what chance gives; nothing where it judged nothing."""
    dataset = table.dataset
    assert isinstance(dataset, DreamBench)
    if not any(score.metric in JUDGED for score in scores if score.table == table.name):
        return []
    real = [s for s in scores if (s.table, s.system) == (table.name, REAL_IMAGES) and s.metric in JUDGED]
    notes = [
        "Kind, colour, pattern: the share of images in which the judge, a network that no model looks through, sees "
        "the subject's own, or what the words change it to. Words: all that the template asks for is seen."
    ]
    if real:
        accuracy = ", ".join(f"{score.metric} {score.value:.2f}" for score in real)
        notes.append(f"The judge on {max(score.n for score in real)} real images: {accuracy}.")
    if chances := [1 / (1 + len(others)) for name in dataset.subjects if (others := dataset.others(name))]:
        notes.append(
            "Identity: the share of images that are nearer, by the judge's feature, to their own input image than to "
            f"the portraits of others of the same kind; chance is {sum(chances) / len(chances):.3g}."
        )
    if pairs := dataset.pairs():
        notes.append(
            f"Two subjects: {len(pairs)} pairs, each slot's kind and identity in its half of the image. Swapped: both "
            "halves show the other's kind; missing: a kind that neither half shows."
        )
    return notes


def slug(name: str) -> str:
    """A system's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
