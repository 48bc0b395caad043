"""What `kosmosg inspect` tells of folders and checkpoints."""

import json
import shutil

import pytest

from kosmosg.cli import main
from kosmosg.conversion import ConversionError, inspect_model
from kosmosg.models.mllm import MLLM
from kosmosg.models.storage import load_part
from kosmosg.pipeline import KosmosGPipeline
from tests import tiny


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_folders(tiny_pipeline, tiny_model, tmp_path):
    found, pipe = inspect_model(tiny_pipeline), KosmosGPipeline.from_pretrained(tiny_pipeline)
    counts = {name: count(getattr(pipe, name)) for name in ("mllm", "aligner", "unet", "vae")}
    assert {name: part["parameters"] for name, part in found["parts"].items()} == counts
    assert found["parameters"] == sum(counts.values()) and found["missing for the pipeline"] == []
    assert found["kind"] == "model folder" and found["stage"] == "final" and found["dtype"] == "float32"
    assert found["vocabulary"] == len(pipe.tokenizer) and found["sizes"]["mllm"]["width"] == tiny.WIDTH
    (tmp_path / "model").symlink_to(tiny_model)
    (tmp_path / "config.yaml").write_text("stage: instruction_tuning\nseed: 3\n")
    found = inspect_model(tmp_path)
    assert found["kind"] == "run folder" and found["missing for the pipeline"] == ["unet", "vae", "scheduler"]
    assert found["provenance"] == {"run": str(tmp_path), "stage": "instruction_tuning", "seed": 3}


@pytest.mark.parametrize(
    ("write", "pooled", "denoiser", "told"),
    [
        (tiny.write_stable_diffusion_xl, tiny.POOLED_WIDTH, "unet", "has a pooled vector"),
        (tiny.write_sana, None, "transformer", "holds a AutoencoderDC"),
    ],
)
def test_pipeline_folders_of_other_image_decoders(write, pooled, denoiser, told, tiny_tokenizer, tmp_path, capsys):
    """They are described whole, and cannot be released checkpoints."""
    model = tiny.write_model(tmp_path / "model", tiny_tokenizer, pooled_width=pooled)
    KosmosGPipeline.from_pretrained(model, write(tmp_path / "decoder")).save_pretrained(tmp_path / "pipe")
    found = inspect_model(tmp_path / "pipe")
    assert {*found["parts"]} == {"mllm", "aligner", denoiser, "vae"} and found["missing for the pipeline"] == []
    assert main(["export", str(tmp_path / "pipe"), str(tmp_path / "released.pt")]) == 2
    assert f"{told}, which released checkpoints have no place for" in capsys.readouterr().err
    assert not (tmp_path / "released.pt").exists()


def test_checkpoints_and_what_they_become(final, stage2, plain, tiny_model):
    found, mllm = inspect_model(final), load_part(MLLM, tiny_model / "mllm")
    assert found["kind"] == "released checkpoint" and found["stage"] == "final"
    assert found["parts"]["mllm"]["parameters"] == count(mllm)  # the tied matrix is counted once
    assert found["missing for the pipeline"] == ["tokenizer", "scheduler"]
    assert found["sizes"]["header"]["decoder_attention_heads"] == tiny.mllm_sizes()["heads"]
    assert found["vocabulary"] == mllm.config.vocab_size
    second = inspect_model(stage2)
    assert second["stage"] == "stage 2" and "text_encoder" in second["parts"]
    converted, record = inspect_model(plain), json.loads((plain / "conversion.json").read_text())
    assert converted["parameters"] == found["parameters"]
    assert converted["provenance"]["converted from"]["sha256"] == record["source"]["sha256"]


def test_the_command(final, capsys, tiny_model):
    assert main(["inspect", str(final), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == inspect_model(final)
    assert main(["inspect", str(tiny_model)]) == 0
    told = capsys.readouterr().out
    assert f"{inspect_model(tiny_model)['parameters']:,} parameters" in told
    assert "missing for the pipeline: unet, vae, scheduler" in told and "width=32" in told


def test_what_is_no_model(tmp_path, tiny_model, capsys):
    with pytest.raises(FileNotFoundError, match="nothing' does not exist"):
        inspect_model(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="holds no model"):
        inspect_model(tmp_path)
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model" / "mllm" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConversionError, match="truncated"):
        inspect_model(tmp_path)
    file.unlink()
    assert main(["inspect", str(tmp_path)]) == 2
    assert f"'{file.parent}' has a config.json but no weights" in capsys.readouterr().err
