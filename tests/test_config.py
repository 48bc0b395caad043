"""The one rule of configuration: files and key=value, later wins; every mistake is answered with what was meant."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from kosmosg.config import ConfigError, load_config, save_config


@dataclass
class Optimizer:
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Of AdamW."""
    decay: Literal["linear", "none"] = "linear"
    """After the warm-up."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr is {self.lr}; allowed: above 0")


@dataclass
class Schema:
    name: str
    optimizer: Optimizer = field(default_factory=Optimizer)
    group: str | None = "a"
    tags: list[str] = field(default_factory=list)
    vision: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    folder = tmp_path / "configs"
    (folder / "model").mkdir(parents=True)
    (folder / "base.yaml").write_text("name: base\noptimizer: {lr: 0.1}\ntags: [x]\n")
    (folder / "model" / "small.yaml").write_text("vision: {width: 8, layers: 2}\n")
    (folder / "run.yaml").write_text("extends: [base, model/small.yaml]\nname: run\nvision: {layers: 3}\n")
    return folder


def test_later_argument_wins(configs: Path) -> None:
    config = load_config(
        [str(configs / "base.yaml"), str(configs / "run.yaml"), "optimizer.lr=2e-4", "tags=[y, z]"], Schema
    )
    assert (config.name, config.optimizer.lr, config.tags) == ("run", 2e-4, ["y", "z"])
    assert load_config([str(configs / "run.yaml"), str(configs / "base.yaml")], Schema).name == "base"


def test_extends_is_read_first_and_merged_deeply(configs: Path) -> None:
    config = load_config([str(configs / "run.yaml")], Schema)
    assert config.name == "run"
    assert config.optimizer.lr == 0.1
    assert config.vision == {"width": 8, "layers": 3}


def test_extends_beside_the_file(configs: Path) -> None:
    (configs / "model" / "large.yaml").write_text("extends: ./small\nname: large\nvision: {width: 9}\n")
    assert load_config([str(configs / "model" / "large.yaml")], Schema).vision == {"width": 9, "layers": 2}


def test_circle_of_extends_is_refused(configs: Path) -> None:
    (configs / "base.yaml").write_text("extends: run\n")
    with pytest.raises(ConfigError, match=r"circle: run.yaml → base.yaml → run.yaml"):
        load_config([str(configs / "run.yaml")], Schema)


def test_unknown_base_names_nearest(configs: Path) -> None:
    (configs / "run.yaml").write_text("extends: model/smal\n")
    with pytest.raises(ConfigError, match=r"Did you mean: 'model/small'"):
        load_config([str(configs / "run.yaml")], Schema)


@pytest.mark.parametrize("none", ["null", "None", "~"])
def test_none(none: str) -> None:
    config = load_config(["name=x", f"group={none}", f"vision={{a: [{none}, 1]}}"], Schema)
    assert config.group is None
    assert config.vision == {"a": [None, 1]}


def test_value_with_equals_sign_and_float_without_point() -> None:
    config = load_config(["name=a=b", "optimizer.lr=1e-3"], Schema)
    assert (config.name, config.optimizer.lr) == ("a=b", 1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["name=x", "optimizer.lrr=1"], r"optimizer.lrr=1: Key 'lrr' not in 'Optimizer'. Did you mean: 'lr'\?"),
        (["name=x", "optimzer.lr=1"], r"Did you mean: 'optimizer'"),
        (["name=x", "optimizer.lr=fast"], r"optimizer.lr=fast: Value 'fast' .*optimizer.lr"),
        (["name=x", "optimizer.lr=-1"], r"optimizer.lr is -1.0; allowed: above 0"),
        (["name=x", "optimizer.decay=cosine"], r"'cosine', expected one of \['linear', 'none'\].*optimizer.decay"),
        (["name=x", "optimizer=3"], r"optimizer=3"),
        (["name=x", "group="], r"has no value"),
        (["name=x", "tags=[a"], r"not YAML"),
        (["name=x", "--optimizer.lr=1"], r"write optimizer.lr=1, without dashes"),
        (["name=x", "extends=model/toyland"], r"'extends' is no key"),
        (["name=x", "optimizer..lr=1"], r"is no key"),
        (["nonsense"], r"neither a YAML file, a run folder nor key=value"),
        (["no/such.yaml"], r"no configuration file 'no/such.yaml'"),
        ([], r"'name' has no value; set it in a YAML file or as name=…"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(arguments, Schema)


def test_mistake_in_a_file_names_the_file(configs: Path) -> None:
    (configs / "base.yaml").write_text("name: x\ntag: [a]\n")
    with pytest.raises(ConfigError, match=r"base.yaml: Key 'tag' not in 'Schema'. Did you mean: 'tags'"):
        load_config([str(configs / "run.yaml")], Schema)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "!!python/object/apply:os.getcwd []\n"])
def test_file_that_is_no_mapping(configs: Path, text: str) -> None:
    (configs / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config([str(configs / "run.yaml")], Schema)


def test_run_folder_and_its_file_are_arguments(configs: Path, tmp_path: Path) -> None:
    config = load_config([str(configs / "run.yaml"), "group=null", "optimizer.betas=[0.8, 0.9]"], Schema)
    run = tmp_path / "run"
    run.mkdir()
    save_config(config, run / "config.yaml")
    assert load_config([str(run)], Schema) == config
    assert load_config([str(run / "config.yaml")], Schema) == config
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    with pytest.raises(ConfigError, match="no run folder"):
        load_config([str(tmp_path)], Schema)


def test_whole_shares_of_other_values() -> None:
    half = "vision={layers: 6, half: '${divide:${vision.layers},2}'}"
    assert load_config(["name=x", half], Schema).vision == {"layers": 6, "half": 3}
    with pytest.raises(ConfigError, match=r"7 cannot be divided by 2 without a remainder"):
        load_config(["name=x", half, "vision.layers=7"], Schema)
    with pytest.raises(ConfigError, match=r"divided by 0"):
        load_config(["name=x", "vision={half: '${divide:4,0}'}"], Schema)


def test_schema_chosen_by_a_value() -> None:
    @dataclass
    class Other:
        name: str
        width: int = 1

    config = load_config(["name=other", "width=3"], lambda values: Other if values["name"] == "other" else Schema)
    assert config == Other("other", 3)
