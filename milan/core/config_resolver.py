"""Settings: default < recipe < parameter file < --set < flag; an unknown key stops the run.

Each command has one frozen dataclass, beside its function. No file is read unless named. What a
plain word of a file or of --set means is decided by the type of its field, as on the command line:
`data: 07` is the folder 07, and `compile: off` the word off.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from milan.core.config_fields import as_given, is_auto
from milan.errors import ConfigError, nearest

Config = TypeVar("Config")

_CALL = "the call"  # the source of settings in Python

_ARGUMENTS = "_args"  # `--set model.embed_dim=128`: `model` is a name, model_args its arguments
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclasses.dataclass
class Given:
    """The settings that were given, and where: what is not given has its default."""

    kind: type
    """The dataclass of the command."""
    section: str
    """Its section of a parameter file."""
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    """By field."""
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    """field -> a recipe, a parameter file, --set, or the command line."""

    def put(self, key: str, value: Any, source: str) -> None:
        """Take `key = value`; `key` may be `model.key`. Raises ConfigError for an unknown one."""
        hints = typing.get_type_hints(self.kind)
        head, dot, rest = key.partition(".")
        if dot and (field := _arguments(hints).get(head)):
            self.values[field] = {**self.values.get(field, {}), rest: _untyped(value)}
            self.sources[field] = source
            return
        if key not in hints:
            what = f"argument {key!r}" if source == _CALL else f"parameter {key!r} in {source}"
            raise ConfigError(
                f"unknown {what}",
                expected=f"one that `milan config {self.section}` lists",
                fix=_nearest_key(key, hints),
            )
        known = next(f for f in dataclasses.fields(self.kind) if f.name == key)
        if known.metadata.get("several") and isinstance(value, list | tuple):
            value = ",".join(map(str, value))
        is_default = is_auto(known, value)
        try:
            self.values[key] = None if is_default else _coerce(hints[key], value)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            raise ConfigError(
                f"{key} = {value!r} in {source}", expected=_kind(hints[key]), fix=as_given(known)
            ) from None
        self.sources[key] = source

    def build(self) -> Any:
        """The settings. Raises ConfigError for a field without a default that was not given."""
        missing = [
            "--" + field.name.replace("_", "-")
            for field in dataclasses.fields(self.kind)
            if field.name not in self.values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            names = ", ".join(missing)
            raise ConfigError(
                f"{names} not given", expected=f"a value for {names}", fix=f"{missing[0]} VALUE"
            )
        return self.kind(**self.values)


def resolve(
    kind: type[Config],
    *,
    section: str,
    params: str | None = None,
    sets: list[str] | None = None,
    flags: dict[str, Any] | None = None,
) -> Config:
    """The settings of a command: an instance of the dataclass `kind`. As `collect` finds them."""
    return collect(kind, section=section, params=params, sets=sets, flags=flags).build()


def collect(
    kind: type,
    *,
    section: str,
    params: str | None = None,
    sets: list[str] | None = None,
    flags: dict[str, Any] | None = None,
) -> Given:
    """What is given of the settings of a command, and where.

    `params` names a YAML file, of which only `section` is read; `sets` are `key=value` or
    `model.key=value`; `flags` that are None were not given. Raises ConfigError, which names the
    nearest valid key.
    """
    given = Given(kind, section)
    if params:
        for key, value in read_section(params, section, kind).items():
            given.put(str(key), value, f"{params}, section {section}")
    seen: set[str] = set()
    for item in sets or []:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(
                f"--set {item}", expected="key=value, such as epochs=100", fix=f"--set {item}=VALUE"
            )
        key = key.strip()
        if key in seen:
            raise ConfigError(f"--set {key} stands twice", expected="once", fix=f"--set {item}")
        seen.add(key)
        given.put(key, _parse(text), "--set")
    for key, value in (flags or {}).items():
        if value is not None:
            given.put(key, value, "the command line")
    if "recipe" in given.values:
        name = given.values["recipe"]
        published = load_recipe(kind, name, section)
        given.values = published | given.values
        given.sources = dict.fromkeys(published, f"recipe {name}") | given.sources
    return given


def load_recipe(kind: type, name: str, section: str) -> dict[str, Any]:
    """field -> value: a command's section of a recipe (milan/recipes/). Raises ConfigError."""
    folder = resources.files("milan") / "recipes"
    known = sorted(p.name.removesuffix(".yaml") for p in folder.iterdir())
    if name not in known:
        raise ConfigError(
            f"unknown recipe {name!r}",
            expected="one of " + ", ".join(known),
            fix=nearest(name, known),
        )
    given = Given(kind, section)
    with resources.as_file(folder / f"{name}.yaml") as path:
        for key, value in read_section(str(path), section).items():
            given.put(key, value, f"recipe {name}")
    return given.values


def _load_yaml(text: str) -> Any:
    """YAML whose words stay text, but null, without keys that stand twice.

    yaml itself takes 07 for 7, 1:30 for 90 and off for False, and of two keys the last, in silence.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    again = key.start_mark.line + 1
                    raise yaml.YAMLError(f"key {key.value!r} stands twice, again in line {again}")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0].endswith((":null", ":merge"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return yaml.load(text, Loader)


def read_section(params: str, section: str, kind: type | None = None) -> dict[str, Any]:
    """One section of a YAML parameter file; empty if the file has no such section.

    Raises ConfigError if it is no YAML, has a section that is almost called so, or has settings
    (of `kind`) that are in no section.
    """
    import yaml

    path = Path(params)
    if not path.is_file():
        raise ConfigError(f"no parameter file at {params}", fix="--params params.yaml")
    try:
        read = _load_yaml(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        line = (
            f"line {mark.line + 1} of it" if (mark := getattr(error, "problem_mark", None)) else ""
        )
        raise ConfigError(
            f"{params} is no YAML: {getattr(error, 'problem', None) or str(error).splitlines()[0]}",
            expected="lines `key: value`, indented, under the name of a command",
            fix=f"mend {line or params}",
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(
            f"{params} is no YAML: it is not UTF-8 text",
            expected="a file like params.yaml",
            fix="save it as UTF-8",
        ) from None
    if not isinstance(read, dict) or not isinstance(read.get(section) or {}, dict):
        raise ConfigError(
            f"{params} has no usable section {section!r}",
            expected="a mapping",
            fix=f"lines `key: value`, indented, under {section}:",
        )
    similar = difflib.get_close_matches(section, map(str, read), n=1, cutoff=0.8)
    if section not in read and similar:
        raise ConfigError(
            f"{params} has a section {similar[0]!r} and none {section!r}",
            expected=f"the settings of this command under {section}",
            fix=f"rename it to {section}",
        )
    stray = [f.name for f in dataclasses.fields(kind) if f.name in read] if kind else []
    if section not in read and stray:
        raise ConfigError(
            f"{params} has {', '.join(stray)} outside of any section",
            expected=f"the settings of this command, indented, under {section}:",
            fix=f"a line {section}: above them, and spaces before each",
        )
    return read.get(section) or {}


def deviations(
    config: Any, *, recipe: dict[str, Any] | None = None, leave: tuple[str, ...] = ()
) -> dict[str, tuple[Any, Any]]:
    """field -> (value, expected) where a config differs from its defaults, or a recipe's values."""
    changed, published = {}, recipe or {}
    for f in dataclasses.fields(config):
        default = published.get(f.name, f.default)
        if f.default_factory is not dataclasses.MISSING:
            default = published.get(f.name) or f.default_factory()
        value = getattr(config, f.name)
        if f.name not in leave and default is not dataclasses.MISSING and value != default:
            changed[f.name] = (value, default)
    return changed


def _parse(text: str) -> Any:
    import yaml

    try:
        return _load_yaml(text)
    except yaml.YAMLError:
        return text


def _nearest_key(key: str, hints: dict[str, Any]) -> str:
    """The key that was meant: another section's or model's name in front counts less."""
    head, dot, rest = key.partition(".")
    if not dot:
        return nearest(key, hints)
    if near := difflib.get_close_matches(head, _arguments(hints), n=1):
        return f"{near[0]}.{rest}"
    return nearest(rest, hints) or nearest(head, hints)


def from_call(
    kind: type[Config], field: str, first: Any, settings: dict[str, Any], section: str
) -> Config:
    """The settings of a call from Python: `first` if it is them or a part, or is their `field`
    beside others.

    A recipe among them is read from `section`. Raises ConfigError for a config and settings, and
    for an unknown setting.
    """
    if type(first) in kind.__mro__[1:]:
        first = kind(**vars(first))  # settings that several commands share
    if isinstance(first, kind):
        if settings:
            raise ConfigError(
                f"{', '.join(settings)} beside a {kind.__name__}",
                expected="a config, or settings",
                fix=f"dataclasses.replace(config, {next(iter(settings))}=...)",
            )
        return first
    given = Given(kind, section)
    for name, value in {field: first, **settings}.items():
        given.put(name, value, _CALL)
    recipe = load_recipe(kind, given.values["recipe"], section) if settings.get("recipe") else {}
    return kind(**recipe | given.values)


def _arguments(hints: dict[str, Any]) -> dict[str, str]:
    """What stands before the dot of a key -> its field: `decoder`, and `model` of `model_args`."""
    return {n.removesuffix(_ARGUMENTS): n for n, hint in hints.items() if _is_dict(hint)}


def _is_dict(hint: Any) -> bool:
    return hint is dict or typing.get_origin(hint) is dict


def _untyped(value: Any) -> Any:
    """A model's argument has no type to go by: text that is a number, true or false becomes it."""
    if isinstance(value, list):
        return [_untyped(part) for part in value]
    if isinstance(value, dict):
        return {name: _untyped(part) for name, part in value.items()}
    if not isinstance(value, str):
        return value
    for number in (int, float):
        with suppress(ValueError):
            return number(value)
    return {"true": True, "false": False}.get(value.lower(), value)


def _coerce(hint: Any, value: Any) -> Any:
    """`value` as the field's type, from text or as Python has it. Raises AttributeError, KeyError,
    OverflowError, TypeError or ValueError for what is none."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(a for a in inner if a is not type(None))
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if isinstance(value, str):  # 0.6,1 as well as [0.6, 1]
            value = value.replace(",", " ").split()
        return tuple(_coerce(i, v) for i, v in zip(inner, value, strict=True))
    if _is_dict(hint):
        if not isinstance(value, dict):
            raise TypeError
        return _untyped(value)
    if hint is bool:
        return value if isinstance(value, bool) else _TRUTH[value.lower()]
    if hint is int:
        if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
            return int(value)  # by way of a float it would lose its last digits
        if isinstance(value, bool) or int(float(value)) != float(value):
            raise TypeError
        return value if isinstance(value, int) else int(float(value))
    if hint is float:
        if isinstance(value, bool) or math.isnan(float(value)):
            raise TypeError
        return float(value)
    if value is None or isinstance(value, bool | list | dict):
        raise TypeError
    return str(value)


def _kind(hint: Any) -> str:
    """What a field takes, in words."""
    named = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is tuple:
        return f"{len(named)} numbers, with a comma between"
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return _kind(named[0])
    return "a number" if hint is float else f"of type {getattr(hint, '__name__', str(hint))}"
