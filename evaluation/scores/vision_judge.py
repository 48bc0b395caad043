"""A judge that is an open vision-language model: it is asked about images in words, and its answer holds a score.

Its raw answers are kept in a folder, a JSON file each, so that no question is put twice to one judge: not after a kill,
not by another evaluation that names the same folder.
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
MOST_UNREADABLE = 0.1
"""Share of answers without a score, above which there is no number."""


@dataclass(frozen=True)
class Question:
    """Words about images, which are shown in this order before them."""

    text: str
    images: tuple[Path, ...]


Judge = Callable[[list[tuple[str, list[Image.Image]]]], list[str]]
"""Questions with their images → an answer each."""


def load_judge(stated: VisionJudge, folder: Path, device: torch.device) -> Judge:
    """A model of transformers with a chat template, which answers greedily.

    Raises:
        EvaluationError: a folder that holds no such model.
    """
    try:
        processor: Any = LanguageProcessor.from_pretrained(folder).processor
        model = WHOLE_MODELS.from_pretrained(folder, trust_remote_code=False, dtype="auto").eval().to(device)
    except (ValueError, OSError, KeyError) as error:
        raise EvaluationError(f"'{folder}' is no vision-language model that can judge: {error}") from error
    if getattr(processor.tokenizer, "chat_template", None) is None:
        raise EvaluationError(f"'{folder}' has no chat template, so that it cannot be asked in its own form.")

    @torch.inference_mode()
    def answer(text: str, images: list[Image.Image]) -> str:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        prompt = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = processor(images=images, text=[prompt], return_tensors="pt").to(device)
        told = model.generate(**inputs, max_new_tokens=stated.max_new_tokens, do_sample=False)
        return processor.tokenizer.decode(told[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return lambda questions: [answer(text, images) for text, images in questions]


def kept_answers(
    judge: Judge, folder: Path, read: Callable[[Path], Image.Image]
) -> Callable[[list[Question]], list[str]]:
    """A function that asks the judge, but for what `folder` has the answer to: a file for each question, whose name is
    a hash of the words and the bytes of the images.

    Args:
        folder: belongs to one judge.
        read: an image file → the image that is shown.
    """

    def answer(question: Question) -> str:
        told = json.dumps([question.text, [file_hash(file) for file in question.images]], ensure_ascii=False)
        file = folder / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.json"
        if not file.is_file():
            (found,) = judge([(question.text, [read(image) for image in question.images])])
            images = [str(image) for image in question.images]
            write_json(file, {"question": question.text, "images": images, "answer": found})
        return json.loads(file.read_text(encoding="utf-8"))["answer"]

    return lambda questions: [answer(question) for question in questions]


def read_score(answer: str, highest: float) -> float | None:
    """The last `Score: N` of an answer, divided by the highest; None without one, or with one that is out of range."""
    found = SCORE.findall(answer)
    return float(found[-1]) / highest if found and float(found[-1]) <= highest else None


class Judgement(Metric):
    """The mean of the judge's scores, as a share of the highest."""

    needs = ("vlm",)

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Of the images that are asked about; answers without a score are left out, and refused where they are many."""
        asked = [item for item in items if self.name in item.asked]
        questions = [(*item.asked[self.name], item.file) for item in asked]
        answers = self.context.networks["vlm"]([Question(text, (*shown, file)) for text, shown, file in questions])
        assert self.context.benchmark is not None
        highest = self.context.benchmark.protocol.highest
        found = [(item, answer, read_score(answer, highest)) for item, answer in zip(asked, answers, strict=True)]
        rows = [Row(item, shorten(answer, 200), value) for item, answer, value in found if value is not None]
        if len(asked) - len(rows) > MOST_UNREADABLE * len(asked):
            wrong = next(answer for _, answer, value in found if value is None)
            raise EvaluationError(
                f"{self.title}: the judge gave no score from 0 to {highest:g} in {len(asked) - len(rows)} of "
                f"{len(asked)} answers, as {shorten(wrong, 80)!r}; take another judge, or other instructions."
            )
        return rows


class Preservation(Judgement):
    """Whether it is the subject, or the style, of the input image."""

    name, title = "preservation", "Preservation"


class Following(Judgement):
    """Whether it is what the prompt asks for."""

    name, title = "following", "Following"


class Overall(Judgement):
    """The geometric mean of both, image by image."""

    name, title = "overall", "Overall"

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Of the images that have both."""
        preserved, followed = (
            {id(row.item): row for row in kind(self.context).score(items)} for kind in (Preservation, Following)
        )
        return [
            Row(row.item, "", (row.value * followed[key].value) ** 0.5)
            for key, row in preserved.items()
            if key in followed
        ]
