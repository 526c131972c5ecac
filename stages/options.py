"""Flags generated from settings: a command's flags are fields of its dataclass.

A flag's help is the string below the field, so it is written once, and a flag cannot disagree with
what it sets. Settings are declared in modules without heavy imports, so that `--help` stays fast.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import typing
from collections import Counter
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from milan.core.config_fields import AUTO
from milan.errors import ConfigError, MilanError

SETTINGS, CALL = "Settings", "This call"
"""Panels of the help for what is no setting itself."""

Params = Annotated[
    str | None,
    typer.Option(
        help="A YAML file of settings; without it none is read.",
        show_default=False,
        rich_help_panel=SETTINGS,
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any setting, as key=value; may be repeated. `milan config` lists all settings.",
        show_default=False,
        rich_help_panel=SETTINGS,
    ),
]


class Interrupted(Exception):
    """Ctrl-C in a command, with what is kept: typer would end without a word."""


class Command(TyperCommand):
    """A command whose help shows its options in panels, which takes pairs as 0.6,1 too, and one
    value of a flag once."""

    def invoke(self, ctx: Any) -> Any:
        """Run it. Raises Interrupted at Ctrl-C."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            left = str(interrupt) or "nothing was written; the same line starts again"
            raise Interrupted(left) from None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """By rich. Errors stay plain lines: rich would put them in a box."""
        from typer.rich_utils import rich_format_help

        rich_format_help(obj=self, ctx=ctx, markup_mode="rich")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Cut `--scale 0.6,1` in two. Raises ConfigError for a flag of one value that stands twice:
        click would take the last in silence."""
        pairs = {name for param in self.params if param.nargs > 1 for name in param.opts}
        cut: list[str] = []
        for i, word in enumerate(args):
            name, equals, value = word.partition("=")
            if equals and name in pairs:
                cut += [name, *value.split(",")]
            else:
                cut += word.split(",") if i and args[i - 1] in pairs else [word]
        given, _, in_order = self.make_parser(ctx).parse_args(args=list(cut))
        options = (param for param in in_order if isinstance(param, TyperOption))
        for param, times in Counter(options).items():
            if times > 1 and not (param.multiple or param.is_flag):
                name, value = param.opts[0], given[param.name]
                text = " ".join(value) if isinstance(value, tuple) else value
                raise ConfigError(
                    f"{name} stands {times} times", expected="once", fix=f"{name} {text}"
                )
        return super().parse_args(ctx, cut)


def settings_command(
    config: type, panels: dict[str, tuple[str, ...]], section: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command fields of dataclass `config` as flags, --params and --set.

    `panels` are the fields by the panel of the help in which they stand; `section` is that of a
    parameter file. The command is called with `flags` (name -> value or None), `params`, `sets`,
    and its own keyword-only options.
    """
    fields = tuple(itertools.chain.from_iterable(panels.values()))

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(config)
        docs = field_docs(config)
        by_name = {f.name: f for f in dataclasses.fields(config)}
        from_fields = [
            _flag(by_name[name], hints[name], docs[name], panel)
            for panel, names in panels.items()
            for name in names
        ]
        from_fields += [_parameter("params", Params), _parameter("sets", Sets)]
        signature = inspect.signature(command, eval_str=True)
        passed = ("flags", "params", "sets")
        options = [p for p in signature.parameters.values() if p.name not in passed]

        def run(**arguments: Any) -> None:
            flags = {name: arguments.pop(name) for name in fields}
            try:
                command(flags=flags, **arguments)
            except MilanError as error:
                error = _advice_for_keys(error, set(by_name) - set(fields))
                raise _advice_for_file(error, by_name, arguments["params"], section) from None

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        signature = inspect.Signature([*from_fields, *options])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return run

    return decorate


def _advice_for_keys(error: MilanError, keys: Collection[str]) -> MilanError:
    """`error`, whose advice sets `keys`, settings that are no flags, by --set; advice that is
    another command stays."""

    def by_set(found: re.Match[str]) -> str:
        key = found[1].replace("-", "_")
        return f"--set {key}={found[2]}" if key in keys else found[0]

    if not error.fix.startswith("--"):
        return error
    fix = re.sub(r"--([a-z][a-z0-9-]*) ([^\s,]+)", by_set, error.fix)
    return type(error)(error.found, expected=error.expected, fix=fix)


def _advice_for_file(
    error: MilanError, fields: Collection[str], params: str | None, section: str
) -> MilanError:
    """`error`, which also says which keys of `params` the flags of its advice are."""
    names = re.findall(r"--([a-z][a-z-]+)", error.fix)
    keys = dict.fromkeys(n.replace("-", "_") for n in names if n.replace("-", "_") in fields)
    if not params or not keys:
        return error
    where = ", ".join(f"{section}.{key}" for key in keys)
    return type(error)(
        error.found, expected=error.expected, fix=f"{error.fix} (in {params}: {where})"
    )


def _flag(field: dataclasses.Field, hint: Any, doc: str, panel: str) -> inspect.Parameter:
    default, name, metavar = field.default, field.name, None
    no_default = default is None or default is False or default is dataclasses.MISSING
    shown = "" if no_default else f"  [{_text(default)}]"
    # `type | None` with default None means "not given": then the parameter file decides.
    optional = hint if type(None) in typing.get_args(hint) else hint | None
    if field.metadata.get("auto"):  # a number or the word auto
        shown, metavar = f"  [{AUTO}]", f"<{typing.get_args(hint)[0].__name__}>"
        optional = str | None
    if field.metadata.get("several"):  # the flag may be repeated
        optional, metavar = list[str] | None, "<str>"
    # A switch can only be turned on: all of them are off by default.
    names = [f"--{name.replace('_', '-')}"] if hint is bool else []
    text = (doc + shown).replace("[", r"\[")  # else rich would take it for a style
    option = typer.Option(
        *names, help=text, show_default=False, rich_help_panel=panel, metavar=metavar
    )
    return _parameter(name, Annotated[optional, option])


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _text(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(_text(item) for item in default)
    return f"{default:.4g}" if isinstance(default, float) else str(default)


@lru_cache
def field_docs(config: type) -> dict[str, str]:
    """The string below each field of a dataclass and of the dataclasses it extends."""
    docs = {}
    for part in filter(dataclasses.is_dataclass, reversed(config.__mro__)):
        for field, below in itertools.pairwise(_classes(inspect.getfile(part))[part.__name__].body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                text = ast.literal_eval(below.value)
                docs[field.target.id] = " ".join(text.split())  # type: ignore[union-attr]
    return docs


@lru_cache
def _classes(file: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
