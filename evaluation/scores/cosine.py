"""DINO, CLIP-I, CLIP-T: the mean cosine of pairs, clamped at 0 after averaging (released-code.md, "Evaluation"); and
near copies, by the same cosine."""

from collections.abc import Sequence
from pathlib import Path

from torch.nn.functional import cosine_similarity

from evaluation.protocols.benchmark import Item
from evaluation.protocols.dreambench import NEAR_COPY
from evaluation.scores.metric import Metric, Row


class Fidelity(Metric):
    """Every image against each of its references."""

    network: str

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Cosines of features."""
        pairs = [(item, reference) for item in items for reference in item.references]
        return self.compare(pairs, self.network, self.network)

    def compare(self, pairs: Sequence[tuple[Item, Path | str]], left: str, right: str) -> list[Row]:
        """The cosine of each image's feature with that of what it is compared with."""
        if not pairs:
            return []
        images = self.context.networks[left]([item.file for item, _ in pairs])
        others = self.context.networks[right]([other for _, other in pairs])
        cosines = cosine_similarity(images.double(), others.double(), dim=-1).tolist()
        return [Row(item, str(other), cosine) for (item, other), cosine in zip(pairs, cosines, strict=True)]


class Dino(Fidelity):
    name, title, needs, network = "dino", "DINO", ("dino",), "dino"


class ClipI(Fidelity):
    name, title, needs, network = "clip_i", "CLIP-I", ("clip_images",), "clip_images"


class ClipT(Fidelity):
    """Every image against its text."""

    name, title, needs, network = "clip_t", "CLIP-T", ("clip_images", "clip_texts"), "clip_images"

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Cosines of features."""
        return self.compare([(item, item.text) for item in items if item.text], self.network, "clip_texts")


class NearCopies(Fidelity):
    """The share of images that are nearly their input image."""

    name, title, better, needs, network = "near_copies", "Near copies", "", ("dino",), "dino"
    optional, headline = True, False

    def score(self, items: Sequence[Item]) -> list[Row]:
        """1 for a near copy, else 0."""
        pairs = [(item, item.given) for item in items if item.given is not None]
        rows = self.compare(pairs, self.network, self.network)
        return [Row(row.item, row.against, float(row.value >= NEAR_COPY)) for row in rows]
