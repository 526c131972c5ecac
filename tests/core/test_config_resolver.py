"""Settings: default < parameter file < --set < flag, as the right types, and nothing unknown."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from helpers import ROOT

import milan
from milan.config import PretrainConfig
from milan.core.config_fields import is_auto
from milan.core.config_resolver import (
    collect,
    deviations,
    from_call,
    load_recipe,
    read_section,
    resolve,
)
from milan.errors import ConfigError, nearest
from milan.evaluation.config import EvaluationConfig
from milan.evaluation.protocols import get_protocol
from milan.reporting.contact_sheet import contact_sheet
from pipeline.config import ExtractConfig
from pipeline.verify import Audit
from stages.options import field_docs
from stages.settings import COMMANDS, _rows


@pytest.fixture
def params(tmp_path: Path) -> Any:
    """params("pretrain: {...}") writes a parameter file and gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "params.yaml"
        path.write_text(text)
        return str(path)

    return write


def pretraining(
    sets: list[str] | None = None, params: str | None = None, **flags: Any
) -> PretrainConfig:
    return resolve(PretrainConfig, section="pretrain", params=params, sets=sets, flags=flags)


def test_later_wins(params: Any) -> None:
    """Each source alone, and each over the ones before it."""
    file = params("pretrain: {epochs: 10, batch_size: 11, seed: 12}\nextract: {seed: 99}")
    sets = ["batch_size=21", "seed=22"]
    assert pretraining() == PretrainConfig()
    config = pretraining(params=file)
    assert (config.epochs, config.batch_size, config.seed) == (10, 11, 12)
    config = pretraining(sets, file)
    assert (config.epochs, config.batch_size, config.seed) == (10, 21, 22)
    config = pretraining(sets, file, seed=32)
    assert (config.epochs, config.batch_size, config.seed) == (10, 21, 32)
    assert config.lr is None
    with pytest.raises(ConfigError, match="--set seed stands twice"):
        pretraining(["seed=1", "seed=2"])


def test_flags_not_given_say_nothing(params: Any) -> None:
    """A flag's absence must not undo what the file says; a false or a zero does."""
    file = params("pretrain: {seed: 5, weight_decay: 0.1}")
    assert pretraining(params=file, seed=None).seed == 5
    assert pretraining(params=file, seed=0).seed == 0
    assert pretraining(params=file, weight_decay=0.0).weight_decay == 0.0


def test_null_undoes(params: Any) -> None:
    """Where a field may be None, a later source may put the default back."""
    file = params("pretrain: {lr: 0.1}")
    assert pretraining(params=file).lr == 0.1
    assert pretraining(["lr=null"], file).lr is None


def test_no_file_is_read_unless_named(
    params: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A params.yaml in the working folder is DVC's business, not a command's."""
    params("pretrain: {epochs: 3}")
    monkeypatch.chdir(tmp_path)
    assert pretraining().epochs == PretrainConfig().epochs


def test_arguments_of_models_are_merged(params: Any) -> None:
    """model.x and decoder.x go to dictionaries of their own, key by key."""
    file = params("pretrain: {model: vit_small, model_args: {depth: 2}, decoder: {depth: 3}}")
    config = pretraining(["model.embed_dim=128", "decoder.num_heads=4", "decoder.depth=1"], file)
    assert config.model == "vit_small"
    assert config.model_args == {"depth": 2, "embed_dim": 128}
    assert config.decoder == {"depth": 1, "num_heads": 4}
    assert pretraining().decoder == {}
    assert pretraining(["model=vit_tiny", "model.depth=2"]).model == "vit_tiny"
    evaluation = resolve(EvaluationConfig, section="probe", sets=["model.depth=2"])
    assert evaluation.model_args == {"depth": 2}


@pytest.mark.parametrize("kind", [kind for kind, _ in COMMANDS.values()])
def test_keys_that_are_listed_can_be_set(kind: type, params: Any) -> None:
    """`milan config` lists NAME.KEY for arguments by name: by --set and in a file, of all commands,
    objective.KEY too."""
    given = collect(kind, section="any")
    for name in (row[0] for row in _rows(kind, given.values, given.sources)):
        if not name.endswith(".KEY"):
            continue
        key = name.removesuffix("KEY") + "weight"
        field = next(n for n in (key.partition(".")[0], key.partition(".")[0] + "_args")
                     if "dict" in str(get_type_hints(kind).get(n)))  # fmt: skip
        for got in (
            collect(kind, section="any", sets=[f"{key}=0.25"]),
            collect(kind, section="any", params=params(f"any: {{{key}: 0.25}}")),
        ):
            assert got.values == {field: {"weight": 0.25}}
    if kind is PretrainConfig:
        assert pretraining(["objective=rils", "objective.weight=0"]).objective_args == {"weight": 0}


def test_recipes_are_listed_whole() -> None:
    """The help of --recipe names each that there is."""
    there = {path.stem for path in (ROOT / "milan/recipes").glob("*.yaml")}
    assert set(re.findall(r"\w*vit_\w+", field_docs(PretrainConfig)["recipe"])) == there


@pytest.mark.parametrize(
    ("item", "field", "value"),
    [
        ("lr=1e-3", "lr", 0.001),  # YAML reads this as text
        ("lr=.001", "lr", 0.001),
        ("lr=1", "lr", 1.0),
        ("epochs=1e2", "epochs", 100),
        ("epochs=7.0", "epochs", 7),
        ("seed=9007199254740993", "seed", 9007199254740993),  # more than a float holds
        ("out=123", "out", "123"),
        ("out=a=b", "out", "a=b"),
        ("out=runs/a b", "out", "runs/a b"),
        ("out=[a", "out", "[a"),  # no YAML: text
        (" seed =3", "seed", 3),
        ("model.drop_path_rate=1e-1", "model_args", {"drop_path_rate": 0.1}),
        ("model.qkv_bias=false", "model_args", {"qkv_bias": False}),
        ("model.norm_layer=rmsnorm", "model_args", {"norm_layer": "rmsnorm"}),
    ],
)
def test_types(item: str, field: str, value: Any) -> None:
    """As the field declares; the value and its type."""
    got = getattr(pretraining([item]), field)
    assert got == value
    assert type(got) is type(value)


def test_tuples(params: Any) -> None:
    """Of the right length and of floats, from a file, --set or a flag."""
    file = params("extract: {data: x, scale: [1, 1], ratio: [1e-1, 2]}")
    config = resolve(ExtractConfig, section="extract", params=file)
    assert config.scale == (1.0, 1.0)
    assert config.ratio == (0.1, 2.0)
    assert all(isinstance(edge, float) for edge in config.scale + config.ratio)
    config = resolve(ExtractConfig, section="extract", sets=["scale=[0.5, 1]"], params=file)
    assert config.scale == (0.5, 1.0)
    for text in ("scale=0.5,1", "scale=0.5 1.0", "scale= 0.5, 1"):
        assert resolve(ExtractConfig, section="extract", sets=[text], params=file) == config
    flags = {"scale": (0.3, 0.9), "offline": True}
    config = resolve(ExtractConfig, section="extract", params=file, flags=flags)
    assert config.scale == (0.3, 0.9)
    assert config.offline is True


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        ("epochs=ten", "of type int"),
        ("epochs=1.5", "of type int"),
        ("epochs=.inf", "of type int"),
        ("epochs=.nan", "of type int"),
        ("epochs=yes", "of type int"),
        ("epochs=", "of type int"),
        ("epochs=[1]", "of type int"),
        ("lr=fast", "a number"),
        ("lr=true", "a number"),
        ("lr=.nan", "a number"),
        ("lr=[1]", "a number"),
        ("model=[a]", "of type str"),
        ("model={a: 1}", "of type str"),
        ("masking=[off]", "of type str"),
        ("out=", "of type str"),
        ("model_args=3", "of type dict"),
    ],
)
def test_values_of_another_type(item: str, kind: str) -> None:
    """Named with where it stands; never "None" as a folder or "False" as a masking."""
    key = item.partition("=")[0]
    with pytest.raises(ConfigError, match=f"^{key} = .* in --set; expected: {kind}; try: --"):
        pretraining([item])


def test_words_mean_what_their_field_says(tmp_path: Path) -> None:
    """Not what YAML takes them for: as on the command line, in the file and with --set."""
    words: dict[str, Any] = {
        "compile=off": "off", "out=07": "07", "out=1:30": "1:30", "layer=1.10": "1.10",
        "cache=no": "no", "out=true": "true", "model=2024-01-01": "2024-01-01", "seed=010": 10,
        "lr=1e-3": 1e-3, "checkpoint_activations=on": True, "checkpoint_activations=False": False,
    }  # fmt: skip
    for item, value in words.items():
        name, _, text = item.partition("=")
        (tmp_path / "p.yaml").write_text(f"pretrain:\n  {name}: {text}\n")
        by_file = resolve(PretrainConfig, section="pretrain", params=str(tmp_path / "p.yaml"))
        assert getattr(pretraining([item]), name) == getattr(by_file, name) == value
    sets = ["model.depth=2", "model.a=1e-3", "model.b=true", "model.c=[28, x]", "model.d=relu"]
    expected = {"depth": 2, "a": 1e-3, "b": True, "c": [28, "x"], "d": "relu"}
    assert repr(pretraining(sets).model_args) == repr(expected)
    for item in ("batch_size=1:30", "epochs=0x10"):  # YAML's sixties and sixteens
        with pytest.raises(ConfigError, match="of type int"):
            pretraining([item])


@pytest.mark.parametrize(
    "item", ["scale=0.2", "scale=0.2,1,1", "scale=[0.2]", "scale=[a, b]", "offline=1", "limit=x"]
)
def test_values_of_another_type_to_extract(item: str) -> None:
    """Tuples of the wrong length, numbers for switches."""
    with pytest.raises(ConfigError, match="in --set"):
        resolve(ExtractConfig, section="extract", sets=["data=x", item])


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("epoch", "epochs"),
        ("batchsize", "batch_size"),
        ("LR", "lr"),
        ("seed.x", "seed"),
        ("pretrain.epochs", "epochs"),
        ("pretrain.batchsize", "batch_size"),
        ("train.lr", "lr"),
        ("modle.depth", "model.depth"),
        ("decodr.depth", "decoder.depth"),
        ("objectve.weight", "objective.weight"),
    ],
)
def test_unknown_keys_stop_the_run(params: Any, key: str, near: str) -> None:
    """A misspelt setting would be a run of the wrong recipe; the nearest name is given."""
    with pytest.raises(ConfigError, match=f"unknown parameter '{key}' in --set") as error:
        pretraining([f"{key}=3"])
    assert near in error.value.fix
    assert error.value.expected == "one that `milan config pretrain` lists"
    file = params(f"pretrain: {{{key}: 3}}")
    with pytest.raises(ConfigError, match="section pretrain") as error:
        pretraining(params=file)
    assert file in str(error.value)


def test_keys_of_other_sections_are_theirs(params: Any) -> None:
    """One file serves all commands; a missing or an empty section is no error."""
    file = params("pretrain:\nextract: {data: x, no_such: 1}\nother: 3")
    assert pretraining(params=file) == PretrainConfig()
    assert resolve(EvaluationConfig, section="linear-probe", params=file) == EvaluationConfig()
    with pytest.raises(ConfigError, match="no_such"):
        resolve(ExtractConfig, section="extract", params=file)
    assert read_section(params(""), "pretrain") == {}


def test_a_misspelt_section_is_not_passed_over(params: Any) -> None:
    """Its settings would be those of nobody, and the run one of the defaults."""
    file = params("pretrian: {epochs: 3}")
    with pytest.raises(ConfigError, match="a section 'pretrian' and none 'pretrain'") as error:
        pretraining(params=file)
    assert error.value.fix == "rename it to pretrain"


def test_unknown_arguments_in_python() -> None:
    """As on the command line: the nearest is named."""
    with pytest.raises(ConfigError, match="unknown argument 'epoch'") as error:
        milan.pretrain("targets.zarr", epoch=3)
    assert "epochs" in error.value.fix


@pytest.mark.parametrize(
    "text",
    ["pretrain: 3", "- pretrain", "pretrain: [epochs]", "pretrain: {epochs", "a: b: c", "1"],
)
def test_files_that_are_no_settings(params: Any, text: str) -> None:
    """The file is named; no traceback of a parser."""
    file = params(text)
    with pytest.raises(ConfigError) as error:
        pretraining(params=file)
    assert file in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(params: Any, tmp_path: Path) -> None:
    """Missing, a folder, not text, a key that is a number."""
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="no parameter file at"):
            pretraining(params=str(path))
    (tmp_path / "latin.yaml").write_bytes("pretrain: {out: ü}".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        pretraining(params=str(tmp_path / "latin.yaml"))
    with pytest.raises(ConfigError, match="unknown parameter '1'"):
        pretraining(params=params("pretrain: {1: 2}"))
    for twice in ("pretrain:\n  lr: 1\n  lr: 2\n", "pretrain: {lr: 1}\npretrain:\n  lr: 2\n"):
        with pytest.raises(ConfigError, match=r"'\w+' stands twice, again in line [23]"):
            pretraining(params=params(twice))


def test_files_run_no_code(params: Any) -> None:
    """Safe YAML only."""
    with pytest.raises(ConfigError, match="no YAML"):
        pretraining(params=params("pretrain: {out: !!python/object/apply:os.getcwd []}"))


@pytest.mark.parametrize("item", ["epochs", "=3", ""])
def test_sets_need_key_and_value(item: str) -> None:
    """`--set epochs 3` is a slip of the hand."""
    with pytest.raises(ConfigError):
        pretraining([item])


def test_required_settings() -> None:
    """Named as a flag, since that is how it is given."""
    with pytest.raises(ConfigError, match="--data not given"):
        resolve(ExtractConfig, section="extract")
    assert resolve(ExtractConfig, section="extract", sets=["data=x"]).data == "x"

    @dataclasses.dataclass
    class Two:
        data: str
        max_size: int

    with pytest.raises(ConfigError, match="--data, --max-size not given"):
        resolve(Two, section="x")


def test_deviations() -> None:
    """What differs from the published recipe, and only that."""
    assert deviations(PretrainConfig()) == {}
    config = pretraining(["epochs=3", "model.depth=2", "out=elsewhere", "lr=0.1", "keep=2"])
    assert deviations(config, leave=("out",)) == {
        "epochs": (3, 400),
        "model_args": ({"depth": 2}, {}),
        "lr": (0.1, None),
    }
    assert "out" in deviations(config)
    assert "data" not in deviations(ExtractConfig(data="x")), "required: no default to differ from"


def test_settings_share_no_state() -> None:
    """A default dictionary used twice would carry one run's arguments into the next."""
    first = pretraining(["model.depth=2"])
    assert pretraining().model_args == {}
    assert first.model_args is not pretraining(["model.depth=2"]).model_args
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "wrong",
    [
        {"objective": "clip"}, {"masking": "none"}, {"precision": "fp64"}, {"epochs": 0},
        {"batch_size": 0}, {"micro_batch": 0}, {"lr": 0.0}, {"lr": -1.0}, {"keep": 0},
        {"lr": math.inf}, {"clip_grad": math.nan}, {"weight_decay": math.inf},
        {"shuffle": "none"}, {"window_rows": 0}, {"on_changed": "skip"},
        {"warmup_epochs": -1.0}, {"epochs": 10, "warmup_epochs": 10.0},
    ],
)  # fmt: skip
def test_values_out_of_range(wrong: dict) -> None:
    """Refused before anything is read or written."""
    PretrainConfig().check()
    with pytest.raises(ConfigError):
        PretrainConfig(**wrong).check()


def test_nearest_names() -> None:
    """Like, or like but for its capitals; nothing for nonsense."""
    known = ["ViT-B-16", "ViT-L-14", "RN50"]
    assert nearest("vit-b-16", known).split(" or ")[0] == "ViT-B-16"
    assert nearest("ViT-B16", known).split(" or ")[0] == "ViT-B-16"
    assert nearest("zzzzzz", known) == ""


# --- recipes --------------------------------------------------------------------------------------


def test_a_recipe_lies_below_all_else(tmp_path: Path) -> None:
    """Default < recipe < file < --set < flag; a recipe named in the file counts."""
    large = resolve(PretrainConfig, section="pretrain", flags={"recipe": "vit_large"})
    assert (large.model, large.micro_batch) == ("vit_large_patch16_224", 128)
    assert (large.epochs, large.batch_size) == (400, 4096)
    params = tmp_path / "p.yaml"
    params.write_text("pretrain: {recipe: vit_large, micro_batch: 64}\n")
    mine = resolve(
        PretrainConfig, section="pretrain", params=str(params), sets=["model.depth=3"],
        flags={"epochs": 5},
    )  # fmt: skip
    assert (mine.model, mine.micro_batch, mine.epochs) == ("vit_large_patch16_224", 64, 5)
    published = load_recipe(PretrainConfig, "vit_large", "pretrain")
    assert set(deviations(mine, recipe=published, leave=("recipe",))) == {
        "epochs", "micro_batch", "model_args"
    }  # fmt: skip


RECIPES = sorted(path.stem for path in (Path(milan.__file__).parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_hold(name: str) -> None:
    """Every file is read, names fields that are there, and says what it costs."""
    resolve(PretrainConfig, section="pretrain", flags={"recipe": name}).check()
    text = (Path(milan.__file__).parent / "recipes" / f"{name}.yaml").read_text()
    assert "Cost: " in text
    assert f"--recipe {name}" in text


def test_an_unknown_recipe() -> None:
    """The nearest is named."""
    with pytest.raises(ConfigError, match="unknown recipe 'vit-large'") as error:
        resolve(PretrainConfig, section="pretrain", flags={"recipe": "vit-large"})
    assert "vit_large" in error.value.fix


# --- the committed parameter file -----------------------------------------------------------------

COMMITTED = (ROOT / "params.yaml").read_text()
SECTIONS = {
    "extract": (ExtractConfig, {"data": "photos", "out": "p.zarr"}),
    "pretrain": (PretrainConfig, {}),
    "linear_probe": (EvaluationConfig, {"data": "photos", "val_data": "others"}),
    "knn": (EvaluationConfig, {"data": "photos", "val_data": "others"}),
}


def test_the_variant_for_rils() -> None:
    """demo/rils: each stage names a command and this file, whose section that command can read."""
    place = "demo/rils/params.yaml"
    params = yaml.safe_load((ROOT / place).read_text())
    stages = yaml.safe_load((ROOT / "demo/rils/dvc.yaml").read_text())["stages"]
    for name, command in (("tokens", "extract-targets"), ("pretrain", "pretrain")):
        assert stages[name]["cmd"].startswith(f"milan {command} --params {place}")
    kinds: dict[str, Any] = {"extract": ExtractConfig, "pretrain": PretrainConfig}
    kinds |= {name: get_protocol(name).settings for name in params["protocols"]}
    found = {
        section: resolve(kind, section=section, params=str(ROOT / place))
        for section, kind in kinds.items()
    }
    for settings in found.values():
        settings.check()
    assert (found["extract"].targets, found["pretrain"].objective) == ("none", "rils")
    assert (ROOT / params["watched"]).is_dir()


@pytest.mark.parametrize(
    ("teacher", "pretrained"),
    [
        ("ViT-B-16-quickgelu", "auto"), ("ViT-B-16-SigLIP", "webli"),
        ("timm:vit_base_patch14_dinov2", "auto"), ("timm:vit_small_patch16_dinov3", "w.pt"),
    ],
)  # fmt: skip
def test_the_committed_file_is_the_command_line(teacher: str, pretrained: str, params: Any) -> None:
    """Changed as its comments say, it gives what the flags give: nothing in it is left of the
    demo's teacher or machine."""
    mine = yaml.safe_load(
        "\n".join(line for line in COMMITTED.splitlines() if not re.search("# demo;", line))
    )
    for section, (kind, own) in SECTIONS.items():
        more = {"teacher": teacher, "pretrained": pretrained} if section == "extract" else {}
        changed = mine[section] | own | more
        file = params(yaml.safe_dump({section: changed}))
        flags = own | {key: value for key, value in more.items() if value != "auto"}
        assert resolve(kind, section=section, params=file) == resolve(
            kind, section=section, flags=flags
        ), section


def test_every_committed_key_says_what_to_change() -> None:
    """A key without a word would be copied as it is; `demo` and `<-` are what a user looks for."""
    keys = [line for line in COMMITTED.splitlines() if re.match(r"  \w+:", line)]
    assert len(keys) > 25
    assert [line for line in keys if " # " not in line] == []
    resolve(ExtractConfig, section="extract", params=str(ROOT / "params.yaml")).check()
    for section in SECTIONS:
        given = yaml.safe_load(COMMITTED)[section]
        kind = SECTIONS[section][0]
        automatic = [f.name for f in dataclasses.fields(kind) if is_auto(f, "auto")]
        told = {key for key in given if key in automatic} - {"pretrained", "lr", "warmup_epochs"}
        assert all(given[key] == "auto" for key in told), section


def test_auto_is_the_default_everywhere(params: Any) -> None:
    """In a file, by --set, by a flag and from Python; only for fields that say so."""
    file = params("pretrain: {num_workers: auto, lr: auto, masking: auto, micro_batch: 3}")
    config = pretraining(["micro_batch=auto"], file, warmup_epochs="auto")
    assert config == PretrainConfig()
    called = from_call(ExtractConfig, "data", "x", {"teacher_norm": "auto"}, "extract")
    assert called == ExtractConfig("x")
    for kind in (ExtractConfig, PretrainConfig, EvaluationConfig):
        for field in dataclasses.fields(kind):
            if field.metadata.get("auto"):
                assert field.default is None, field.name
    with pytest.raises(ConfigError, match="epochs = 'auto'"):
        pretraining(["epochs=auto"])


def test_numbers_have_units() -> None:
    """`milan config` lists them: 0.05 of what?"""
    for kind in (ExtractConfig, PretrainConfig, EvaluationConfig):
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if {int, float} & {hints[field.name], *get_args(hints[field.name])}:
                assert field.metadata.get("unit"), f"{kind.__name__}.{field.name}"


@pytest.mark.parametrize("key", ["epochs", "cache"])
def test_settings_outside_of_a_section(key: str, params: Any) -> None:
    """They would be read by nobody, and the run be one of the defaults."""
    with pytest.raises(ConfigError, match=f"has {key} outside of any section") as error:
        pretraining(params=params(f"{key}: 3"))
    assert "under pretrain:" in error.value.expected


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 2**64, 10**400])
def test_a_seed_has_64_bits(seed: int) -> None:
    """Wherever one is taken, a larger one is refused: cut to 64 bits it would be another's."""
    takes: list[Callable[[int], Any]] = [
        lambda seed: PretrainConfig(seed=seed).check(),
        lambda seed: ExtractConfig("data", seed=seed).check(),
        lambda seed: EvaluationConfig(seed=seed).check(),
        lambda seed: Audit(1, seed),
        lambda seed: contact_sheet("none.zarr", out="sheet.png", seed=seed),
    ]
    for take in takes:
        with pytest.raises(ConfigError, match=f"^seed {seed}; expected: at least -{2**63}, at"):
            take(seed)


def test_whole_numbers_keep_all_their_digits(params: Any) -> None:
    """As text they must not pass through a float, which has 53 bits."""
    seed = 2**63 - 1
    assert pretraining(params=params(f"pretrain: {{seed: '{seed}'}}")).seed == seed
    assert pretraining([f"seed={seed}"]).seed == seed
    assert pretraining(params=params("pretrain: {epochs: '1e2'}")).epochs == 100
