"""The MLLM, aligners and both joined: initial weights, what reaches what, packed documents, folders."""

import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kosmosg.image_processing import ClipImageTransform
from kosmosg.models.aligner import AlignerDecoder, AlignerEncoder, LinearAligner, load_aligner
from kosmosg.models.kosmosg import KosmosG
from kosmosg.models.mllm import MLLM
from kosmosg.models.storage import load_part
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


def test_wrong_batches_and_parts_are_named(model, batch):
    narrow = AlignerEncoder(input_width=48, num_queries=3, **tiny.aligner_sizes())
    for refused, told in (
        (lambda: model.mllm(PromptBatch(batch.ids, batch.image_mask, None, batch.padding)), "4 image tokens but 0"),
        (lambda: model.mllm.image_features(torch.zeros(1, 3, 32, 32)), r"\(3, 32, 32\) .*\(3, 64, 64\)"),
        (lambda: model.aligner(*aligner_inputs(255)), "max_positions=256"),
        (lambda: fresh_mllm(heads=3), "heads=3"),
        (lambda: KosmosG(model.mllm, narrow), "width 48 but the MLLM's are 32"),
    ):
        with pytest.raises(ValueError, match=told):
            refused()


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


def other_sizes(part):
    file = part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "ffn_width": 96}))


def weights(edit):
    def change(part):
        state = load_file(part / "diffusion_pytorch_model.safetensors")
        edit(state)
        save_file(state, part / "diffusion_pytorch_model.safetensors", {"format": "pt"})

    return change


NORM = "decoder.norm.weight"
DAMAGED = {
    "sizes": (other_sizes, "feed_forward|fc1"),
    "missing": (weights(lambda state: state.pop(NORM)), NORM),
    "unknown": (weights(lambda state: state.update(novel=torch.zeros(1))), "novel"),
    "nan": (weights(lambda state: state[NORM][3:4].fill_(torch.nan)), f"mllm' has 1 weights with NaN.*{NORM}"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_weights_of_another_model_are_refused(model, tokenizer, tmp_path, damage):
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    edit, told = DAMAGED[damage]
    edit(tmp_path / "mllm")
    with pytest.raises(ValueError, match=told):
        KosmosG.from_pretrained(tmp_path)


def aligner_inputs(length, rows=1):
    """Random hidden states, none of them padding."""
    return torch.randn(rows, length, tiny.WIDTH), torch.zeros(rows, length, dtype=torch.bool)


@pytest.fixture
def linear():
    return LinearAligner(tiny.WIDTH, tiny.CONDITION_WIDTH, tiny.QUERIES)


@pytest.mark.parametrize("length", [1, tiny.QUERIES, tiny.QUERIES + 3])
def test_linear_condition_is_cut_and_filled_up(linear, length):
    hidden, padding = aligner_inputs(length, rows=2)
    condition, kept = linear(hidden, padding).states, min(length, tiny.QUERIES)
    assert condition.shape == (2, tiny.QUERIES, tiny.CONDITION_WIDTH)
    assert torch.equal(condition[:, :kept], linear.projection(hidden[:, :kept]))
    assert torch.equal(condition[:, kept:], linear.padding.expand(2, tiny.QUERIES - kept, -1))


def test_other_aligners_mask_padding(linear):
    """The linear one, and a decoder without an encoder before it."""
    sizes = {**tiny.aligner_sizes(), "encoder_layers": 0}
    encoder = AlignerEncoder(input_width=tiny.WIDTH, num_queries=tiny.QUERIES, **sizes).eval()
    hidden, padding = aligner_inputs(6)
    padding[:, 4:] = True
    for aligner in (linear, encoder):
        alone = aligner(hidden[:, :4], padding[:, :4]).states
        torch.testing.assert_close(aligner(hidden, padding).states, alone)
    decoder = AlignerDecoder(output_width=tiny.WIDTH, **sizes)
    assert decoder(encoder(hidden, padding), 6).shape == (1, 6, tiny.WIDTH)
    assert not [name for name, _ in [*encoder.named_parameters(), *decoder.named_parameters()] if "encoder." in name]


def test_the_pooled_vector_is_read_from_a_query_of_its_own(tmp_path):
    encoder = AlignerEncoder(tiny.WIDTH, num_queries=tiny.QUERIES, pooled_width=10, **tiny.aligner_sizes()).eval()
    inputs = aligner_inputs(5, rows=2)
    condition = encoder(*inputs)
    assert condition.states.shape == (2, tiny.QUERIES, tiny.CONDITION_WIDTH) and condition.pooled.shape == (2, 10)
    condition.pooled.sum().backward()
    assert encoder.queries.grad[-1].any() and not torch.equal(*condition.pooled)
    encoder.save_pretrained(tmp_path)
    read = load_aligner(tmp_path)(*inputs)
    assert torch.equal(read.states, condition.states) and torch.equal(read.pooled, condition.pooled)


def test_aligners_are_read_by_their_kind(model, linear, tokenizer, tmp_path):
    model = KosmosG(model.mllm, linear)
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    read = KosmosG.from_pretrained(tmp_path)
    assert isinstance(read.aligner, LinearAligner)
    assert torch.equal(read.null_condition().states, model.eval().null_condition().states)
    with pytest.raises(ValueError, match="holds a LinearAligner, not a AlignerEncoder"):
        load_part(AlignerEncoder, tmp_path / "aligner")
    with pytest.raises(FileNotFoundError, match="stage 3 an aligner"):
        load_aligner(tmp_path / "nowhere")


@torch.no_grad()
@pytest.mark.parametrize("xpos", [False, True])
def test_packed_documents_equal_single_ones(xpos):
    """Documents packed into one row and kept apart are computed as if each stood alone."""
    mllm, lengths, pad = fresh_mllm(xpos=xpos).eval(), (5, 9, 7), 1
    documents = [torch.randint(8, 40, (length,)) for length in lengths]
    masks = [torch.zeros(length, dtype=torch.bool) for length in lengths]
    for ids, mask in zip(documents, masks, strict=True):
        ids[0] = 0  # a document begins with it
        mask[2 : 2 + tiny.IMAGE_TOKENS] = len(mask) > 5  # the first has no image
    images = torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    ids = torch.cat([*documents, torch.full((4,), pad)])[None]
    row = PromptBatch(ids, torch.cat([*masks, torch.zeros(4, dtype=torch.bool)])[None], images, ids == pad)
    packed, leaking = mllm(row, separate_documents=True)[0].split([*lengths, 4]), mllm(row)[0].split([*lengths, 4])
    for number, (ids, mask) in enumerate(zip(documents, masks, strict=True)):
        own = images[number - 1 : number] if number else None
        alone = mllm(PromptBatch(ids[None], mask[None], own, torch.zeros_like(mask)[None]))[0]
        torch.testing.assert_close(packed[number], alone, rtol=1e-5, atol=1e-5)
        assert number == 0 or not torch.allclose(leaking[number], alone, atol=1e-2)
