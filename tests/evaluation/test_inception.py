"""FID's Inception-v3 equals recorded features; other weights are refused."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import interpolate

from evaluation import inception
from evaluation.config import EvaluationConfig
from evaluation.images.provenance import hash_encoder
from evaluation.inception import InceptionV3
from evaluation.processes import Batching, Processes
from evaluation.protocols.benchmark import EvaluationError, read_image
from evaluation.protocols.protocol import FeatureNetwork, Resize
from evaluation.scores.encoders import InceptionFeatures, load_networks, resize
from kosmosg.config import load_config
from tests.conftest import REPOSITORY
from tests.evaluation import tiny_world

TOLERANCE = 1e-4


def formula_weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Return the weights described in golden/inception/README.md."""
    state = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        n = torch.arange(math.prod(shape), dtype=torch.float64)
        w = torch.sin(0.7310585 * n + 1.6180339 * (i + 1)).reshape(shape)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(shape, dtype=torch.int64)
        elif name.endswith(("running_var", "bn.weight")):
            state[name] = (1 + 0.25 * w).float()
        elif len(shape) > 1:
            state[name] = (w * math.sqrt(2 / math.prod(shape[1:])) * 1.4142).float()
        else:
            state[name] = (0.1 * w).float()
    return state


@pytest.fixture(scope="module")
def recorded(shared: Path) -> Path:
    return shared / "golden" / "inception"


@pytest.fixture(scope="module")
def weights(recorded: Path) -> dict[str, Tensor]:
    return formula_weights(json.loads((recorded / "keys.json").read_text()))


@pytest.fixture(scope="module")
def network(weights: dict[str, Tensor]) -> InceptionV3:
    return InceptionV3(weights)


def deviations(network: InceptionV3, recorded: Path) -> Iterator[float]:
    """Yield the largest absolute difference to each recorded output."""
    inputs, outputs = load_file(recorded / "inputs.safetensors"), load_file(recorded / "outputs.safetensors")
    for name, images in inputs.items():
        for feature, values in network(images).items():
            expected = outputs.pop(f"{name}.{feature}")
            assert values.shape == expected.shape
            yield float((values - expected).abs().max())
    assert not outputs, "every recorded output is compared"


def test_features_equal_recorded_ones(network: InceptionV3, recorded: Path) -> None:
    assert max(deviations(network, recorded)) < TOLERANCE


def half_pixel(images: Tensor, side: int) -> Tensor:
    return interpolate(images, (side, side), mode="bilinear", align_corners=False)


def counting(x: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1)


@pytest.mark.parametrize(
    "change", ["half-pixel resize", "padding counted", "average in Mixed_7c", "eps of 1e-5", "scale of 127.5"]
)
def test_other_semantics_change_the_features(
    weights, recorded: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    network = InceptionV3(weights)
    if change == "half-pixel resize":
        monkeypatch.setattr(inception, "resize_tensorflow1", half_pixel)
    elif change == "padding counted":
        monkeypatch.setitem(inception.POOLS, "average", counting)
    elif change == "average in Mixed_7c":
        monkeypatch.setitem(inception.POOLS, "maximum", inception.POOLS["average"])
    elif change == "eps of 1e-5":
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eps = 1e-5
    else:
        resize = inception.resize_tensorflow1
        monkeypatch.setattr(inception, "resize_tensorflow1", lambda *a: (resize(*a) - 127.5) / 127.5 * 128 + 128)
    assert any(apart > 3 * TOLERANCE for apart in deviations(network, recorded))


def test_a_batch_can_have_several_sizes(weights, network: InceptionV3, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(weights, file)
    images = [tiny_world.picture(1), tiny_world.picture(2).resize((80, 50)), tiny_world.picture(3)]
    found = InceptionFeatures(FeatureNetwork(str(file), network="inception"), file, torch.device("cpu")).images(images)
    assert found.shape == (3, 2048)
    for row, image in zip(found, images, strict=True):
        alone = network(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])["2048"][0]
        assert torch.allclose(row, alone, atol=1e-5)
    assert (found[0] - found[2]).abs().max() > 1e-4


def test_real_and_generated_images_have_separate_resizes(
    weights, network, encoders_folder: Path, coco_folder: Path, tmp_path
) -> None:
    file, photo = tmp_path / "weights.pth", next((coco_folder / "val2014").iterdir())
    torch.save(weights, file)
    arguments = ["coco.real_resize.size=40", "coco.generated_resize={size: 32, library: pil, antialias: true}"]
    config = load_config(
        [
            str(REPOSITORY / "configs" / "evaluation_coco.yaml"),
            *arguments,
            f"data.coco={coco_folder}",
            f"local_weights={{inception-2015-12-05: {file}, openai/clip-vit-base-patch32: {encoders_folder / 'clip'}}}",
        ],
        EvaluationConfig,
    )
    assert config.coco is not None
    batching = Batching(Processes(), batch_size=4, console=Console(quiet=True))
    options = (config.encoder_path, torch.device("cpu"), batching, tmp_path / "unused")
    networks = load_networks("coco", config.coco, *options)
    for name, settings in (
        ("fid_real", Resize(40, "tensor", "bilinear", False)),
        ("fid_generated", Resize(32, "pil", "bilinear", True)),
    ):
        pixels = torch.from_numpy(np.array(resize(read_image(photo), settings))).permute(2, 0, 1)
        assert torch.allclose(networks[name]([photo])[0], network(pixels[None])["2048"][0], atol=1e-5)
    assert (networks["fid_real"]([photo]) - networks["fid_generated"]([photo])).abs().max() > 1e-4


def test_hash_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    """Whatever its name, so that it equals the published sum."""
    for name in ("pt_inception.pth", "weights-inception.pth"):
        (tmp_path / name).write_bytes(b"abc")
        assert hash_encoder(tmp_path / name) == hashlib.sha256(b"abc").hexdigest()


def test_stays_in_eval_mode(network: InceptionV3) -> None:
    assert not network.train().training and not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_load_from_a_file(weights, network: InceptionV3, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"weights.{suffix}"
    torch.save(weights, file) if suffix == "pth" else save_file(weights, file)
    loaded = InceptionV3(file).state_dict()
    assert len(loaded) == 566
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in network.state_dict().items())


def test_other_weights_are_refused(weights, tmp_path: Path) -> None:
    changed = {**weights, "fc.weight": torch.zeros(1000, 2048), "AuxLogits.fc.bias": torch.zeros(1)}
    del changed["Mixed_7c.branch_pool.bn.bias"]
    with pytest.raises(EvaluationError) as error:
        InceptionV3(changed)
    for message in (
        'Missing key(s) in state_dict: "Mixed_7c.branch_pool.bn.bias"',
        'Unexpected key(s) in state_dict: "AuxLogits.fc.bias"',
        "size mismatch for fc.weight",
    ):
        assert message in str(error.value)
    with pytest.raises(EvaluationError, match=r"there is no weight file '.*nowhere\.pth'"):
        InceptionV3(tmp_path / "nowhere.pth")
    for name, content in (("a.pth", b"no weights"), ("b.safetensors", b"no weights"), ("c.pth", b""), ("d.pth", None)):
        if content is None:  # pickled code, which is not run
            torch.save({"a": Path("x")}, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(EvaluationError, match="cannot be read as weights"):
            InceptionV3(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(EvaluationError, match="holds no state dict but a list"):
        InceptionV3(tmp_path / "list.pth")


def test_other_inputs_are_refused(network: InceptionV3) -> None:
    for images in [torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)]:
        with pytest.raises(ValueError, match="images must be uint8 N×3×H×W"):
            network(images)
