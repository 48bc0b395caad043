"""Tokenise text: SentencePiece splits it into pieces, a dictionary maps pieces to ids.

SentencePiece's own ids are not used: in the dictionary of the released model, four special symbols precede the pieces
and six follow them. This is the only file that defines ids of special symbols.
"""

import io
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece
from transformers import FeatureExtractionMixin

SENTENCEPIECE_FILE = "sentencepiece.bpe.model"
DICTIONARY_FILE = "dict.txt"
ADDED_FILE = "added_symbols.txt"  # optional; one symbol per line
LEADING_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")
TRAILING_SYMBOLS = ("<mask>", "</doc>", "<image>", "</image>", "</chunk>", "</line>")
SENTENCEPIECE_CONTROLS = ("<unk>", "<s>", "</s>")  # the first pieces of SentencePiece, not in the dictionary
WORD_BOUNDARY = "▁"


class Tokenizer(FeatureExtractionMixin):
    """Tokenise text with SentencePiece and a dictionary of pieces (released-code.md, "Vocabulary").

    The base class is FeatureExtractionMixin only because diffusers' pipelines save and load its subclasses.

    Args:
        sentencepiece_model: SentencePiece model file.
        dictionary: text file with one `piece count` per line; the first line gets id 4.
        added: further symbols with the last ids, such as Kosmos-2's grounding tokens; text is never encoded as one.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: the model is not a SentencePiece model, or a dictionary line has no count or a repeated piece.
    """

    def __init__(self, sentencepiece_model: Path, dictionary: Path, added: Sequence[str] = ()):
        for path in (sentencepiece_model, dictionary):
            if not Path(path).is_file():
                raise FileNotFoundError(
                    f"Tokenizer: '{path}' does not exist. A tokenizer folder holds {SENTENCEPIECE_FILE} and "
                    f"{DICTIONARY_FILE}."
                )
        # Both files are kept in memory, because a run saves them at its end, when the folder may be gone.
        self.dictionary = Path(dictionary).read_bytes()
        try:
            content = Path(sentencepiece_model).read_bytes()
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            content = b""
        if not content or not self.processor.get_piece_size():  # an empty file loads without an error
            raise ValueError(f"'{sentencepiece_model}' is empty, damaged or not a SentencePiece model; copy it again.")
        pieces = dictionary_pieces(self.dictionary.decode("utf-8"), dictionary)
        self.added = list(added)
        self.symbols = [*LEADING_SYMBOLS, *pieces, *TRAILING_SYMBOLS, *self.added]
        self.index = {symbol: i for i, symbol in enumerate(self.symbols)}
        if len(self.index) != len(self.symbols):
            seen: set[str] = set()
            twice = next(symbol for symbol in self.symbols if symbol in seen or seen.add(symbol))
            raise ValueError(f"{dictionary}: '{twice}' is listed twice or is reserved; each symbol needs a unique id.")
        self.bos_id, self.pad_id, self.eos_id, self.unk_id = (self.index[symbol] for symbol in LEADING_SYMBOLS)
        self.image_id, self.image_end_id = self.index["<image>"], self.index["</image>"]

        names = map(self.processor.id_to_piece, range(self.processor.get_piece_size()))
        self._ids_by_piece = [self.index.get(name, self.unk_id) for name in names]

    def __len__(self) -> int:
        return len(self.symbols)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} ids)"

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without `<s>` and `</s>`.

        Special symbols in the text are encoded as ordinary characters, so a caption cannot add image tokens.
        """
        return [self.index.get(piece, self.unk_id) for piece in self.processor.encode(text, out_type=str)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts, several times as fast as `encode`."""
        batch = self.processor.encode(list(texts), out_type=int, num_threads=1)
        ids, unknown = self._ids_by_piece, self.processor.unk_id()
        # A piece that SentencePiece does not know may be in the dictionary, so look it up as a string.
        return [
            self.encode(text) if unknown in pieces else [ids[piece] for piece in pieces]
            for text, pieces in zip(texts, batch, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, with special symbols except `<s>` and padding."""
        skipped = (self.bos_id, self.pad_id)
        symbols = [self.symbols[i] for i in ids if i not in skipped]
        return "".join(symbols).replace(WORD_BOUNDARY, " ").strip()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """Load the folder that `save_pretrained` writes."""
        file = Path(folder) / ADDED_FILE
        added = file.read_text(encoding="utf-8").splitlines() if file.is_file() else ()
        return cls(Path(folder) / SENTENCEPIECE_FILE, Path(folder) / DICTIONARY_FILE, added)

    @classmethod
    def from_sentencepiece(cls, content: bytes, added: Sequence[str] = ()) -> "Tokenizer":
        """Build a tokenizer with SentencePiece's own pieces as dictionary; ids are those of SentencePiece + 1.

        Args:
            content: content of a SentencePiece model file.

        Raises:
            ValueError: it is not a SentencePiece model, or its first pieces are not `<unk>`, `<s>` and `</s>`.
        """
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise ValueError("it is damaged or not a SentencePiece model; copy it again.") from error
        names = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
        first, pieces = tuple(names[: len(SENTENCEPIECE_CONTROLS)]), names[len(SENTENCEPIECE_CONTROLS) :]
        if first != SENTENCEPIECE_CONTROLS:
            raise ValueError(f"its first pieces are {first}; allowed: {SENTENCEPIECE_CONTROLS}.")
        with tempfile.TemporaryDirectory() as folder:
            model, dictionary = Path(folder) / SENTENCEPIECE_FILE, Path(folder) / DICTIONARY_FILE
            model.write_bytes(content)
            dictionary.write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")
            return cls(model, dictionary, added)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files to `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SENTENCEPIECE_FILE).write_bytes(self.processor.serialized_model_proto())
        (folder / DICTIONARY_FILE).write_bytes(self.dictionary)
        if self.added:
            (folder / ADDED_FILE).write_text("".join(f"{symbol}\n" for symbol in self.added), encoding="utf-8")

    @classmethod
    def train(
        cls, texts: Iterable[str], folder: str | Path, vocab_size: int, normalization: str = "nmt_nfkc"
    ) -> "Tokenizer":
        """Train SentencePiece (unigram) on `texts` and write a tokenizer folder.

        Args:
            vocab_size: maximum number of ids, special symbols included; a small text gives fewer.
            normalization: SentencePiece's rule; "identity" omits the table of 240 kB of the other rules.
        """
        pieces = vocab_size - len(LEADING_SYMBOLS) - len(TRAILING_SYMBOLS)
        if pieces < 1:
            raise ValueError(
                f"vocab_size={vocab_size} leaves no room for pieces: "
                f"{len(LEADING_SYMBOLS) + len(TRAILING_SYMBOLS)} ids are special symbols."
            )
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=pieces + len(SENTENCEPIECE_CONTROLS),
            model_type="unigram",
            character_coverage=1.0,
            normalization_rule_name=normalization,
            hard_vocab_limit=False,
            num_threads=1,  # the result depends on the number of threads
            minloglevel=2,
        )
        tokenizer = cls.from_sentencepiece(model.getvalue())
        tokenizer.save_pretrained(folder)
        return tokenizer


def dictionary_pieces(text: str, path: Path) -> list[str]:
    """Return the pieces of a dictionary; a piece may contain any character, the count follows the last space."""
    pieces = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):  # a piece may be a Unicode line separator
        piece, blank, count = line.rpartition(" ")
        if not blank or not count.isdigit():
            raise ValueError(f"{path}, line {number}: expected 'piece count', found {line!r}.")
        pieces.append(piece)
    return pieces
