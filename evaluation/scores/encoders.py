"""The networks that look at images for the metrics: CLIP, DINO and the judge of transformers, and the feature networks
of FID.

Shapes: `N` images or texts, `F` features, `L` logits, `S` pixels.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    ResNetForImageClassification,
    ResNetModel,
)

from evaluation.inception import InceptionV3
from evaluation.parallel.sharing import Encode, Remembered, Sharing
from evaluation.protocols.protocol import INCEPTION, Encoder, FeatureNetwork, Preprocessing
from evaluation.protocols.requests import EvaluationError, read_image
from evaluation.scores.detection import ObjectDetector, read_crop
from evaluation.scores.judge import Judge, read_half
from evaluation.scores.leakage import thumbnails
from evaluation.scores.resizing import resize
from evaluation.scores.vision_judge import Answers, load_judge
from kosmosg.looking import CLIPEncoder, DinoEncoder, Preprocess, own_preprocessing


class ResNetFeatures:
    """Globally averaged features of a ResNet classifier: FID's network where Inception's 299 px make no sense."""

    def __init__(self, encoder: FeatureNetwork, folder: Path, device: torch.device):
        self.model = load(ResNetModel, folder).to(device)
        self.preprocess = preprocessing(encoder.preprocessing, folder)
        self.device = device

    @torch.inference_mode()
    def images(self, images: list[Image.Image]) -> Tensor:
        """N images → N×F."""
        return self.model(pixel_values=self.preprocess(images).to(self.device)).pooler_output.flatten(1).cpu()


class JudgeEncoder:
    """Logits, then globally averaged features, of a classifier whose `id2label` reads `group: name`."""

    def __init__(self, encoder: Encoder, folder: Path, device: torch.device):
        self.model = load(ResNetForImageClassification, folder).to(device)
        self.preprocess = preprocessing(encoder.preprocessing, folder)
        self.device = device
        names = [self.model.config.id2label[number] for number in range(self.model.config.num_labels)]
        self.labels = tuple((group, name) for group, _, name in (label.partition(": ") for label in names))
        if nameless := [label for label, (_, name) in zip(names, self.labels, strict=True) if not name]:
            raise EvaluationError(
                f"'{folder}' is no judge: its id2label has {nameless[0]!r}, where 'group: name' is expected."
            )

    @torch.inference_mode()
    def images(self, images: list[Image.Image]) -> Tensor:
        """N images → N×(L+F)."""
        features = self.model.resnet(self.preprocess(images).to(self.device)).pooler_output
        return torch.cat([self.model.classifier(features), features.flatten(1)], dim=1).cpu()


class InceptionFeatures:
    """The 2048 features of FID's Inception-v3, fed the bytes of images of any size."""

    def __init__(self, encoder: FeatureNetwork, file: Path, device: torch.device):
        self.model = InceptionV3(file).to(device)
        self.device = device

    @torch.inference_mode()
    def images(self, images: list[Image.Image]) -> Tensor:
        """N images → N×2048; images of one size are looked at together."""
        features = torch.empty(len(images), 2048)
        for size in {image.size for image in images}:
            rows = [row for row, image in enumerate(images) if image.size == size]
            pixels = torch.from_numpy(np.stack([np.asarray(images[row]) for row in rows])).permute(0, 3, 1, 2)
            features[rows] = self.model(pixels.to(self.device))["2048"].cpu()
        return features


FeatureEncoder = ResNetFeatures | InceptionFeatures
FEATURE_NETWORKS: dict[str, Callable[[FeatureNetwork, Path, torch.device], FeatureEncoder]] = {
    "resnet": ResNetFeatures,
    INCEPTION: InceptionFeatures,
}
"""By the protocol's `fid.network`."""


def feature_network(encoder: FeatureNetwork, folder: Path, device: torch.device) -> FeatureEncoder:
    """The network that a protocol names.

    Raises:
        EvaluationError: unknown; lists the choices.
    """
    if encoder.network not in FEATURE_NETWORKS:
        raise EvaluationError(f"fid.network={encoder.network!r} is unknown; allowed: {', '.join(FEATURE_NETWORKS)}.")
    return FEATURE_NETWORKS[encoder.network](encoder, folder, device)


def load(kind: type, folder: Path, **options) -> Any:
    """`kind.from_pretrained` in eval mode, refusing a folder that lacks some of the weights.

    Raises:
        EvaluationError: weights that would have stayed random; the first few are named.
    """
    options |= {"dtype": torch.float32, "trust_remote_code": False}
    model, report = kind.from_pretrained(folder, output_loading_info=True, **options)
    wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if wrong:
        raise EvaluationError(
            f"'{folder}' is no {kind.__name__}: {len(wrong)} weights are missing or misshapen, as {wrong[:3]}."
        )
    return model.eval().requires_grad_(False)


def preprocessing(stated: Preprocessing | None, folder: Path) -> Preprocess:
    """PIL images → N×3×S×S, as the protocol states, or as the encoder's folder does."""
    if stated is None:
        try:
            return own_preprocessing(folder)
        except ValueError as error:
            raise EvaluationError(f"'{folder}' has no preprocessing that can be used: {error}") from error
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": stated.resize},
        crop_size={"height": stated.crop, "width": stated.crop},
        resample=Image.Resampling[stated.interpolation.upper()],
        image_mean=stated.mean,
        image_std=stated.std,
    )
    return lambda images: processor(images, return_tensors="pt")["pixel_values"]


def load_networks(
    benchmark: str,
    protocol: Any,
    path_of: Callable[[Encoder], Path],
    device: torch.device,
    sharing: Sharing,
    answers: Path,
) -> dict[str, Any]:
    """What metrics ask, by name: functions from files or texts to features, judges, a detector. Those that the protocol
    names; `pixels` needs no weights.

    Args:
        path_of: where the weights of an encoder lie.
        answers: the file that keeps what a vision-language judge answers.

    Raises:
        FileNotFoundError, ValueError: weights that are missing or of another network.
    """
    read = partial(read_image, upright=protocol.upright)

    def remembered(name: str, encode: Encode, read: Callable[[Any], Any] = read) -> Remembered:
        return Remembered(f"{benchmark}.{name}", encode, sharing, read)

    found: dict[str, Any] = {"pixels": remembered("pixels", thumbnails)}
    if (stated := protocol.clip) is not None:
        folder = path_of(stated)
        clip = CLIPEncoder(folder, device, preprocessing(stated.preprocessing, folder))
        found["clip_images"], found["clip_texts"] = (
            remembered("images", clip.images),
            remembered("texts", clip.texts, str),
        )
    if (stated := getattr(protocol, "dino", None)) is not None:
        folder = path_of(stated)
        dino = DinoEncoder(folder, device, preprocessing(stated.preprocessing, folder))
        found["dino"] = remembered("dino", dino.images)
    if (stated := getattr(protocol, "judge", None)) is not None:
        judge = JudgeEncoder(stated, path_of(stated), device)
        look = remembered("judge", judge.images, partial(read_half, upright=protocol.upright))
        found["judge"] = Judge(look, judge.labels)
    if (stated := getattr(protocol, "vlm", None)) is not None:
        found["vlm"] = Answers(load_judge(stated, path_of(stated), device), answers, sharing, read)
    if (stated := getattr(protocol, "detector", None)) is not None:
        detector = ObjectDetector(stated, path_of(stated), device)
        found["detector"] = remembered("detector", detector.images)
        found["detector_names"] = detector.names
        if "clip_images" in found:
            found["clip_crops"] = remembered("clip_crops", clip.images, partial(read_crop, read=read))
    if (stated := getattr(protocol, "fid", None)) is not None:
        images = feature_network(stated, path_of(stated), device).images
        for side, size in (("fid_real", protocol.real_resize), ("fid_generated", protocol.generated_resize)):
            found[side] = remembered(side, images, lambda file, size=size: resize(read(file), size))
    return found
