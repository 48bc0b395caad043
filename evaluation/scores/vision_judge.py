"""An open vision-language model as a judge: it answers questions about images with a score.

Raw answers are cached in a folder, one JSON file each, so an interrupted evaluation, or another one with the same
folder, does not ask again.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from PIL import Image

from evaluation.protocols.benchmark import EvaluationError, Item
from evaluation.protocols.protocol import VisionJudge
from evaluation.scores.metric import Metric, Row
from kosmosg.files import write_json
from kosmosg.generation import file_hash
from kosmosg.models.vision_language_model import WHOLE_MODELS, LanguageProcessor

SCORE = re.compile(r"score\W*(?:is\W+)?(\d+(?:\.\d+)?)", re.IGNORECASE)
MAX_UNREADABLE = 0.1
"""Maximum share of answers without a score."""


@dataclass(frozen=True)
class Question:
    """A question about images, which are shown before the text in this order."""

    text: str
    images: tuple[Path, ...]


Judge = Callable[[list[tuple[str, list[Image.Image]]]], list[str]]
"""Texts with their images → answers."""


def load_judge(settings: VisionJudge, folder: Path, device: torch.device) -> Judge:
    """Load a transformers vision-language model that answers greedily.

    Raises:
        EvaluationError: the folder holds no such model, or it has no chat template.
    """
    try:
        processor: Any = LanguageProcessor.from_pretrained(folder).processor
        model = WHOLE_MODELS.from_pretrained(folder, trust_remote_code=False, dtype="auto").eval().to(device)
    except (ValueError, OSError, KeyError) as error:
        raise EvaluationError(f"'{folder}' is not a supported vision-language model: {error}") from error
    if getattr(processor.tokenizer, "chat_template", None) is None:
        raise EvaluationError(f"'{folder}' has no chat template, which a judge needs.")

    @torch.inference_mode()
    def answer(text: str, images: list[Image.Image]) -> str:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        prompt = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = processor(images=images, text=[prompt], return_tensors="pt").to(device)
        output = model.generate(**inputs, max_new_tokens=settings.max_new_tokens, do_sample=False)
        return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return lambda questions: [answer(text, images) for text, images in questions]


def cached_answers(
    judge: Judge, folder: Path, read: Callable[[Path], Image.Image]
) -> Callable[[list[Question]], list[str]]:
    """Return a function that answers questions from `folder`, and asks the judge for the others.

    Answers are in files named after a hash of the text and the bytes of the images.

    Args:
        folder: cache of this judge only.
        read: loads the image of a file.
    """

    def answer(question: Question) -> str:
        key = json.dumps([question.text, [file_hash(file) for file in question.images]], ensure_ascii=False)
        file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        if not file.is_file():
            (said,) = judge([(question.text, [read(image) for image in question.images])])
            images = [str(image) for image in question.images]
            write_json(file, {"question": question.text, "images": images, "answer": said})
        return json.loads(file.read_text(encoding="utf-8"))["answer"]

    return lambda questions: [answer(question) for question in questions]


def read_score(answer: str, highest: float) -> float | None:
    """Return the last `Score: N` of an answer divided by the highest score; None if missing or out of range."""
    scores = SCORE.findall(answer)
    return float(scores[-1]) / highest if scores and float(scores[-1]) <= highest else None


class Judgement(Metric):
    """Mean of the judge's scores, as a share of the highest score."""

    needs = ("vlm",)

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Return the scores of the images with a question; answers without a score are skipped.

        Raises:
            EvaluationError: more than a tenth of the answers have no score.
        """
        asked = [item for item in items if self.name in item.asked]
        questions = [(*item.asked[self.name], item.file) for item in asked]
        answers = self.context.networks["vlm"]([Question(text, (*shown, file)) for text, shown, file in questions])
        highest = self.context.protocol.highest
        scored = [(item, answer, read_score(answer, highest)) for item, answer in zip(asked, answers, strict=True)]
        rows = [Row(item, shorten(answer, 200), value) for item, answer, value in scored if value is not None]
        if len(asked) - len(rows) > MAX_UNREADABLE * len(asked):
            example = next(answer for _, answer, value in scored if value is None)
            raise EvaluationError(
                f"{self.title}: the judge gave no score from 0 to {highest:g} in {len(asked) - len(rows)} of "
                f"{len(asked)} answers, as {shorten(example, 80)!r}; use another judge or other instructions."
            )
        return rows


class Preservation(Judgement):
    """How well the image shows the subject, or the style, of the input image."""

    name, title = "preservation", "Preservation"


class Following(Judgement):
    """How well the image follows the prompt."""

    name, title = "following", "Following"


class Overall(Judgement):
    """Geometric mean of preservation and following, image by image."""

    name, title = "overall", "Overall"

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Return the scores of the images that have both."""
        preserved, followed = (
            {id(row.item): row for row in kind(self.context).score(items)} for kind in (Preservation, Following)
        )
        return [
            Row(row.item, "", (row.value * followed[key].value) ** 0.5)
            for key, row in preserved.items()
            if key in followed
        ]
