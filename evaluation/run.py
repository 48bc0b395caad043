"""One evaluation from its configuration to its report; every step goes on where an interrupted one was.

<output>/<table>/<system>-<hash>/   images and manifest
<output>/samples.csv                the score of every pair
<output>/results.json  results.md  report.html  sheets/*.png
<output>/provenance.json            written last: the evaluation is finished
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from evaluation.coco import Coco
from evaluation.config import EvaluationConfig
from evaluation.dreambench import DreamBench
from evaluation.generation import System, generate
from evaluation.manifest import Manifest, write_atomically
from evaluation.pages import Manifests, draw_pages
from evaluation.protocol import identity
from evaluation.provenance import environment, hash_files, hash_json
from evaluation.requests import Request
from evaluation.results import Score, markdown, print_results, read_results, write_results
from evaluation.scoring import Encoders, Sample, Scorer, load_encoders, write_samples
from evaluation.systems import (
    AFTER_STAGE_3,
    BEFORE_STAGE_3,
    COPY_OF_INPUT,
    REAL_IMAGES,
    kosmosg_system,
    stable_diffusion_system,
)

PROVENANCE = "provenance.json"
FOLDER_DIGITS = 8


@dataclass(frozen=True)
class Table:
    """A data set under its protocol, and what is asked of every system."""

    name: str
    dataset: DreamBench | Coco
    protocol: str
    data: str
    requests: list[Request]


class Evaluation:
    """What a configuration asks for, checked: data sets are whole, models fit, before anything is generated.

    Raises:
        FileNotFoundError, ValueError: what is missing or does not fit, by name.
    """

    def __init__(self, config: EvaluationConfig, console: Console):
        self.config, self.console, self.output = config, console, Path(config.output)
        self.tables = [
            Table(
                name,
                dataset,
                identity(dataset.protocol),
                hash_files(dataset.folder, dataset.files()),
                dataset.requests(),
            )
            for name, dataset in self._datasets()
        ]
        self.systems = self._systems()
        self.encoders = {
            f"{table.name}.{name}": hash_files(config.encoder_folder(encoder.weights))
            for table in self.tables
            for name in ("clip", "dino", "fid")
            if (encoder := getattr(table.dataset.protocol, name, None)) is not None
        }

    def run(self) -> list[Score]:
        """Generate, score, write; or read what a finished run of the same configuration, models and data wrote."""
        if self._finished():
            self.console.print(f"'{self.output}' is finished: the same protocols, models and data. Nothing to do.")
            return read_results(self.output / "results.json")
        started = time.monotonic()
        # Encoders first: weights that are not theirs must not come to light after hours of generation.
        encoders = {table.name: load_encoders(table.name, self.config) for table in self.tables}
        self.output.mkdir(parents=True, exist_ok=True)
        manifests = {
            (table.name, system.name): self._generate(table, system) for table in self.tables for system in self.systems
        }
        scores: list[Score] = []
        samples: list[Sample] = []
        for table in self.tables:
            with self.console.status(f"Scoring {table.name}"):
                found = self._score(table, encoders[table.name], manifests)
            scores += found[0]
            samples += found[1]
        write_samples(samples, self.output / "samples.csv", self.output)
        write_results(scores, self.output / "results.json")
        write_atomically(self.output / "results.md", markdown(scores, self.notes()).encode())
        provenance = self._provenance(time.monotonic() - started)
        draw_pages(self, manifests, scores, provenance)
        content = {"key": self.key(), "written": provenance, "config": asdict(self.config)}
        write_atomically(self.output / PROVENANCE, json.dumps(content, indent=1, ensure_ascii=False).encode())
        return scores

    def generate_into(self, folder: str, table: Table, system: System, requests: Sequence[Request]) -> Manifest:
        """The images of `requests`, in a folder named after all they depend on: a changed model starts a new one."""
        values = {
            "system": system.name,
            "protocol": table.protocol,
            "model": system.model,
            "data": table.data,
            "requests": hash_json([asdict(request) for request in requests]),
        }
        name = f"{slug(system.name)}-{hash_json(values)[:FOLDER_DIGITS]}"
        manifest = Manifest(self.output / folder / name, values)
        generate(
            system,
            requests,
            table.dataset.protocol.sampling,
            manifest,
            inputs_folder=table.dataset.folder,
            batch_size=self.config.batch_size,
            label=f"{folder}: {system.name}",
        )
        return manifest

    def key(self) -> str:
        """Hash of everything that the results depend on."""
        return hash_json(
            [
                [(table.protocol, table.data) for table in self.tables],
                [(system.name, system.model) for system in self.systems],
                self.encoders,
                asdict(self.config.bootstrap),
                asdict(self.config.gallery),
            ]
        )

    def notes(self) -> list[str]:
        """What a reader of the tables must know."""
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
            else:
                references = len(table.dataset.references())
                notes.append(
                    f"FID against {references} real images; it depends on n, so compare rows of equal n only. "
                    f"Intervals: {bootstrap.fid_replicates} draws of generated images, centred on the value; "
                    f"{bootstrap.replicates} of captions for CLIP-T."
                )
        return notes

    def _datasets(self) -> list[tuple[str, DreamBench | Coco]]:
        config = self.config
        found: list[tuple[str, DreamBench | Coco]] = []
        if config.dreambench is not None and config.data.dreambench is not None:
            found.append(("dreambench", DreamBench(config.dreambench, Path(config.data.dreambench))))
        if config.coco is not None and config.data.coco is not None:
            found.append(("coco", Coco(config.coco, Path(config.data.coco))))
        return found

    def _systems(self) -> list[System]:
        models, device = self.config.models, self.config.torch_device()
        systems = [stable_diffusion_system(models.image_decoder, device)]
        for name, folder in ((BEFORE_STAGE_3, models.before_stage_3), (AFTER_STAGE_3, models.after_stage_3)):
            if folder is not None:
                systems.append(kosmosg_system(name, folder, models.image_decoder, device))
        return systems

    def _generate(self, table: Table, system: System) -> Manifest:
        return self.generate_into(table.name, table, system, table.requests)

    def _score(self, table: Table, encoders: Encoders, manifests: Manifests) -> tuple[list[Score], list[Sample]]:
        dataset = table.dataset
        if isinstance(dataset, DreamBench):
            rows = [(REAL_IMAGES, dataset.other_real_images()), (COPY_OF_INPUT, dataset.copies_of_input())]
            references: list[Path] = []
        else:
            rows, references = [(REAL_IMAGES, dataset.held_out_images())], dataset.references()
        for system in self.systems:
            manifest = manifests[table.name, system.name]
            manifest.verify()
            rows.append((system.name, [dataset.scored(r, manifest.image_file(r.index)) for r in table.requests]))
        scorer = Scorer(table.name, table.protocol, encoders, self.config.bootstrap, references)
        scores: list[Score] = []
        samples: list[Sample] = []
        for name, images in rows:
            if images:
                found = scorer(name, images)
                scores += found[0]
                samples += found[1]
        return scores, samples

    def _finished(self) -> bool:
        files = [self.output / name for name in (PROVENANCE, "results.json", "report.html")]
        return all(file.is_file() for file in files) and json.loads(files[0].read_text())["key"] == self.key()

    def _provenance(self, seconds: float) -> dict[str, str]:
        return {
            **environment(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "time": f"{seconds:.0f} s for what was not there already",
            **{f"{table.name} protocol": table.protocol for table in self.tables},
            **{f"{table.name} seed": str(table.dataset.protocol.sampling.seed) for table in self.tables},
            **{f"{table.name} data": table.data for table in self.tables},
            **{system.name: system.model for system in self.systems},
            **self.encoders,
        }


def slug(name: str) -> str:
    """A system's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def evaluate(config: EvaluationConfig, console: Console | None = None) -> list[Score]:
    """Run an evaluation and print its tables. Raises what `Evaluation` and the generation do."""
    console = console or Console()
    evaluation = Evaluation(config, console)
    scores = evaluation.run()
    print_results(scores, console)
    console.print(f"The report is in '{evaluation.output / 'report.html'}'.")
    return scores
