"""Captions: the input's own, and those that are left out for blocked words, odd lengths or circles."""

import re
from collections import Counter

from datamodules.curation.rows import Batch, Row, drop
from datamodules.curation.stage_config import TextFilter

WORD = re.compile(r"\w+")


class CaptionFilter:
    """Drops captions with blocked words, of odd length, or that repeat themselves."""

    def __init__(self, config: TextFilter):
        self.config = config
        listed = "|".join(re.escape(word) for word in config.blocked)
        self.blocked = re.compile(rf"\b(?:{listed})\b", re.IGNORECASE) if listed else None

    def __call__(self, batch: Batch) -> Batch:
        """Keep the sound captions."""
        return [self._judge(row) for row in batch]

    def _judge(self, row: Row) -> Row:
        caption = row["caption"]
        if self.blocked and (found := self.blocked.search(caption)):
            return drop(row, "blocked_text", f"'{found.group()}' in {caption!r}")
        words = [word.lower() for word in WORD.findall(caption)]
        if not self.config.min_words <= len(words) <= self.config.max_words:
            return drop(row, "caption_length", f"{len(words)} words: {caption!r}")
        runs = Counter(zip(words, words[1:], words[2:], strict=False))
        run, times = runs.most_common(1)[0] if runs else ((), 0)
        if times > self.config.max_repeats:
            return drop(row, "repeated_words", f"'{' '.join(run)}' {times} times in {caption!r}")
        return row


class GivenCaptions:
    """The input's own captions."""

    def __call__(self, batch: Batch) -> Batch:
        """`given` → `caption`."""
        return [row | {"caption": row["given"]} for row in batch]
