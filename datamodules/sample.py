"""Sample schema, version 1: the kinds of samples that a shard can hold (docs/data.md).

Each kind encodes to the members of one tar group and decodes from them. Members are JSON, UTF-8 text, and JPEG, PNG or
WebP images. Nothing is unpickled.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, get_args

from datamodules.errors import SampleError
from datamodules.images import SUFFIXES, Limits, SampleImage, StoredImage, encode_png, suffix_of
from kosmosg.files import decode_text

SCHEMA_VERSION = 1
TEXT_MEMBERS = ("json", "txt")
MAX_PAIRS = 1000
EXECUTABLE_SUFFIXES = frozenset(("pkl", "pickle", "pyd", "pt", "pth", "dill", "joblib", "cloudpickle"))


@dataclass
class TextSample:
    """One document of a text corpus."""

    kind: ClassVar[str] = "text"
    text: str
    key: str = ""
    shard: str = ""

    def encode(self) -> dict[str, bytes]:
        """Encode the sample as tar members (suffix → bytes)."""
        return {"json": _json(kind=self.kind, text=self.text)}


@dataclass
class CaptionSample:
    """An image and its caption, as img2dataset writes them. `image` is None if only the text was read."""

    kind: ClassVar[str] = "caption"
    caption: str
    image: SampleImage | None = None
    key: str = ""
    shard: str = ""
    metadata: dict = field(default_factory=dict)

    def encode(self) -> dict[str, bytes]:
        """Encode the sample as tar members (suffix → bytes)."""
        members = {"txt": self.caption.encode()} | (_image_member("", self.image) if self.image else {})
        return members | ({"json": _json(**self.metadata)} if self.metadata else {})


@dataclass
class InterleavedSample:
    """A document: texts and images in reading order."""

    kind: ClassVar[str] = "interleaved"
    segments: list[str | SampleImage]
    key: str = ""
    shard: str = ""

    def encode(self) -> dict[str, bytes]:
        """Encode the sample as tar members (suffix → bytes)."""
        members, listed = _segment_members(self.segments)
        return members | {"json": _json(kind=self.kind, segments=listed)}


@dataclass
class InstructionSample:
    """A prompt of texts and any number of images, with its target image."""

    kind: ClassVar[str] = "instruction"
    segments: list[str | SampleImage]
    target: SampleImage
    key: str = ""
    shard: str = ""

    def encode(self) -> dict[str, bytes]:
        """Encode the sample as tar members (suffix → bytes)."""
        members, listed = _segment_members(self.segments)
        return members | _image_member("target.", self.target) | {"json": _json(kind=self.kind, segments=listed)}


@dataclass
class Entity:
    """An entity of a caption: its word or words, its crop from the image, and the same crop segmented on white."""

    text: str
    background: SampleImage
    white: SampleImage


@dataclass
class ConstructedSample:
    """A caption, its segmented entities, and the image they were cut from (paper Fig. 4).

    `description`, if not empty, describes the image in more detail than the caption, such as how the entities look. It
    is never part of a prompt; it is the text equivalent of a prompt that contains the entities' images.
    """

    kind: ClassVar[str] = "constructed"
    caption: str
    entities: list[Entity]
    target: SampleImage
    key: str = ""
    shard: str = ""
    description: str = ""

    def encode(self) -> dict[str, bytes]:
        """Encode the sample as tar members (suffix → bytes)."""
        listed = [{"text": entity.text} for entity in self.entities]
        optional = {"description": self.description} if self.description else {}
        members = _image_member("target.", self.target)
        for i, entity in enumerate(self.entities):
            members |= _image_member(f"{i}.background.", entity.background)
            members |= _image_member(f"{i}.white.", entity.white)
        return members | {"json": _json(kind=self.kind, caption=self.caption, entities=listed, **optional)}


@dataclass
class EditSample:
    """An image, its caption, an editing instruction, and the edited image.

    `more` holds further (source, target) pairs with the same caption and instruction; training draws one pair.
    """

    kind: ClassVar[str] = "edit"
    caption: str
    instruction: str
    source: SampleImage
    target: SampleImage
    key: str = ""
    shard: str = ""
    more: list[tuple[SampleImage, SampleImage]] = field(default_factory=list)

    @property
    def pairs(self) -> list[tuple[SampleImage, SampleImage]]:
        """All (source, target) pairs."""
        return [(self.source, self.target), *self.more]

    def encode(self) -> dict[str, bytes]:
        """Encode the sample as tar members (suffix → bytes)."""
        count = {"pairs": len(self.pairs)} if self.more else {}
        members = {"json": _json(kind=self.kind, caption=self.caption, instruction=self.instruction, **count)}
        for number, (source, target) in enumerate(self.pairs):
            prefix = f"{number}." if number else ""
            members |= _image_member(f"{prefix}source.", source) | _image_member(f"{prefix}target.", target)
        return members


@dataclass
class ImageSample:
    """An image without text: the input of curation. No stage trains on it."""

    kind: ClassVar[str] = "image"
    image: SampleImage
    key: str = ""
    shard: str = ""
    metadata: dict = field(default_factory=dict)

    def encode(self) -> dict[str, bytes]:
        """Encode the sample as tar members (suffix → bytes)."""
        return _image_member("", self.image) | {"json": _json(**self.metadata | {"kind": self.kind})}


Sample = (
    TextSample | CaptionSample | InterleavedSample | ConstructedSample | EditSample | InstructionSample | ImageSample
)
KINDS: dict[str, type] = {cls.kind: cls for cls in get_args(Sample)}


def decode(
    members: Mapping[str, bytes], shard: str, key: str, *, kind: str | None = None, limits: Limits | None = None
) -> Sample:
    """Decode the members of one tar group. Images stay encoded (`StoredImage`) until `datamodules.images.load`.

    Args:
        members: suffix → bytes, e.g. `{"json": …, "target.png": …}`; unknown suffixes are ignored.
        kind: the expected kind; None accepts any.

    Raises:
        SampleError: `refused_member`, `missing_member`, `invalid_json`, `not_utf8`, `wrong_kind`, `invalid_field`,
            `empty_caption` or `empty_text`.
    """
    return _Decoder(members, shard, key, limits or Limits()).decode(kind)


class _Decoder:
    """Decodes the members of one sample; its errors name the shard and the key."""

    def __init__(self, members: Mapping[str, bytes], shard: str, key: str, limits: Limits):
        self.members, self.shard, self.key, self.limits = members, shard, key, limits
        for name in members:
            if not EXECUTABLE_SUFFIXES.isdisjoint(name.lower().split(".")):
                raise self.error("refused_member", f"'{name}' may run code when read; write it as json, txt or png")

    def error(self, reason: str, detail: str) -> SampleError:
        return SampleError(reason, self.shard, self.key, detail)

    def decode(self, kind: str | None) -> Sample:
        # Caption samples are recognised by their txt member, because img2dataset's json has no `kind`.
        record = {} if "txt" in self.members else self.json()
        stored = "caption" if "txt" in self.members else record.get("kind")
        if not isinstance(stored, str) or stored not in KINDS:
            raise self.error("wrong_kind", f"kind is {stored!r:.60}, allowed are {', '.join(KINDS)}")
        if kind is not None and stored != kind:
            raise self.error("wrong_kind", f"kind is '{stored}', this source reads '{kind}'")
        decoders: dict[str, Callable[[dict], Sample]] = {
            "text": self.text_sample,
            "caption": self.caption_sample,
            "interleaved": self.interleaved_sample,
            "constructed": self.constructed_sample,
            "edit": self.edit_sample,
            "instruction": self.instruction_sample,
            "image": self.image_sample,
        }
        sample = decoders[stored](record)
        sample.key, sample.shard = self.key, self.shard
        return sample

    def text_sample(self, record: dict) -> TextSample:
        return TextSample(self.text(record, "text", "empty_text"))

    def caption_sample(self, record: dict) -> CaptionSample:
        caption = self.utf8("txt").strip()
        if not caption:
            raise self.error("empty_caption", "txt is empty")
        name = next((suffix for suffix in SUFFIXES if suffix in self.members), None)
        return CaptionSample(caption, self.image(name) if name else None)

    def interleaved_sample(self, record: dict) -> InterleavedSample:
        return InterleavedSample(self.segments(record))

    def instruction_sample(self, record: dict) -> InstructionSample:
        segments = self.segments(record)
        if not any(isinstance(segment, str) and segment.strip() for segment in segments):
            raise self.error("empty_text", "segments contain no text")
        return InstructionSample(segments, self.image("target.png"))

    def segments(self, record: dict) -> list[str | SampleImage]:
        segments: list[str | SampleImage] = []
        for segment in self.sequence(record, "segments"):
            if isinstance(segment, dict) and isinstance(segment.get("image"), str):
                segments.append(self.image(segment["image"]))
            elif isinstance(segment, str):
                segments.append(self.encodable(segment, "segments"))
            else:
                raise self.error(
                    "invalid_field", f"segments holds {segment!r:.60}; allowed are a text or {{'image': name}}"
                )
        if not segments:
            raise self.error("empty_text", "segments is empty")
        return segments

    def constructed_sample(self, record: dict) -> ConstructedSample:
        entities = []
        for i, entity in enumerate(self.sequence(record, "entities")):
            if not isinstance(entity, dict):
                raise self.error("invalid_field", f"entities[{i}] is {entity!r:.60}; allowed is {{'text': word}}")
            word = self.text(entity, "text", "empty_text")
            entities.append(Entity(word, self.image(f"{i}.background.png"), self.image(f"{i}.white.png")))
        caption, target = self.text(record, "caption", "empty_caption"), self.image("target.png")
        description = self.text(record, "description", "empty_caption") if "description" in record else ""
        return ConstructedSample(caption, entities, target, description=description)

    def edit_sample(self, record: dict) -> EditSample:
        # Edit data often has empty captions; only the instruction is required.
        caption = record.get("caption", "")
        if not isinstance(caption, str):
            raise self.error("invalid_field", f"caption is {caption!r:.60}, it must be a text")
        caption = self.encodable(caption, "caption")
        instruction = self.text(record, "instruction", "empty_text")
        count = record.get("pairs", 1)
        if not isinstance(count, int) or not 1 <= count <= MAX_PAIRS:
            raise self.error("invalid_field", f"pairs is {count!r:.60}, it must be an integer in 1 … {MAX_PAIRS}")
        more: list[tuple[SampleImage, SampleImage]] = [
            (self.image(f"{i}.source.png"), self.image(f"{i}.target.png")) for i in range(1, count)
        ]
        return EditSample(caption, instruction, self.image("source.png"), self.image("target.png"), more=more)

    def image_sample(self, record: dict) -> ImageSample:
        return ImageSample(self.image(next((suffix for suffix in SUFFIXES if suffix in self.members), "png")))

    def json(self) -> dict:
        try:
            record = json.loads(self.utf8("json"))
        except (ValueError, RecursionError) as error:  # ValueError also for integers with too many digits for Python
            raise self.error("invalid_json", str(error)) from error
        if not isinstance(record, dict):
            raise self.error("invalid_json", f"json holds a {type(record).__name__}, it must be an object")
        return record

    def utf8(self, name: str) -> str:
        try:
            return decode_text(self.member(name))
        except UnicodeDecodeError as error:
            raise self.error("not_utf8", f"'{name}': {error.reason} at byte {error.start}") from error

    def member(self, name: str) -> bytes:
        if name not in self.members:
            raise self.error("missing_member", f"'{name}' is not among {', '.join(sorted(self.members)) or 'nothing'}")
        return self.members[name]

    def image(self, name: str) -> StoredImage:
        # Where the schema says png, writers may store JPEG or WebP.
        if name not in self.members and name.endswith(".png"):
            stem = name.removesuffix("png")
            name = next((stem + suffix for suffix in SUFFIXES if stem + suffix in self.members), name)
        return StoredImage(self.member(name), name, self.shard, self.key, self.limits)

    def text(self, record: dict, name: str, when_empty: str) -> str:
        value = record.get(name)
        if not isinstance(value, str):
            raise self.error("invalid_field", f"{name} is {value!r:.60}, it must be a text")
        if not value.strip():
            raise self.error(when_empty, f"{name} is {value!r:.60}")
        return self.encodable(value, name)

    def encodable(self, value: str, name: str) -> str:
        """Return `value`, or raise if it has an unpaired surrogate, which JSON allows but tokenizers reject."""
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.error("not_utf8", f"{name}: {error.reason} at character {error.start}") from error
        return value

    def sequence(self, record: dict, name: str) -> list:
        value = record.get(name)
        if not isinstance(value, list):
            raise self.error("invalid_field", f"{name} is {value!r:.60}, it must be a list")
        return value


def _image_member(prefix: str, image: SampleImage) -> dict[str, bytes]:
    return {prefix + suffix_of(image): encode_png(image)}


def _segment_members(segments: Sequence[str | SampleImage]) -> tuple[dict[str, bytes], list[str | dict]]:
    members: dict[str, bytes] = {}
    listed: list[str | dict] = []
    for segment in segments:
        if isinstance(segment, str):
            listed.append(segment)
            continue
        member = _image_member(f"{len(members)}.", segment)
        listed.append({"image": next(iter(member))})
        members |= member
    return members, listed


def _json(**record) -> bytes:
    return json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
