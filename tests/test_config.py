"""The one rule of configuration: files and key=value, later wins; every mistake is answered with what was meant."""

from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from kosmosg import config as configuration
from kosmosg.config import ConfigError, describe_schema, load_config, save_config, split_options, written_config
from tests.conftest import REPOSITORY


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


def test_later_wins_and_extends_is_read_first_and_merged_deeply(configs: Path) -> None:
    base, run, large = configs / "base.yaml", configs / "run.yaml", configs / "model" / "large.yaml"
    config = load_config([str(base), str(run), "optimizer.lr=2e-4", "tags=[y, z]"], Schema)
    assert (config.name, config.optimizer.lr, config.tags) == ("run", 2e-4, ["y", "z"])
    assert load_config([str(run), str(base)], Schema).name == "base"
    config = load_config([str(run)], Schema)
    assert (config.name, config.optimizer.lr, config.vision) == ("run", 0.1, {"width": 8, "layers": 3})
    large.write_text("extends: ./small\nname: large\nvision: {width: 9}\n")  # beside the file itself
    assert load_config([str(large)], Schema).vision == {"width": 9, "layers": 2}


MISTAKEN_FILES = (
    ("extends: run", r"circular: run.yaml → run.yaml"),
    ("extends: model/smal", r"Did you mean: 'model/small'"),
    ("tag: [a]", r"run.yaml: Key 'tag' not in 'Schema'. Did you mean: 'tags'"),
    ("- a\n- b", r"run\.yaml"),
    ("a: [1", r"run\.yaml"),
    ("!!python/object/apply:os.getcwd []", r"run\.yaml"),
    ("vision: {width: 8, width: 9}", r"run\.yaml.*'width' is given twice"),
    ("optimizer: {lr: '${nowhere}'}", r"run\.yaml: .*nowhere.*optimizer"),
)


@pytest.mark.parametrize(("text", "message"), MISTAKEN_FILES)
def test_mistakes_in_a_file_name_the_file(configs: Path, text: str, message: str) -> None:
    (configs / "run.yaml").write_text(text + "\n")
    with pytest.raises(ConfigError, match=message):
        load_config([str(configs / "run.yaml"), "name=x"], Schema)


def test_where_the_package_is_installed_by_itself_no_configs_is_said(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("kosmosg.config.CONFIGS", tmp_path / "site-packages" / "configs")
    (tmp_path / "mine.yaml").write_text("extends: model/toyland")
    with pytest.raises(ConfigError, match=r"no model/toyland.yaml under .*configs/ is in a clone of the repository"):
        load_config([str(tmp_path / "mine.yaml")], Schema)


HALF = "vision={layers: 6, half: '${divide:${vision.layers},2}'}"
MISTAKES = (
    (["name=x", "optimizer.lrr=1"], r"optimizer.lrr=1: Key 'lrr' not in 'Optimizer'. Did you mean: 'lr'\?"),
    (["name=x", "optimzer.lr=1"], r"Did you mean: 'optimizer'"),
    (["name=x", "optimizer.lr=fast"], r"optimizer.lr=fast: Value 'fast' .*optimizer.lr"),
    (["name=x", "optimizer.lr=-1"], r"optimizer.lr is -1.0; allowed: above 0"),
    (["name=x", "optimizer.decay=cosine"], r"'cosine', expected one of \['linear', 'none'\].*optimizer.decay"),
    (["name=x", "optimizer=3"], r"optimizer=3"),
    (["name=x", "group="], r"has no value"),
    (["name=x", "tags=[a"], r"not YAML"),
    (["name=x", "--optimizer.lr=1"], r"write optimizer.lr=1, without dashes"),
    (["name=x", "extends=model/toyland"], r"'extends' is not a key"),
    (["name=x", "optimizer..lr=1"], r"is not a key"),
    (["name=x", HALF, "vision.layers=7"], r"7 cannot be divided by 2 without a remainder"),
    (["name=x", "vision={half: '${divide:4,0}'}"], r"divided by 0"),
    (["name=x", "trainer.max_flops=1e18"], r"'trainer.max_flops' was removed. Set trainer.max_steps"),
    (["nonsense"], r"neither a YAML file, a run folder nor key=value"),
    (["no/such.yaml"], r"no configuration file 'no/such.yaml'"),
    (["configs"], r"not a run folder"),
    ([], r"'name' has no value; set it in a YAML file or as name=…"),
)


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_named(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(ConfigError, match=message):
        load_config(arguments, Schema)


def test_run_folder_and_its_file_are_arguments(configs: Path, tmp_path: Path) -> None:
    config = load_config([str(configs / "run.yaml"), "group=null", "optimizer.betas=[0.8, 0.9]"], Schema)
    run = tmp_path / "run"
    run.mkdir()
    save_config(config, run / "config.yaml")
    assert load_config([str(run)], Schema) == config
    assert load_config([str(run / "config.yaml")], Schema) == config
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_none_and_whole_shares_of_other_values() -> None:
    for none in ["null", "None", "~"]:
        config = load_config(["name=x", f"group={none}", f"vision={{a: [{none}, 1]}}"], Schema)
        assert config.group is None and config.vision == {"a": [None, 1]}
    assert load_config(["name=x", HALF], Schema).vision == {"layers": 6, "half": 3}


def test_schema_chosen_by_a_value() -> None:
    @dataclass
    class Other:
        name: str
        width: int = 1

    config = load_config(["name=other", "width=3"], lambda values: Other if values["name"] == "other" else Schema)
    assert config == Other("other", 3)


@dataclass
class Store:
    options: dict[str, dict[str, Any]] = field(default_factory=dict, metadata={"secret": True})
    retries: int = 5


@dataclass
class Run:
    run: str = "runs/x"
    steps: int = 10
    share: float = 0.5
    on: bool = False
    name: str | None = None
    names: list[str] = field(default_factory=list)
    colours: dict[str, str] = field(default_factory=dict)
    kind: Literal["no", "yes"] = "yes"
    sizes: dict[str, Any] = field(default_factory=dict)
    store: Store = field(default_factory=Store)


TEXTS = ["0123", "1e-4", "no", "12:30", "a #b", "a: b", "[x", "0x10", "1_000", "null", "'a'", "~/x", "a=b"]


def test_text_is_kept_to_the_letter(tmp_path: Path) -> None:
    for text in TEXTS:
        config = load_config([f"run={text}", f"colours.red={text}"], Run)
        assert (config.run, config.colours) == (text, {"red": text})
        if text != "null":
            assert load_config([f"name={text}"], Run).name == text
    assert load_config(["names=[007, no, 12:30, 1e-4, 'a, b']"], Run).names == ["007", "no", "12:30", "1e-4", "a, b"]
    (tmp_path / "x.yaml").write_text("run: 0123\nname: 12:30\nnames: [007, on]\nkind: no\ncolours: {red: 1e3}\n")
    config = load_config([str(tmp_path / "x.yaml")], Run)
    assert (config.run, config.name, config.names, config.kind) == ("0123", "12:30", ["007", "on"], "no")
    assert config.colours == {"red": "1e3"}


def test_values_are_read_as_the_schema_says() -> None:
    sizes = {"width": 10, "rate": 1e-3, "on": True, "word": "no"}
    for argument, value in [
        ("steps=010", 10),
        ("steps=1_000", 1000),
        ("share=1e-4", 1e-4),
        ("share=1", 1.0),
        ("share=.5", 0.5),
        ("on=yes", True),
        ("on=False", False),
        ("kind=no", "no"),
        ("run=''", ""),
        ("run=a=b", "a=b"),
        ("run=None", "None"),
        ("name=None", None),
        ("name=null", None),
        ("sizes={width: 010, rate: 1e-3, on: true, word: no}", sizes),
        ("sizes.time=12:30", {"time": "12:30"}),
        ("run=${name}s", "Nones"),
    ]:
        found = getattr(load_config([argument], Run), argument.split("=")[0].split(".")[0])
        assert found == value and type(found) is type(value)


def test_the_argument_at_fault_is_named(configs: Path) -> None:
    for argument in ["steps=1e2", "steps=0x10", "steps=12:30", "steps=1.5", "on=maybe", "names=[~]"]:
        (configs / "run.yaml").write_text("steps: 3\non: true\nnames: [a]\n")
        for arguments in ([str(configs / "run.yaml"), argument], [argument, str(configs / "run.yaml")]):
            with pytest.raises(
                ConfigError, match=rf"^{argument.replace('[', '.').replace(']', '.')}: .*{argument[:2]}"
            ):
                load_config(arguments, lambda values: Run)


def test_what_is_left_of_the_first_equals_sign_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/lr=0.1", "run=y"):
        Path(folder).mkdir(parents=True)
        save_config(Run(run=folder), Path(folder, "config.yaml"))
    assert load_config(["run=runs/a.yaml"], Run).run == "runs/a.yaml"
    assert load_config(["run=runs/lr=0.1"], Run).run == "runs/lr=0.1"
    assert load_config(["run=y"], Run).run == "y"
    assert load_config(["./run=y"], Run).run == "run=y"
    assert load_config(["runs/lr=0.1"], Run).run == "runs/lr=0.1"
    assert load_config(["runs/lr=0.1/config.yaml", "steps=3"], Run).steps == 3
    with pytest.raises(ConfigError, match=r"no configuration file 'runs/lr=0.2/config.yaml'"):
        load_config(["runs/lr=0.2/config.yaml"], Run)
    Path("lr=0.1").mkdir()
    with pytest.raises(ConfigError, match=r"^lr=0.1: .*the path of that name is ./lr=0.1"):
        load_config(["lr=0.1"], Run)


def test_options_of_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=0.1").mkdir()
    paths = ["runs/lr=0.1", "lr=0.1", "./output=x", "runs/a"]
    assert split_options([*paths, "output=a/b=c"], {"output": "tables"}) == (paths, {"output": "a/b=c"})
    assert split_options(paths, {"output": "tables"}) == (paths, {"output": "tables"})
    with pytest.raises(ConfigError, match=r"'force=1': there is no option 'force' \(allowed: output=…"):
        split_options(["force=1"], {"output": "tables"})


def test_the_environment_is_never_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "s3cret")
    monkeypatch.delenv("ROOT", raising=False)
    arguments = [
        "run=${name}/${steps}",
        "name=${oc.env:ROOT,runs}",
        "steps=7",
        "names=['${oc.env:KEY}', '${kind}', 'a']",
        "sizes={half: '${divide:${steps},7}', both: '${colours}', price: '5 \\${x}'}",
        "colours={red: '${oc.env:KEY}', blue: '${kind}'}",
        "store.options={s3: {key: '${oc.env:KEY}', secret: abc, port: 80, anon: true, user: '${kind}'}}",
    ]
    written = written_config(arguments, Run)
    assert written == {
        "run": "${name}/${steps}",
        "steps": 7,
        "share": 0.5,
        "on": False,
        "name": "${oc.env:ROOT,runs}",
        "names": ["${oc.env:KEY}", "yes", "a"],
        "colours": {"red": "${oc.env:KEY}", "blue": "yes"},
        "kind": "yes",
        "sizes": {"half": 1, "both": {"red": "${oc.env:KEY}", "blue": "yes"}, "price": "5 \\${x}"},
        "store": {
            "options": {"s3": {"key": "${oc.env:KEY}", "secret": "***", "port": "***", "anon": True, "user": "***"}},
            "retries": 5,
        },
    }
    save_config(written, tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == written
    given, again = load_config(arguments, Run), load_config([str(tmp_path)], Run)
    assert given.run == again.run == "runs/7" and again.sizes["price"] == "5 ${x}"
    assert given.store.options["s3"]["key"] == again.store.options["s3"]["key"] == "s3cret"
    assert given.store.options["s3"]["secret"] == "abc"
    save_config(load_config(arguments[-1:], Run), tmp_path / "instance.yaml")
    assert "abc" not in (tmp_path / "instance.yaml").read_text()


def test_an_old_key_names_the_new_one(tmp_path: Path) -> None:
    for old in configuration.RENAMED:
        section, name = old.split(".")
        (tmp_path / "old.yaml").write_text(f"{section}: {{{name}: 1}}\n")
        kinds = [make_dataclass("T", [(key, int, 0)]) for key in (name, configuration.RENAMED[old].split(".")[1])]
        with_old, with_new = (make_dataclass("S", [(section, kind, field(default_factory=kind))]) for kind in kinds)
        for argument in (f"{old}=1", str(tmp_path / "old.yaml")):
            with pytest.raises(ConfigError, match=f"^{argument}: '{old}' is now '{configuration.RENAMED[old]}'$"):
                load_config([argument], with_new)
            assert getattr(getattr(load_config([argument], with_old), section), name) == 1


def test_help_lists_every_key() -> None:
    made = make_dataclass(
        "Made", [("more", int, 3), ("optimizer", Optimizer, field(default_factory=Optimizer))], bases=(Run,)
    )
    lines = describe_schema(made).splitlines()
    assert "more: int = 3  # " in lines
    assert "optimizer.lr: float = 0.001  # Peak learning rate." in lines
    assert "store.retries: int = 5  # " in lines
