"""Shipped protocols load, are documented and keep their published identities; unusable values are refused."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from evaluation.config import EvaluationConfig
from evaluation.protocols.geneval import GenEvalProtocol
from evaluation.protocols.judged import DreamBenchPlusProtocol, OmniContextProtocol
from evaluation.protocols.protocol import KID, CocoProtocol, FeatureNetwork, Preprocessing, Protocol, Resize, identity
from evaluation.tracking import Tracking
from kosmosg.config import ConfigError, load_config
from tests.conftest import REPOSITORY

NEEDED = ["output=o", "models.image_decoder=d"]
FOLDER = REPOSITORY / "configs" / "protocols"
SHIPPED = sorted(FOLDER.rglob("*.yaml"))
PUBLISHED = (
    "coco/kosmosg-cached@1#007766da+da104d1d",
    "coco/kosmosg-live@1#23ea8a67+8a171c52",
    "coco/metaquery-30k@1#e1083742+f1e237f7",
    "dreambench/all-references@1#4117f284+10939002",
    "dreambench/kosmosg@1#d647a190+10939002",
    "dreambench/paper@1#f5795fe5+44136fa3",
    "dreambench_pairs/uno@1#5974ce90+44136fa3",
    "dreambench_plus/open-judge@1#b4c2e08d+44136fa3",
    "geneval/detr@1#512e328b+44136fa3",
    "omnicontext/open-judge@1#cf60bf1f+44136fa3",
)
RELEASED = [FOLDER / "coco" / f"{name}.yaml" for name in ("kosmosg-live", "kosmosg-cached", "metaquery-30k")]


def load(*files: Path) -> Protocol:
    table = files[-1].parent.name
    config = load_config([*map(str, files), f"data.{table}=d", *NEEDED], EvaluationConfig)
    protocol = getattr(config, table)
    assert isinstance(protocol, Protocol)
    return protocol


def test_shipped_protocols_are_complete_and_distinct() -> None:
    for file in SHIPPED:
        protocol, text = load(file), file.read_text()
        assert protocol.name == file.relative_to(FOLDER).with_suffix("").as_posix()
        assert "version:" in text and text.startswith("# "), "a header documents it"
        assert identity(protocol) == identity(load(file))
    assert len({identity(load(file)).partition("#")[2] for file in SHIPPED}) == len(SHIPPED) >= 6


def test_published_identities_stay() -> None:
    """Fields at their defaults are not hashed."""
    assert {identity(load(file)) for file in SHIPPED if file.stem != "toyland"} == set(PUBLISHED)


def test_a_protocol_overrides_another_completely() -> None:
    """A value missing in one file would be taken from the other."""
    for file in RELEASED:
        for other in RELEASED:
            assert asdict(load(other, file)) == asdict(load(file))


def test_the_released_script_has_two_protocols() -> None:
    """They differ only in the resize of generated images and in storage."""
    live, cached = load(RELEASED[0]), load(RELEASED[1])
    assert isinstance(live, CocoProtocol) and isinstance(cached, CocoProtocol)
    assert live.generated_resize is None and cached.generated_resize == cached.real_resize == live.real_resize
    sampling = replace(cached.sampling, storage="memory")
    same = replace(cached, name=live.name, generated_resize=None, sampling=sampling)
    assert identity(same) == identity(live)
    assert (live.sampling.sampler, live.sampling.steps, live.sampling.guidance_scale) == ("ddim", 250, 3.0)
    assert live.real_resize == Resize(256, "tensor", "bilinear", antialias=False)
    assert (live.captions, live.caption_seed, live.references) == (30_000, 0, "all")


def test_unusable_values_are_refused() -> None:
    for make, message in [
        (lambda: Resize(library="pil"), "resize.antialias=false is not allowed with resize.library=pil"),
        (lambda: Resize(size=0), "resize.size=0 is not allowed"),
        (lambda: KID(subset_size=1), "kid.subset_size=1 is not allowed"),
        (lambda: Tracking(timeout=0), "wandb.timeout=0 is not allowed"),
        (lambda: GenEvalProtocol(images_per_prompt=0), "geneval.images_per_prompt=0 is not allowed"),
        (lambda: DreamBenchPlusProtocol(max_prompts=0), "dreambench_plus.max_prompts=0 is not allowed"),
        (lambda: OmniContextProtocol(max_prompts=0), "omnicontext.max_prompts=0 is not allowed"),
        (lambda: CocoProtocol(captions=10, kid=KID()), "subset_size=1000 is not allowed; it must be at most"),
        (lambda: CocoProtocol(caption_list="a.json"), "caption_seed=0 is not allowed with coco.caption_list=a.json"),
        (lambda: CocoProtocol(caption_seed=None), "either drawn by a seed or listed"),
        (
            lambda: CocoProtocol(caption_list="a.json", caption_seed=None, references="half"),
            "coco.references=half is not allowed with a coco.caption_list",
        ),
        (
            lambda: FeatureNetwork("w", Preprocessing(), "inception"),
            "coco.fid.preprocessing is not allowed with coco.fid.network=inception",
        ),
    ]:
        with pytest.raises(ValueError) as error:
            make()
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("option", "allowed"), [("coco.real_resise=null", "real_resize"), ("coco.real_resize.library=cv2", "tensor")]
)
def test_a_typo_lists_what_is_allowed(option: str, allowed: str) -> None:
    with pytest.raises(ConfigError, match=allowed):
        load_config([str(RELEASED[0]), "data.coco=d", *NEEDED, option], EvaluationConfig)


def test_missing_weight_file_is_named(tmp_path: Path) -> None:
    arguments = [str(REPOSITORY / "configs" / "evaluation_coco.yaml"), f"data.coco={tmp_path}"]
    config = load_config(arguments, EvaluationConfig)
    assert config.coco is not None and config.coco.fid is not None
    with pytest.raises(FileNotFoundError, match=r"local_weights=\{inception-2015-12-05: /path/to/file\}"):
        config.encoder_path(config.coco.fid)
    file = tmp_path / "weights.pth"
    file.write_bytes(b"x")
    config = load_config([*arguments, f"local_weights.inception-2015-12-05={file}"], EvaluationConfig)
    assert config.coco is not None and config.coco.fid is not None
    assert config.encoder_path(config.coco.fid) == file
