"""DINO, CLIP-I and CLIP-T: the mean cosine of pairs, clamped at 0 after averaging as in the released code; and the
share of near copies."""

from collections.abc import Sequence
from pathlib import Path

from torch.nn.functional import cosine_similarity

from evaluation.protocols.benchmark import Item
from evaluation.protocols.dreambench import NEAR_COPY
from evaluation.scores.metric import Metric, Row


class Fidelity(Metric):
    """Similarity of each image to each of its references."""

    network: str

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Return the cosine of each pair of an image and a reference."""
        pairs = [(item, reference) for item in items for reference in item.references]
        return self.compare(pairs, self.network, self.network)

    def compare(self, pairs: Sequence[tuple[Item, Path | str]], left: str, right: str) -> list[Row]:
        """Return the cosine of the two features of each pair, by the networks `left` and `right`."""
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
    """Similarity of each image to its text."""

    name, title, needs, network = "clip_t", "CLIP-T", ("clip_images", "clip_texts"), "clip_images"

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Return the cosine of each image and its text."""
        return self.compare([(item, item.text) for item in items if item.text], self.network, "clip_texts")


class NearCopies(Fidelity):
    """Share of images that nearly copy their input image."""

    name, title, better, needs, network = "near_copies", "Near copies", "", ("dino",), "dino"
    optional, headline = True, False

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Return 1 for each near copy, else 0."""
        pairs = [(item, item.given) for item in items if item.given is not None]
        rows = self.compare(pairs, self.network, self.network)
        return [Row(row.item, row.against, float(row.value >= NEAR_COPY)) for row in rows]
