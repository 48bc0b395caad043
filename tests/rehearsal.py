"""The recipes of docs/recipes.md at the size of a test: python -m tests.rehearsal [A B C …] [--folder FOLDER]

Each command of the page's `bash` blocks is run as it stands there, in a folder where the names of the public files are
tiny random models and sets in the same layouts. What differs is in `DOWNLOADS`, `REPLACED` and `APPENDED` below: the
public sets, the number of processes, sizes and lengths. So a command that no longer works fails here. Each training is
stopped after its first checkpoint, and the same command resumes it. `python` and `kosmosg` are called in forks of this
process, which saves the libraries' import in each of them; everything else, torchrun too, is started as it is.
"""

import argparse
import io
import os
import re
import shlex
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import yaml
from PIL import Image

from evaluate import configure_logging
from kosmosg.config import load_config
from tests import tiny
from tests.datamodules.sources import published
from tests.evaluation import tiny_world
from tests.lightning_modules import processes
from train import stage_schema

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "recipes.md"
LINKED = ("train.py", "evaluate.py", "configs")  # of the clone in which the page is followed
LIMIT_SECONDS = 600
SAMPLES = 16
STEPS = 8

DOWNLOADERS = ("hf download", "wget", "git clone")  # see `DOWNLOADS`
PROGRAMS = ("python", "torchrun", "kosmosg")  # others are the shell's
SHARED = {"C": "A"}  # recipes that are followed in the folder of another
REPLACED = (("--nproc-per-node 8", "--nproc-per-node 2"),)
MODEL = (
    *(f"model.mllm.{key}" for key in ("width=32", "layers=2", "heads=2", "ffn_width=64", "image_tokens=4")),
    *(f"model.mllm.vision.{key}" for key in ("image_size=64", "patch_size=16", "width=32", "layers=2", "heads=2")),
    *(f"model.aligner.{key}" for key in ("width=32", "heads=2", "ffn_width=64", "max_positions=512")),
    *(f"model.aligner.{key}" for key in ("encoder_layers=2", "decoder_layers=2")),
    *(f"model.aligner_decoder.{key}" for key in ("heads=2", "ffn_width=64", "max_positions=512")),
    *(f"model.aligner_decoder.{key}" for key in ("encoder_layers=2", "decoder_layers=2")),
    *("model.mllm.vision.ffn_width=64", "model.image_size=64"),
)
TRAINING = (
    *("trainer.accelerator=cpu", "trainer.global_batch_size=4", f"trainer.max_steps={STEPS}", "trainer.log_every=1"),
    *("trainer.checkpoint_every=2", f"trainer.val_every={STEPS}"),
    *("grids.every=100", "grids.prompts=2", "grids.steps=2"),
    *("data.micro_batch_size=2", "data.lane_rows=2", "data.num_workers=0", "data.validation_samples=4"),
    *("data.max_pieces=100", "optimizer.warmup_steps=1", "wandb.mode=disabled"),
)
EVALUATION = (
    *("dreambench.max_subjects=2", "dreambench.max_templates=1", "dreambench.images_per_prompt=1", "device=cpu"),
    *("dreambench.sampling.steps=2", "dreambench.sampling.image_size=64", "gallery.subjects=1", "gallery.templates=1"),
    *("gallery.swap_prompts=[]", "gallery.pair_prompt=null", "bootstrap.replicates=20"),
)
# To commands that hold the words on the left, in this order: later wins.
APPENDED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("train.py (cache )?configs", (*MODEL, *TRAINING)),
    ("train.py (cache )?configs.*/alignment.yaml", ("data.max_clip_tokens=22",)),
    ("train.py (cache )?configs.*/instruction_tuning.yaml", ("data.min_image_side=0",)),
    ("train.py (cache )?configs", (f"model.aligner.num_queries={tiny.QUERIES}",)),
    ("train.py (cache )?configs.*/stable_diffusion_xl.yaml", (f"model.aligner.pooled_width={tiny.POOLED_WIDTH}",)),
    ("torchrun.* train.py (cache )?configs", ("trainer.devices=2",)),
    ("kosmosg data convert", ("processes=1",)),
    ("kosmosg data convert instructions", ("samples_per_shard=4",)),
    ("kosmosg generate", ("--steps", "4", "--device", "cpu")),
    ("evaluate.py configs", EVALUATION),
)


class RehearsalError(Exception):
    """A command of the page that does not do what the page says."""


# The page.
def recipes(page: Path = PAGE) -> dict[str, list[str]]:
    """Commands of the `bash` blocks by the letter of their heading, `## A. …`; continued lines are joined."""
    found: dict[str, list[str]] = {}
    letter, block = None, False
    for line in page.read_text().replace("\\\n", " ").splitlines():
        if line.startswith("## "):
            heading = re.match(r"## ([A-Z])\. ", line)
            letter = heading and heading[1]
        elif line.startswith("```"):
            block = line == "```bash"
        elif block and letter and (command := " ".join(shlex.split(line, comments=True, posix=False))):
            found.setdefault(letter, []).append(command)
    return found


def changed(command: str) -> tuple[str, list[str]]:
    """The command with what `REPLACED` says, and the arguments that are appended to it."""
    appended = [key for words, keys in APPENDED if re.search(words, command) for key in keys]
    for old, new in REPLACED:
        command = command.replace(old, new)
    return command, appended


# The tiny files, under the names of the public ones.
def write_models(folder: Path) -> None:
    """Kosmos-2, Qwen2.5-VL, three image decoders, CLIP and DINO, at the place of their hub ids."""
    words = tiny.write_tokenizer(folder / "words")
    tiny.write_kosmos2(folder / "microsoft/kosmos-2-patch14-224", words)
    tiny.write_language_model(folder / "Qwen/Qwen2.5-VL-3B-Instruct", "qwen2_5_vl")
    tiny.write_stable_diffusion(folder / "stable-diffusion-v1-5/stable-diffusion-v1-5")
    tiny.write_stable_diffusion_xl(folder / "stabilityai/stable-diffusion-xl-base-1.0")
    tiny.write_sana(folder / "Efficient-Large-Model/Sana_1600M_512px_diffusers")
    tiny_world.write_encoders(folder / "encoders", 224)
    for name, place in (("clip", "openai/clip-vit-base-patch32"), ("dino", "facebook/dino-vits16")):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / "encoders" / name).rename(folder / place)


def cc3m(folder: Path) -> None:
    """`cc3m-train-0000.tar` … of jpg and txt, as img2dataset wrote them."""
    for split, shards in (("train", 4), ("validation", 1)):
        for number in range(shards):
            with tarfile.open(folder / f"cc3m-{split}-{number:04d}.tar", "w") as tar:
                for i in range(number * SAMPLES, (number + 1) * SAMPLES):
                    published.add(tar, f"{i:09d}.jpg", published.jpeg(i))
                    published.add(tar, f"{i:09d}.txt", published.CAPTIONS[i % 4].encode())


def cc12m(folder: Path) -> None:
    rows = (f"https://example.org/{i}.jpg\t{published.CAPTIONS[i % 4]}\n" for i in range(2200))
    published.write(folder / "cc12m.tsv", "".join(rows))


def metaquery_instruct(folder: Path) -> None:
    images = [{"bytes": published.jpeg(i), "path": f"{i}.jpg"} for i in range(SAMPLES + 2)]
    rows = [
        {"source_images": images[i : i + 2], "prompt": "both at sea", "target_image": images[i + 2]}
        for i in range(SAMPLES)
    ]
    write_parquet(folder / "train-00000.parquet", rows)


def subjects_200k(folder: Path) -> None:
    """Two images side by side, with a white margin around each."""
    side, margin = published.SIDE, 8
    words = {"item": "a fish", "description_0": "a red fish", "description_1": "a fish at sea"}
    rows = []
    for i in range(SAMPLES):
        sheet = Image.new("RGB", (2 * (side + 2 * margin), side + 2 * margin), "white")
        for half in (0, 1):
            sheet.paste(published.picture(i + half), (margin + half * (side + 2 * margin), margin))
        stream = io.BytesIO()
        sheet.save(stream, "PNG")
        rows.append({"image": {"bytes": stream.getvalue(), "path": None}, "description": words})
    write_parquet(folder / "data/train-00000-of-00032.parquet", rows)


def dreambooth(folder: Path) -> None:
    subjects = yaml.safe_load((REPOSITORY / "configs/protocols/dreambench/kosmosg.yaml").read_text())["dreambench"]
    for number, (name, subject) in enumerate(subjects["subjects"].items()):
        for file in {"00.jpg", "01.jpg", subject["kept_image"]}:
            published.write(folder / "dataset" / name / file, published.jpeg(number))


def write_parquet(file: Path, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


DOWNLOADS: dict[str, Callable[[Path], None]] = {
    "pixparse/cc3m-wds": cc3m,
    "xcpan/MetaQuery_Instruct_2.4M_512res": metaquery_instruct,
    "Yuanshi/Subjects200K": subjects_200k,
    "https://storage.googleapis.com/conceptual_12m/cc12m.tsv": cc12m,
    "https://github.com/google/dreambooth": dreambooth,
}
"""What stands for a public set, by its name in the page: writes it into a folder in the published layout."""


def download(arguments: list[str]) -> None:
    """In the place of `hf download`, `wget -P FOLDER` and `git clone`."""
    parser = argparse.ArgumentParser()
    for option in ("--repo-type", "--include", "--local-dir", "-P"):
        parser.add_argument(option)
    given, rest = parser.parse_known_args(arguments)
    source = next(word for word in rest if word in DOWNLOADS)
    target = Path(given.local_dir or given.P or rest[-1])
    with tempfile.TemporaryDirectory() as place:
        DOWNLOADS[source](Path(place))
        files = [path.relative_to(place) for path in Path(place).rglob("*") if path.is_file()]
        found = [file for file in files if fnmatch(str(file), given.include or "*")]
        if not found:
            raise RehearsalError(f"--include {given.include} names no file of {source}")
        for file in found:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(place) / file, target / file)


# Commands.
class Workspace:
    """A folder in which the page is followed."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.log, self.count = self.folder / "logs", 0
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def build(self) -> None:
        """Everything anew, from which the first command starts."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.log.mkdir(parents=True)
        for name in LINKED:
            (self.folder / name).symlink_to(REPOSITORY / name)
        write_models(self.folder)

    def follow(self, command: str) -> None:
        """Run a command of the page; a training is stopped once and resumed. Raises RehearsalError."""
        os.chdir(self.folder)
        command, appended = changed(command)
        words = [*shlex.split(command), *appended]
        started = time.monotonic()
        note = ""
        if command.startswith(DOWNLOADERS):
            download(words)
            note = "written here"
        elif re.search(r"train\.py configs", command) and "dry_run=true" not in words:
            note = self._stop(words)
            self._finish(words)
        else:
            self._finish(words if words[0] in PROGRAMS else ["bash", "-c", command])
        print(f"{time.monotonic() - started:6.1f} s  {command}{f'  [{note}]' if note else ''}", flush=True)

    def _finish(self, words: list[str]) -> None:
        log = self._next_log()
        statuses = processes.wait(self._start(words, log), LIMIT_SECONDS)
        if any(statuses):
            told = "".join(file.read_text()[-3000:] for file in sorted(self.log.glob(f"{log.name}*")))
            raise RehearsalError(f"status {statuses} of: {shlex.join(words)}\n{told}")

    def _stop(self, words: list[str]) -> str:
        """Start a training, and stop it by SIGTERM after its first checkpoint."""
        experiment = load_config(words[words.index("train.py") + 1 :], stage_schema)
        run = self.folder / experiment.run
        log = self._next_log()
        children = self._start(words, log)
        until = time.monotonic() + LIMIT_SECONDS
        while not list(run.glob("checkpoints/step-*")) and time.monotonic() < until and alive(children[0]):
            time.sleep(0.005)
        if alive(children[0]):
            os.kill(children[0], signal.SIGTERM)
        processes.wait(children, LIMIT_SECONDS)
        if not (steps := sorted(run.glob("checkpoints/step-*"))) or (run / "finished.json").exists():
            told = "".join(file.read_text()[-3000:] for file in sorted(self.log.glob(f"{log.name}*")))
            raise RehearsalError(f"not stopped after a checkpoint: {shlex.join(words)}\n{told}")
        return f"stopped at {steps[-1].name}, resumed"

    def _next_log(self) -> Path:
        self.count += 1
        return self.log / f"{self.count:02d}"

    def _start(self, words: list[str], log: Path) -> list[int]:
        """Ids of the processes that run a command."""
        if (action := in_process(words)) is not None:
            return processes.start(1, action, log)
        return processes.start(1, lambda: os.execvpe(words[0], words, self.environment), log)


def alive(child: int) -> bool:
    """Whether a child process runs still; it may be waited for afterwards."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def in_process(words: list[str]) -> Callable[[], int | None] | None:
    """What a command of `python` or `kosmosg` does, to be called in a fork; None for others."""
    import evaluate
    import kosmosg.cli
    import train

    if words[0] == "kosmosg":
        return lambda: kosmosg.cli.main(words[1:])
    if words[0] != "python":
        return None
    program, *arguments = words[2:] if words[1] == "-m" else words[1:]
    mains = {"train.py": train.main, "evaluate.py": evaluate.main}
    return lambda: mains[program](arguments)


def main(arguments: list[str]) -> int:
    """Exit status: 0, or 1 where a command of the page failed."""
    known = recipes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"{', '.join(known)}; default: all")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "runs" / "rehearsal", help="emptied first")
    given = parser.parse_args(arguments)
    chosen = given.recipes or list(known)
    configure_logging()
    started, here, folder = time.monotonic(), Path.cwd(), given.folder.resolve()
    spaces: dict[str, Workspace] = {}
    try:
        for letter in chosen:
            place = SHARED.get(letter, letter)
            if place not in spaces:
                spaces[place] = Workspace(folder / place)
                spaces[place].build()
            print(f"Recipe {letter}", flush=True)
            for command in known[letter]:
                spaces[place].follow(command)
    except RehearsalError as error:
        print(f"rehearsal: {error}", file=sys.stderr)
        return 1
    finally:
        os.chdir(here)
    drawn = sorted(path for space in spaces.values() for path in space.folder.glob("pictures/*"))
    print(f"{time.monotonic() - started:.0f} s. Images are in {', '.join(map(str, drawn))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
