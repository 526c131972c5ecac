"""Flags generated from settings: a command's flags are fields of its dataclass.

A flag's help is the string below the field, so it is written once, and a flag cannot disagree with
what it sets. Settings are declared in modules without heavy imports, so that `--help` stays fast.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any

import typer

Params = Annotated[
    str | None,
    typer.Option(help="A YAML file of settings; none is read otherwise.", show_default=False),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting, as key=value; may be repeated.", show_default=False),
]


def settings_command(
    config: type, fields: tuple[str, ...]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the `fields` of dataclass `config` as flags, --params and --set.

    The command is called with `flags` (name -> value or None), `params`, `sets`, and its own
    keyword-only options.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(config)
        docs = field_docs(config)
        defaults = {f.name: f.default for f in dataclasses.fields(config)}
        from_fields = [_flag(name, hints[name], docs[name], defaults[name]) for name in fields]
        from_fields += [_parameter("params", Params), _parameter("sets", Sets)]
        signature = inspect.signature(command, eval_str=True)
        passed = ("flags", "params", "sets")
        options = [p for p in signature.parameters.values() if p.name not in passed]

        def run(**arguments: Any) -> None:
            flags = {name: arguments.pop(name) for name in fields}
            command(flags=flags, **arguments)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        signature = inspect.Signature([*from_fields, *options])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return run

    return decorate


def plain_fields(config: type) -> tuple[str, ...]:
    """The fields of a dataclass that can be flags: all but dictionaries."""
    hints = typing.get_type_hints(config)
    names = [field.name for field in dataclasses.fields(config)]
    return tuple(name for name in names if typing.get_origin(hints[name]) is not dict)


def _flag(name: str, hint: Any, doc: str, default: Any) -> inspect.Parameter:
    no_default = default is None or default is False or default is dataclasses.MISSING
    shown = "" if no_default else f"  [{_text(default)}]"
    # `type | None` with default None means "not given": then the parameter file decides.
    optional = hint if type(None) in typing.get_args(hint) else hint | None
    # A switch can only be turned on: all of them are off by default.
    names = [f"--{name.replace('_', '-')}"] if hint is bool else []
    option = typer.Option(*names, help=doc + shown, show_default=False)
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
        body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0].body  # type: ignore[attr-defined]
        for field, below in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                text = ast.literal_eval(below.value)
                docs[field.target.id] = " ".join(text.split())  # type: ignore[union-attr]
    return docs
