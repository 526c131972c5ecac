"""Flags made from settings: a command's flags are fields of its dataclass, their help its docs.

Help is written once, beside the field, and a flag cannot disagree with what it sets. Settings live
in modules without heavy imports, so that `--help` stays quick.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
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
        added = [_flag(name, hints[name], docs[name], defaults[name]) for name in fields]
        added += [_parameter("params", Params), _parameter("sets", Sets)]
        own = inspect.signature(command, eval_str=True)
        options = [p for p in own.parameters.values() if p.name not in ("flags", "params", "sets")]

        def run(**given: Any) -> None:
            flags = {name: given.pop(name) for name in fields}
            command(flags=flags, **given)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        signature = inspect.Signature([*added, *options])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return run

    return decorate


def _flag(name: str, hint: Any, doc: str, default: Any) -> inspect.Parameter:
    none = default is None or default is False or default is dataclasses.MISSING
    shown = "" if none else f"  [{_text(default)}]"
    # typer takes `type | None` with default None: not given, so that a parameter file may say.
    optional = hint if type(None) in typing.get_args(hint) else hint | None
    # A switch is only ever turned on: all of them are off by default.
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
    """The string below each field of a dataclass."""
    body = ast.parse(inspect.getsource(config)).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            text = ast.literal_eval(below.value)
            docs[field.target.id] = " ".join(text.split())  # type: ignore[union-attr]
    return docs
