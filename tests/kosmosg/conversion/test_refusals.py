"""What does not fit is refused before anything is written; what fails while writing leaves nothing behind."""

import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch

from kosmosg.conversion import ConversionError, convert_checkpoint, export_checkpoint, inspect_model
from kosmosg.models.mllm import MLLM
from kosmosg.models.storage import load_part
from kosmosg.tokenizer import DICTIONARY_FILE, SENTENCEPIECE_FILE, Tokenizer
from tests.kosmosg.conversion.conftest import EMBEDDING, PROJECTION, weights_of, without

FC1 = "gpt_model.decoder.layers.1.ffn.fc1.weight"
UNET = "unet/diffusion_pytorch_model.safetensors"


# Edits of a checkpoint.
def model(edit):
    return lambda checkpoint: edit(checkpoint["model"])


def put(name, *shape):
    return model(lambda tensors: tensors.update({name: torch.ones(*shape)}))


def header(**values):
    return lambda checkpoint: checkpoint["cfg"]["model"].update(values)


def no_heads(checkpoint):
    del checkpoint["cfg"]["kosmosg"]


# Command-line options, by the files that the test writes.
def decoder(edit):
    """A copy of the Stable Diffusion folder after `edit(folder)`."""

    def make(world):
        folder = shutil.copytree(world.decoder, world.folder / "other")
        edit(folder)
        return folder

    return {"decoder": make}


def rewrite(name, edit):
    return decoder(lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes())))


def file(name, content):
    def make(world):
        path = world.folder / name
        path.write_bytes(content(world) if callable(content) else content)
        return path

    return make


def spm(world):
    return world.words / SENTENCEPIECE_FILE


def dictionary(world):
    return world.words / DICTIONARY_FILE


def tokenizer(content):
    return {"spm": file("empty.model", content), "dictionary": dictionary}


STAGE_1 = without("aligner", "diffusion_unet", "vae")
ALONE = {"alone": True}  # the checkpoint has no tokenizer beside it
CASES = {
    "unknown name": (put("novel", 1), {}, "'novel'"),
    "missing tensor": (model(lambda m: m.pop(FC1)), {}, rf"1 missing.*'{FC1}'"),
    "another shape": (put(FC1, 2, 2), {}, rf"'{FC1}' \[2, 2\] .*\[64, 32\]"),
    "NaN": (model(lambda m: m[FC1][0].fill_(torch.nan)), {}, "'decoder.layers.1.feed_forward.fc1.weight' .*NaN"),
    "a layer more": (put(FC1.replace(".1.", ".2."), 64, 32), {}, "decoder_layers=2 .* 3"),
    "missing size": (without("aligner.encoder_query"), {}, r"aligner.*'aligner\.encoder_query'"),
    "untied": (model(lambda m: m.update({PROJECTION: m[EMBEDDING] + 1})), {}, f"'{PROJECTION}'.*'{EMBEDDING}'"),
    "no mllm": (without("gpt_model", "img_"), {}, "part mllm .*aligner, unet, vae"),
    "no aligner": (without("aligner"), {}, "part aligner .*mllm, unet, vae"),
    "no vae, no decoder": (without("vae."), {"decoder": None}, r"part vae \(vae\.vae\.\*\).*--decoder"),
    "no heads": (header(decoder_attention_heads=None), {}, "decoder_attention_heads=None"),
    "heads that are text": (header(decoder_attention_heads="2"), {}, "decoder_attention_heads='2'"),
    "heads that do not divide": (header(decoder_attention_heads=5), {}, "decoder_attention_heads=5 .* 32"),
    "another model's header": (header(decoder_embed_dim=2048), {}, "decoder_embed_dim=2048 .* 32"),
    "no heads of the tower": (no_heads, {}, "vision.* 32 .*--vision-heads"),
    "no heads of M": (no_heads, {"vision_heads": 2}, "aligner.* 32 .*--aligner-heads"),
    "given heads": (no_heads, {"vision_heads": 2, "aligner_heads": 5}, "5 heads .*--aligner-heads.* 32"),
    "patches of no square": (put("img_model.visual.positional_embedding", 16, 32), {}, "16 positions"),
    "other states": (put("aligner.encoder_proj.embed_tokens.weight", 32, 16), {}, "aligner .* 16 wide .* 32"),
    "overflow": (
        model(lambda m: m["aligner.encoder_query"].fill_(1e5)),
        {"dtype": "float16"},
        "'queries' .*float16.*bfloat16",
    ),
    "dtype": (None, {"dtype": "int8"}, "dtype='int8' .*float32"),
    "both stages": ("both", {"decoder": None}, "both"),
    "decoder of stage 1": (STAGE_1, {}, "stage 1.*--decoder"),
    "heads of stage 1": (STAGE_1, {"decoder": None, "aligner_heads": 2}, "--aligner-heads"),
    "no Kosmos-2": (None, {"keep_grounding": True}, "--keep-grounding"),
    "no tokenizer": (None, ALONE, "--spm and --dict"),
    "half a tokenizer": (None, {**ALONE, "spm": spm}, "--spm and --dict"),
    "dictionary alone": (None, {**ALONE, "dictionary": dictionary}, "--spm and --dict"),
    "longer dictionary": (
        None,
        {"spm": spm, "dictionary": file("dict.txt", lambda world: dictionary(world).read_bytes() + b"another 1\n")},
        rf"dict\.txt' .*74 .*'{EMBEDDING}' .*73",
    ),
    "no SentencePiece": (None, {"spm": dictionary, "dictionary": dictionary}, r"dict\.txt' and '"),
    "empty": (None, tokenizer(b""), r"empty\.model'"),
    "damaged": (None, tokenizer(lambda world: spm(world).read_bytes()[:-100]), r"empty\.model'"),
    "v1.5's sizes": (None, {"decoder": None}, "32 .*cross_attention_dim .*768.*--decoder"),
    "v1.5's text": ("stage2", {"decoder": None}, "32 .*hidden_size .*768.*--decoder"),
    "another U-Net": (
        None,
        rewrite("unet/config.json", lambda text: text.replace(b'"layers_per_block": 1', b'"layers_per_block": 2')),
        r"unet .*missing.*'diffusion_unet\.unet\..*other'",
    ),
    "damaged configuration": (None, rewrite("unet/config.json", lambda _: b"{"), r"unet/config\.json'"),
    "no VAE": (None, decoder(lambda folder: shutil.rmtree(folder / "vae")), "other'.* vae"),
    "damaged weights": (None, rewrite(UNET, lambda content: content[:-10]), "safetensors'"),
    "no weights": (without("diffusion_unet."), decoder(lambda folder: (folder / UNET).unlink()), "other' .*unet/"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_that_does_not_fit(case, final, stage2, changed, tiny_stable_diffusion, tiny_tokenizer, tmp_path):
    edit, given, message = CASES[case]
    checkpoint = {"stage2": stage2, None: final}.get(edit)
    if edit == "both":
        unet = {n: t for n, t in torch.load(final, weights_only=True)["model"].items() if n.startswith(("diff", "vae"))}
        checkpoint = changed(model(lambda tensors: tensors.update(unet)), of=stage2)
    elif checkpoint is None:
        checkpoint = changed(edit)
    world = SimpleNamespace(folder=tmp_path, decoder=tiny_stable_diffusion, words=tiny_tokenizer)
    options = {"decoder": tiny_stable_diffusion, **given}
    if options.pop("alone", False):
        (tmp_path / "alone").mkdir()
        checkpoint = shutil.copy(checkpoint, tmp_path / "alone" / "checkpoint.pt")
    options = {name: value(world) if callable(value) else value for name, value in options.items()}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(checkpoint, tmp_path / "out", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_missing_may_be_given(final, changed, tiny_stable_diffusion, tiny_tokenizer, tmp_path):
    """Heads by flags, a tokenizer by its files."""
    alone = tmp_path / "alone.pt"
    changed(no_heads).rename(alone)
    files = {"spm": tiny_tokenizer / SENTENCEPIECE_FILE, "dictionary": tiny_tokenizer / DICTIONARY_FILE}
    options = {"decoder": tiny_stable_diffusion, "vision_heads": 2, "aligner_heads": 4}
    record = convert_checkpoint(alone, tmp_path / "out", **files, **options)
    assert record["decided"]["aligner.heads"] == "4, from --aligner-heads"


def test_without_flags_the_heads_are_64_wide():
    """The released widths: 1024 / 64 = 16 and 768 / 64 = 12."""
    from kosmosg.conversion.checkpoint import Header

    header = Header("cfg", {})
    assert header.heads("vision", 1024, None, "--vision-heads") == 16
    assert header.heads("aligner", 768, None, "--aligner-heads") == 12
    assert header.heads("aligner", 768, 6, "--aligner-heads") == 6


def test_a_public_clip(golden, tiny_stable_diffusion, tmp_path):
    clip = golden / "model" / "vit_pretrained.pt"
    state = torch.load(clip, weights_only=True)
    del state["visual.transformer.resblocks.1.mlp.c_fc.bias"]
    torch.save(state, tmp_path / "clip.pt")
    for file, options, message in (
        (clip, {"decoder": tiny_stable_diffusion, "spm": "a"}, "weights of CLIP.*--decoder, --spm does not apply"),
        (clip, {}, "vision.* 48 .*--vision-heads"),
        (tmp_path / "clip.pt", {"vision_heads": 3}, r"1 missing.*resblocks\.1\.mlp\.c_fc"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert_checkpoint(file, tmp_path / "out", **options)


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_a_pickle_among_the_parts(final, tmp_path, tiny_model, tiny_stable_diffusion, write):
    other, folder = tmp_path / "decoder", tmp_path / "model"
    shutil.copytree(tiny_stable_diffusion, other)
    shutil.copytree(tiny_model, folder)
    reading = (
        lambda: convert_checkpoint(final, tmp_path / "out", decoder=other),
        lambda: inspect_model(folder),
        lambda: export_checkpoint(folder, tmp_path / "out.pt"),
        lambda: load_part(MLLM, folder / "mllm"),
    )
    for content in ([1], {"a": 1}, {"state_dict": {"a": torch.ones(1)}}):
        for part in (other / "unet", folder / "mllm"):
            (part / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
            with (part / "diffusion_pytorch_model.bin").open("wb") as file:
                write(content, file)
        for read in reading:
            with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin' ") as error:
                read()
            assert "weights_only" not in str(error.value)  # torch's advice
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder", "model"]


def test_a_folder_that_exists(final, plain, tmp_path, tiny_stable_diffusion):
    out, mistaken, empty = tmp_path / "out", tmp_path / "photographs", tmp_path / "empty"
    shutil.copytree(plain, out)
    (out / "mllm" / "stale").write_text("")
    shutil.copy(final, out / "checkpoint.pt")
    mistaken.mkdir()
    empty.mkdir()
    (mistaken / "1.jpg").write_text("")
    options = {"decoder": tiny_stable_diffusion}
    for source, folder, overwrite, message in (
        (final, out, False, r"out' exists; .*--overwrite"),
        (final, mistaken, True, "photographs' is not a model folder"),
        (final, mistaken / "1.jpg", True, r"1\.jpg' is a file; name the folder"),
        (out / "checkpoint.pt", out, True, r"checkpoint\.pt' lies in '.*out', which --overwrite would replace"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert_checkpoint(source, folder, overwrite=overwrite, **options)
    assert (mistaken / "1.jpg").exists() and (out / "checkpoint.pt").exists()
    for folder in (out, empty):  # an empty folder holds nothing to lose
        convert_checkpoint(final, folder, overwrite=True, **options)
        assert weights_of(folder) == weights_of(plain) and not (folder / "mllm" / "stale").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out", "photographs"]


def test_failing_half_way(final, plain, tmp_path, tiny_stable_diffusion, monkeypatch):
    out, failures = shutil.copytree(plain, tmp_path / "out"), [OSError("No space left on device"), KeyboardInterrupt()]
    (out / "mine").write_text("")
    for folder, failure in zip((out, tmp_path / "new"), failures, strict=True):

        def fail(self, _, failure=failure):
            assert any(path.name.startswith(".") for path in tmp_path.iterdir())  # mllm/ and others are written already
            raise failure

        monkeypatch.setattr(Tokenizer, "save_pretrained", fail)
        with pytest.raises(type(failure)):
            convert_checkpoint(final, folder, overwrite=True, decoder=tiny_stable_diffusion)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert weights_of(out) == weights_of(plain) and (out / "mine").exists()
