"""A judge that is an open vision-language model: it is asked about images in words, and its answer holds a score.

Its raw answers are kept in a file, one JSON object a line, so that no question is put twice to one judge: not after a
kill, not by another evaluation that names the same folder of answers.
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

from evaluation.parallel.sharing import Sharing
from evaluation.protocols.protocol import VisionJudge
from evaluation.protocols.requests import EvaluationError, Item
from evaluation.scores.metric import Metric, Row
from kosmosg.files import decode_text
from kosmosg.models.vision_language_model import WHOLE_MODELS, LanguageProcessor

SCORE = re.compile(r"score\W*(?:is\W+)?(\d+(?:\.\d+)?)", re.IGNORECASE)
MOST_UNREADABLE = 0.1
"""Share of answers without a score, above which there is no number."""
ASKED_AT_ONCE = 64
"""Batches of each process between two writings of answers."""


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


class Answers:
    """What a judge says of questions, asked once each by all processes together.

    Args:
        file: keeps the answers; it belongs to one judge.
        read: an image file → the image that is shown.
    """

    def __init__(self, judge: Judge, file: Path, sharing: Sharing, read: Callable[[Path], Image.Image]):
        self.judge, self.file, self.sharing, self.read = judge, file, sharing, read
        self.hashes: dict[Path, str] = {}
        self.known: dict[str, str] | None = None

    def __call__(self, questions: Sequence[Question]) -> list[str]:
        """N questions → N answers."""
        if self.known is None:
            self.known = self.sharing.processes.share(self._kept)
        keys = [self.key(question) for question in questions]
        new = {key: question for key, question in zip(keys, questions, strict=True) if key not in self.known}
        step = ASKED_AT_ONCE * self.sharing.batch_size * self.sharing.processes.count
        for start in range(0, len(new), step):
            some = list(new)[start : start + step]
            found = self.sharing.compute(self.file.stem, self._ask, [new[key] for key in some])
            self.known.update(zip(some, found, strict=True))
            if self.sharing.processes.first:
                self._keep({key: (new[key], answer) for key, answer in zip(some, found, strict=True)})
        return [self.known[key] for key in keys]

    def key(self, question: Question) -> str:
        """Of the words and the bytes of the images."""
        for file in question.images:
            if file not in self.hashes:
                self.hashes[file] = hashlib.sha256(file.read_bytes()).hexdigest()
        told = json.dumps([question.text, [self.hashes[file] for file in question.images]], ensure_ascii=False)
        return hashlib.sha256(told.encode()).hexdigest()

    def _ask(self, questions: list[Question]) -> list[str]:
        return self.judge([(question.text, [self.read(file) for file in question.images]) for question in questions])

    def _kept(self) -> dict[str, str]:
        lines = self.file.read_bytes().split(b"\n") if self.file.is_file() else []
        rows = [json.loads(decode_text(line)) for line in lines[:-1]]  # what follows the last line break was torn
        return {row["key"]: row["answer"] for row in rows}

    def _keep(self, rows: dict[str, tuple[Question, str]]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = self.file.read_bytes() if self.file.is_file() else b""
        if content and not content.endswith(b"\n"):
            with self.file.open("r+b") as stream:
                stream.truncate(content.rfind(b"\n") + 1)
        with self.file.open("ab") as stream:
            for key, (question, answer) in rows.items():
                images = [str(file) for file in question.images]
                row = {"key": key, "answer": answer, "question": question.text, "images": images}
                stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


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
        answers = self.context.networks["vlm"]([item.asked[self.name] for item in asked])
        assert self.context.benchmark is not None
        highest = self.context.benchmark.protocol.highest
        rows = [
            Row(item, shorten(answer, 200), value)
            for item, answer in zip(asked, answers, strict=True)
            if (value := read_score(answer, highest)) is not None
        ]
        if len(asked) - len(rows) > MOST_UNREADABLE * len(asked):
            wrong = next(answer for answer in answers if read_score(answer, highest) is None)
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
