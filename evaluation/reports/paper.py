"""Numbers printed in arXiv 2310.02992, shown next to ours; nothing here was measured by this project."""

from collections.abc import Sequence
from dataclasses import dataclass

CITATION = "arXiv 2310.02992"
CAUTION = (
    f"Printed in Table 1 of {CITATION}: other data, other encoders, full-size models. They are here to be looked up, "
    "not to be compared with the numbers above."
)


@dataclass(frozen=True)
class Printed:
    """A printed row with a value for each metric of its table, None for a dash.

    Args:
        remark: text in place of a number.
        experiment: our ablation of this row, a file of configs/ablations/.
    """

    system: str
    values: tuple[float | None, ...]
    remark: str = ""
    experiment: str = ""

    def cells(self, decimals: Sequence[int]) -> list[str]:
        """Return a text for each metric."""
        pairs = zip(self.values, decimals, strict=False)  # the paper lacks our additional metrics
        texts = [self.remark or "–" if value is None else f"{value:.{places}f}" for value, places in pairs]
        return [*texts, *["–"] * (len(decimals) - len(texts))]


# DINO, CLIP-I, CLIP-T; 30 subjects, 750 prompts, four images each.
DREAMBENCH = (
    Printed("Real images", (0.774, 0.885, None)),
    Printed("Textual Inversion (fine-tuned)", (0.569, 0.780, 0.255)),
    Printed("DreamBooth (fine-tuned)", (0.668, 0.803, 0.305)),
    Printed("BLIP-Diffusion (fine-tuned)", (0.670, 0.805, 0.302)),
    Printed("Re-Imagen", (0.600, 0.740, 0.270)),
    Printed("SuTI", (0.741, 0.819, 0.304)),
    Printed("BLIP-Diffusion", (0.594, 0.779, 0.300)),
    Printed("KOSMOS-G", (0.694, 0.847, 0.287)),
)
# FID of 30,000 captions of MS-COCO val2014, zero-shot.
COCO = (
    Printed("GLIDE", (12.24,)),
    Printed("Make-A-Scene", (11.84,)),
    Printed("DALL-E 2", (10.39,)),
    Printed("Stable Diffusion v1.5", (9.34,)),
    Printed("Imagen-3.4B", (7.27,)),
    Printed("GILL-8B", (12.20,)),
    Printed("Emu-14B", (11.66,)),
    Printed("KOSMOS-G-1.9B", (10.99,)),
)
# FID of the same captions after alignment, stage 2.
ALIGNMENT = (
    Printed("Stable Diffusion v1.5", (9.34,)),
    Printed("End-to-end, without AlignerNet", (None,), "fails", experiment="end_to_end_without_alignernet"),
    Printed("End-to-end, with AlignerNet", (11.30,), experiment="end_to_end_with_alignernet"),
    Printed("Decoder of 12 layers alone", (None,), "fails", experiment="decoder_12_layers"),
    Printed("AlignerNet of 12 layers", (9.89,), experiment="alignernet_12_layers"),
    Printed("AlignerNet of 24 layers", (9.55,), experiment="alignernet_24_layers"),
)
PRINTED = {
    "dreambench": ("DreamBench", ("dino", "clip_i", "clip_t"), DREAMBENCH),
    "coco": ("MS-COCO", ("fid",), COCO),
}
"""Table 1, by the name of our table: title, metrics, rows."""
