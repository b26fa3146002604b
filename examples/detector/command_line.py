"""Command-line parser generated from dataclasses: a field is an option with its type, default and help text."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from .errors import UserError


class Parser(argparse.ArgumentParser):
    """Argument parser that raises its errors as `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help tells more)")


def parse(
    arguments: Sequence[str] | None, commands: Mapping[str, tuple[type, str]], program: str, description: str
) -> tuple[str, Any]:
    """Parse a command line, None for that of the process.

    `commands` maps the name of each command to the dataclass of its options and a text after its help. Return the
    name and an instance of the dataclass.
    """
    parser = Parser(prog=program, description=description)
    subparsers = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True, parser_class=Parser
    )
    for name, (kind, epilog) in commands.items():
        text = inspect.cleandoc(kind.__doc__ or "")
        subparser = subparsers.add_parser(
            name,
            help=text.splitlines()[0].rstrip("."),
            description=text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter if epilog else argparse.HelpFormatter,
        )
        _add_options(subparser, kind)
    values = vars(parser.parse_args(arguments))
    command = values.pop("command")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return command, commands[command][0](**values)


def _add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Add an option for each field, those of the base classes last."""
    types_of = typing.get_type_hints(kind)
    fields = sorted(dataclasses.fields(kind), key=lambda item: item.name not in kind.__annotations__)
    exclusive = None
    for item in fields:
        metadata, required = item.metadata, item.default is dataclasses.MISSING
        name = item.name if metadata.get("positional") else "--" + item.name.replace("_", "-")
        arguments = _type_arguments(types_of[item.name], metadata)
        arguments |= {"help": _help(item), "default": argparse.SUPPRESS}
        if "bare" in metadata:  # the value of an option without one
            arguments |= {"nargs": "?", "const": metadata["bare"]}
        if "metavar" in metadata:
            arguments["metavar"] = metadata["metavar"]
        if required and not metadata.get("positional"):
            arguments["required"] = True
        if metadata.get("exclusive"):
            exclusive = exclusive or parser.add_mutually_exclusive_group(required=True)
            exclusive.add_argument(name, **arguments)
        else:
            parser.add_argument(name, **arguments)


def _help(item: dataclasses.Field[Any]) -> str:
    text, default = str(item.metadata["help"]), item.default
    if default is dataclasses.MISSING or default is None or default is False or default == () or "default:" in text:
        return text
    return f"{text}; default: {' '.join(default) if isinstance(default, tuple) else default}"


def _type_arguments(kind: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `add_argument` that depend on the type of a field."""
    if isinstance(kind, types.UnionType):  # of something and None
        kind = typing.get_args(kind)[0]
    if kind is bool:
        return {"action": "store_true"}
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return {"choices": choices, "type": type(choices[0])}
    if "numbers" in metadata:
        return {"type": _numbers(metadata["numbers"]), "action": "append"}
    if typing.get_origin(kind) is tuple:
        item = _path if typing.get_args(kind)[0] is Path else str
        return {"type": item, "nargs": "+", "action": "extend"}
    if metadata["minimum"] is not None:
        return {"type": _bounded(kind, metadata["minimum"], metadata["maximum"])}
    return {"type": _path if kind is Path else kind}


def _bounded(kind: Callable[[str], float], minimum: float, maximum: float) -> Callable[[str], float]:
    noun = "a whole number" if kind is int else "a number"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"must be {noun} between {minimum} and {maximum}, got {text!r:.60}")
        return value

    return parse


def _numbers(count: int) -> Callable[[str], tuple[float, ...]]:
    def parse(text: str) -> tuple[float, ...]:
        try:
            values = tuple(float(part) for part in text.split(","))
        except ValueError:
            values = ()
        if len(values) != count or not all(map(math.isfinite, values)):
            raise argparse.ArgumentTypeError(f"must be {count} numbers with commas between them, got {text!r:.60}")
        return values

    return parse


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must name a file or folder, got nothing")
    return Path(text)
