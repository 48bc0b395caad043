import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kosmosg.image_processing import ClipImageTransform
from kosmosg.models.aligner import AlignerDecoder, AlignerEncoder
from kosmosg.models.kosmosg import KosmosG
from kosmosg.models.mllm import MLLM
from kosmosg.models.transformer import decoder_gain, encoder_gain, self_attention_gain
from kosmosg.prompt import PromptBatch, PromptEncoder
from kosmosg.tokenizer import Tokenizer
from tests import tiny

PICTURE = Image.new("RGB", (64, 64), "orange")


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return Tokenizer.from_pretrained(tiny_tokenizer)


@pytest.fixture
def model(tiny_model):
    return KosmosG.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def batch(tokenizer):
    encoder = PromptEncoder(tokenizer, ClipImageTransform(tiny.IMAGE_SIZE), tiny.IMAGE_TOKENS)
    return encoder.collate([encoder(["a ", PICTURE, " in the snow"]), encoder(["a dog"])])


def fresh_mllm(**options):
    return MLLM(vocab_size=50, **{**tiny.mllm_sizes(), **options})


def standard_deviation_ratio(weight, width):
    """Of a linear weight to PyTorch's default, U(±1/sqrt(width))."""
    return weight.std().item() / (1 / math.sqrt(3 * width))


def test_magneto_initialisation():
    mllm = fresh_mllm(width=256, ffn_width=512, layers=3)
    embedding = mllm.decoder.embed_tokens.weight
    assert embedding[1].abs().max() == 0
    assert embedding[2:].std().item() == pytest.approx(256**-0.5, rel=0.05)
    layer = mllm.decoder.layers[1]
    scaled = self_attention_gain(3)
    assert scaled == pytest.approx(math.sqrt(math.log(6)))
    for linear in (layer.feed_forward.fc1, layer.self_attention.v_proj, layer.self_attention.out_proj):
        assert standard_deviation_ratio(linear.weight, linear.in_features) == pytest.approx(scaled, rel=0.02)
    for linear in (layer.self_attention.q_proj, layer.self_attention.k_proj):
        assert standard_deviation_ratio(linear.weight, 256) == pytest.approx(1, rel=0.02)
    resampler = mllm.resampler.attention
    xavier = math.sqrt(2 / (256 + 256))
    assert resampler.q_proj.weight.std().item() == pytest.approx(xavier / math.sqrt(2), rel=0.02)
    assert resampler.out_proj.weight.std().item() == pytest.approx(xavier, rel=0.02)
    assert resampler.out_proj.bias.abs().max() == 0


def test_aligner_initialisation():
    sizes = {**tiny.aligner_sizes(), "width": 256, "encoder_layers": 3, "decoder_layers": 5}
    m = AlignerEncoder(input_width=32, num_queries=9, **sizes)
    n = AlignerDecoder(output_width=32, **sizes)
    gains = {
        m.encoder: math.sqrt(math.log(15) * math.log(6) / 3),
        m.decoder: math.sqrt(math.log(15)),
        n.decoder: math.sqrt(math.log(15)),
        n.encoder: math.sqrt(math.log(6)),
    }
    assert encoder_gain(3, 5) == gains[m.encoder] and decoder_gain(5) == gains[m.decoder]
    for layers, gain in gains.items():
        assert standard_deviation_ratio(layers[0].self_attention.v_proj.weight, 256) == pytest.approx(gain, rel=0.02)
        if hasattr(layers[0], "cross_attention"):
            assert standard_deviation_ratio(layers[0].cross_attention.v_proj.weight, 256) == pytest.approx(1, rel=0.02)
    assert m.queries.std().item() == pytest.approx(1, rel=0.1)
    assert n.positions.weight.std().item() == pytest.approx(1, rel=0.1)


@torch.no_grad()
def test_decoder_is_causal_and_queries_are_not(model, batch):
    hidden = model.mllm(batch)
    changed = PromptBatch(batch.ids.clone(), batch.image_mask, batch.images, batch.padding)
    changed.ids[0, -1] = 5
    assert torch.equal(model.mllm(changed)[0, :-1], hidden[0, :-1])
    assert not torch.equal(model.mllm(changed)[0, -1], hidden[0, -1])
    swapped = model.aligner.queries.data.clone()
    swapped[-1] += 1.0
    before = model.condition(batch).states
    model.aligner.queries.data = swapped
    assert not torch.allclose(model.condition(batch).states[:, 0], before[:, 0])


@torch.no_grad()
def test_padding_changes_no_condition(model, batch):
    longer = PromptBatch(
        ids=torch.nn.functional.pad(batch.ids, (0, 5), value=1),
        image_mask=torch.nn.functional.pad(batch.image_mask, (0, 5)),
        images=batch.images,
        padding=torch.nn.functional.pad(batch.padding, (0, 5), value=True),
    )
    torch.testing.assert_close(model.condition(longer).states, model.condition(batch).states, rtol=0, atol=1e-5)


def test_dropout_is_where_the_released_code_has_it(model, batch):
    model.train()
    assert not torch.equal(model.mllm(batch), model.mllm(batch))
    features = model.mllm.image_features(batch.images), model.mllm.image_features(batch.images)
    assert not torch.equal(*features)
    hidden = torch.randn(2, 5, tiny.WIDTH)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    assert torch.equal(model.aligner(hidden, padding).states, model.aligner(hidden, padding).states)


def test_every_parameter_is_used(model, batch, tokenizer):
    decoder = AlignerDecoder(output_width=tiny.WIDTH, **tiny.aligner_sizes())
    condition = model.condition(batch)
    (decoder(condition, 7).square().mean() + condition.states.square().mean()).backward()
    unused = [name for part in (model, decoder) for name, p in part.named_parameters() if p.grad is None]
    assert unused == []


def test_bfloat16_follows_float32(tiny_model, batch):
    wide = KosmosG.from_pretrained(tiny_model)
    narrow = KosmosG.from_pretrained(tiny_model, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        expected, ours = wide.condition(batch).states, narrow.condition(batch).states
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = wide.condition(batch).states
    assert ours.dtype == torch.bfloat16
    for result in (ours, mixed):
        assert (result.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_wrong_batches_are_named(model, batch):
    with pytest.raises(ValueError, match="4 image tokens but 0 images"):
        model.mllm(PromptBatch(batch.ids, batch.image_mask, None, batch.padding))
    with pytest.raises(ValueError, match=r"\(3, 32, 32\) but the vision encoder reads \(3, 64, 64\)"):
        model.mllm.image_features(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="max_positions=256"):
        model.aligner(torch.zeros(1, 255, tiny.WIDTH), torch.zeros(1, 255, dtype=torch.bool))
    with pytest.raises(ValueError, match="heads=3"):
        fresh_mllm(heads=3)


def test_saving_and_loading(model, tokenizer, batch, tmp_path):
    decoder = AlignerDecoder(output_width=tiny.WIDTH, **tiny.aligner_sizes())
    run = tmp_path / "run"
    for _ in range(2):  # the second time over the first
        model.save_pretrained(run / "model", tokenizer=tokenizer, aligner_decoder=decoder)
    assert sorted(p.name for p in (run / "model").iterdir()) == ["aligner", "aligner_decoder", "mllm", "tokenizer"]
    for folder in (run, run / "model"):
        copy = KosmosG.from_pretrained(folder)
        with torch.no_grad():
            assert torch.equal(copy.condition(batch).states, model.condition(batch).states)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        KosmosG.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["sizes", "missing", "unknown", "nan"])
def test_weights_of_another_model_are_refused(model, tokenizer, tmp_path, damage):
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    config, weights = tmp_path / "mllm" / "config.json", tmp_path / "mllm" / "diffusion_pytorch_model.safetensors"
    if damage == "sizes":
        config.write_text(json.dumps({**json.loads(config.read_text()), "ffn_width": 96}))
    else:
        state = load_file(weights)
        if damage == "nan":
            state["decoder.norm.weight"][3] = torch.nan
        else:
            state["novel"] = state.pop("decoder.norm.weight") if damage == "missing" else torch.zeros(1)
        save_file(state, weights, {"format": "pt"})
    told = {
        "sizes": "feed_forward|fc1",
        "missing": r"decoder\.norm\.weight",
        "unknown": "novel",
        "nan": r"mllm' has 1 weights with NaN or infinite values, as \['decoder\.norm\.weight'\]",
    }[damage]
    with pytest.raises(ValueError, match=told):
        KosmosG.from_pretrained(tmp_path)


def test_parts_of_different_models_do_not_join(model):
    aligner = AlignerEncoder(input_width=48, num_queries=3, **tiny.aligner_sizes())
    with pytest.raises(ValueError, match=r"width 48 but the MLLM's are 32"):
        KosmosG(model.mllm, aligner)
