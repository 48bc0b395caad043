"""Measure peak memory and time of `kosmosg convert` on a generated full-size checkpoint.

    python benchmarks/convert_memory.py                        # needs twice 5.7 GB in a temporary folder
    python benchmarks/convert_memory.py --folder /scratch --dtype float32
    python benchmarks/convert_memory.py --config configs/model/toyland.yaml --vocabulary 300 \\
        --decoder datamodules/toyland/weights/stable-diffusion

The checkpoint has the released names and shapes, derived from modules built on the meta device. The peak is that of the
conversion's own process (VmHWM, which includes mapped pages).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kosmosg.config import load_config
from kosmosg.conversion.export import UNUSED, released_headers, released_state
from kosmosg.conversion.parts import build, expected_shapes
from kosmosg.conversion.stable_diffusion import StableDiffusion
from kosmosg.conversion.weights import DTYPES, Weights
from kosmosg.models.build import build_aligner, build_mllm
from kosmosg.models.model_config import ModelConfig
from kosmosg.tokenizer import DICTIONARY_FILE, LEADING_SYMBOLS, SENTENCEPIECE_FILE, TRAILING_SYMBOLS, Tokenizer

RELEASED_VOCABULARY = 64_007
# The child reports its own peak: measured by the parent, it would include the parent's memory at the fork.
CHILD = """
import sys
import kosmosg.conversion
from kosmosg.cli import main
def peak(): return next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
libraries, status = peak(), main(sys.argv[1:])
print(libraries, peak(), file=sys.stderr)
sys.exit(status)
"""


@dataclass
class Benchmarked:
    model: ModelConfig


def main(arguments: list[str]) -> int:
    given = parse(arguments)
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        checkpoint = Path(scratch) / "checkpoint_final.pt"
        write_checkpoint(checkpoint, given)
        command = ["convert", str(checkpoint), str(Path(scratch) / "model")]
        command += ["--dtype", given.dtype] if given.dtype else []
        command += ["--decoder", given.decoder] if given.decoder else []
        started = time.perf_counter()
        child = subprocess.run([sys.executable, "-c", CHILD, *command], capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if child.returncode:
            print(child.stderr, file=sys.stderr)
            return child.returncode
        largest = max((Path(scratch) / "model").rglob("*.safetensors"), key=lambda file: file.stat().st_size)
        libraries, peak = (1024 * int(kilobytes) for kilobytes in child.stderr.split()[-2:])
        figures = {
            "checkpoint_bytes": checkpoint.stat().st_size,
            "largest_part": largest.parent.name,
            "largest_part_bytes": largest.stat().st_size,
            "peak_bytes": peak,
            "libraries_bytes": libraries,
            "peak_by_largest_part": round(peak / largest.stat().st_size, 3),
            "seconds": round(seconds, 1),
        }
    print(json.dumps(figures, indent=2))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="configs/model/kosmosg.yaml", help="sizes of the model")
    parser.add_argument("--decoder", help="Stable Diffusion folder; by default v1.5's published configurations")
    parser.add_argument("--vocabulary", type=int, default=RELEASED_VOCABULARY, help="number of token ids")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="dtype to convert to; default: float16, as in the checkpoint"
    )
    parser.add_argument("--folder", help="parent of the temporary folder")
    return parser.parse_args(arguments)


def write_checkpoint(file: Path, given: argparse.Namespace) -> None:
    """Write a final checkpoint in float16, and a tokenizer with its vocabulary into the same folder."""
    tokenizer = write_tokenizer(file.parent, given.vocabulary)
    config = load_config([given.config, "model.vision_weights=null"], Benchmarked).model
    decoder = StableDiffusion.find(given.decoder)
    with torch.device("meta"):
        modules = {"mllm": build_mllm(config, tokenizer), "aligner": build_aligner(config)}
    modules |= {part: build(part, decoder.config(part)) for part in ("unet", "vae")}
    configs = {part: dict(module.config) for part, module in modules.items()}
    parts = {part: constant_weights(expected_shapes(part, module)) for part, module in modules.items()}
    state = released_state(parts, configs["mllm"])
    torch.save({**released_headers(file.parent, configs), "model": state, **UNUSED}, file)


def constant_weights(shapes: dict[str, tuple[int, ...]]) -> Weights:
    """Weights in which each tensor is filled with a different number."""

    def fill() -> dict[str, Tensor]:
        numbered = enumerate(shapes.items(), 1)
        return OrderedDict((name, torch.full(shape, n / 1024, dtype=torch.float16)) for n, (name, shape) in numbered)

    return Weights("benchmark", shapes, dict.fromkeys(shapes, torch.float16), fill)


def write_tokenizer(folder: Path, vocabulary: int) -> Tokenizer:
    """Write a small SentencePiece model, and a dictionary with `vocabulary` ids."""
    Tokenizer.train(["a few words to split", "and some more of them"], folder, vocab_size=64)
    words = vocabulary - len(LEADING_SYMBOLS) - len(TRAILING_SYMBOLS)
    (folder / DICTIONARY_FILE).write_text("".join(f"word{n} 1\n" for n in range(words)))
    return Tokenizer(folder / SENTENCEPIECE_FILE, folder / DICTIONARY_FILE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
