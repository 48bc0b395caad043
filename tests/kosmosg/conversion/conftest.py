"""Released checkpoints of tiny models: exported from folders, converted once, and changed by the tests."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel

from kosmosg.conversion import convert_checkpoint, export_checkpoint
from kosmosg.models.aligner import AlignerDecoder
from kosmosg.tokenizer import DICTIONARY_FILE, SENTENCEPIECE_FILE
from tests import tiny
from tests.parity.conftest import Recording

EMBEDDING, PROJECTION = "gpt_model.decoder.embed_tokens.weight", "gpt_model.decoder.output_projection.weight"


@pytest.fixture(scope="session")
def recording(golden) -> Recording:
    return Recording(golden)


@pytest.fixture(scope="session")
def final(tmp_path_factory, tiny_pipeline) -> Path:
    """A final checkpoint with its tokenizer beside it."""
    return exported(tmp_path_factory.mktemp("final"), tiny_pipeline)


@pytest.fixture(scope="session")
def stage2(tmp_path_factory, tiny_pipeline, tiny_stable_diffusion) -> Path:
    """A checkpoint of stage 2 with its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("stage2")
    model = folder / "model"
    for part in ("mllm", "aligner", "tokenizer"):
        (model / part).parent.mkdir(exist_ok=True)
        (model / part).symlink_to(tiny_pipeline / part)
    AlignerDecoder(output_width=tiny.WIDTH, **tiny.aligner_sizes()).save_pretrained(model / "aligner_decoder")
    CLIPTextModel.from_pretrained(tiny_stable_diffusion, subfolder="text_encoder").save_pretrained(
        model / "text_encoder"
    )
    return exported(folder, model)


@pytest.fixture(scope="session")
def plain(tmp_path_factory, final, tiny_stable_diffusion) -> Path:
    """What `final` becomes, with its Stable Diffusion given."""
    folder = tmp_path_factory.mktemp("plain") / "out"
    convert_checkpoint(final, folder, decoder=tiny_stable_diffusion)
    return folder


@pytest.fixture(scope="session")
def converted(recording, tmp_path_factory) -> Callable[[str], Path]:
    """The folder that a recorded checkpoint becomes; what no header tells is given from the set's own config.json."""

    @cache
    def convert(checkpoint: str) -> Path:
        options = {
            "spm": recording.folder.parent / "tokenizer" / SENTENCEPIECE_FILE,
            "dictionary": recording.folder / "model" / "dict_tiny.txt",
            "vision_heads": recording.config["vision"]["heads"],
        }
        if checkpoint != "stage1":
            options |= {"decoder": recording.stable_diffusion, "aligner_heads": recording.config["aligner"]["heads"]}
        folder = tmp_path_factory.mktemp(checkpoint) / "out"
        convert_checkpoint(recording.folder / "model" / f"checkpoint_{checkpoint}.pt", folder, **options)
        return folder

    return convert


def exported(folder: Path, model: Path) -> Path:
    export_checkpoint(model, folder / "checkpoint.pt")
    for name in (SENTENCEPIECE_FILE, DICTIONARY_FILE):
        (folder / name).symlink_to(model / "tokenizer" / name)
    return folder / "checkpoint.pt"


@pytest.fixture
def changed(tmp_path, final):
    """`changed(edit, of=final)`: a copy of a checkpoint after `edit(whole checkpoint)`, tokenizer beside it."""

    def change(edit, of: Path = final) -> Path:
        checkpoint = torch.load(of, weights_only=True)
        edit(checkpoint)
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        torch.save(checkpoint, folder / "checkpoint.pt")
        for name in (SENTENCEPIECE_FILE, DICTIONARY_FILE):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to((of.parent / name).resolve())
        return folder / "checkpoint.pt"

    return change


def without(*prefixes):
    """An edit that takes tensors out of a checkpoint."""

    def edit(checkpoint):
        checkpoint["model"] = {n: tensor for n, tensor in checkpoint["model"].items() if not n.startswith(prefixes)}

    return edit


def weights_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every weights file, by part."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}
