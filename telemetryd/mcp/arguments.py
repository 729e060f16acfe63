"""Turns the arguments of a tool into a query string, and its parameters into a JSON Schema of arguments."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any, Final
from urllib.parse import urlencode

from telemetryd.errors import InvalidRequestError
from telemetryd.model.parameters import Parameter, refuse
from telemetryd.model.values import COMPONENT, shorten

_MOST_NAMED: Final = 5
"""Unknown arguments that an error names."""

Parameters = Sequence[Parameter[Any]]
Arguments = Mapping[str, Any]


def name_of(parameter: Parameter[Any]) -> str:
    """Return what a parameter is called as an argument: one that stands for many names is an object of them all."""
    return parameter.name if parameter.prefix is None else parameter.prefix.rstrip(".")


def schema(parameters: Parameters, required: Collection[str] = ()) -> dict[str, Any]:
    """Return the JSON Schema of a tool's arguments."""
    made: dict[str, Any] = {
        "type": "object",
        "properties": {name_of(each): _property(each) for each in parameters},
        "additionalProperties": False,
    }
    return {**made, "required": sorted(required)} if required else made


def _property(parameter: Parameter[Any]) -> dict[str, Any]:
    if parameter.prefix is None:
        return {**parameter.schema, "description": parameter.text}
    text = f"{parameter.text} Here NAME is a key of the object, without {parameter.prefix} before it."
    return {"type": "object", "additionalProperties": {"type": "string"}, "description": text}


def query_string(arguments: Arguments, parameters: Parameters) -> str:
    """Return arguments as the query string of the endpoint that has the same parameters; null stands for not given.

    Raises:
        InvalidRequestError: if one is unknown, or its value is no text, number or truth value.

    """
    known = {name_of(each): each for each in parameters}
    if unknown := [name for name in arguments if name not in known]:
        named = ", ".join(repr(shorten(name)) for name in islice(unknown, _MOST_NAMED))
        raise InvalidRequestError(f"Unknown argument {named}; known are: {', '.join(known) or 'none'}")
    pairs: list[tuple[str, str]] = []
    for name, value in arguments.items():
        if value is None:
            continue
        prefix = known[name].prefix
        if prefix is None:
            pairs.append((name, _text(name, value)))
        elif isinstance(value, dict):
            pairs += [(f"{prefix}{key}", _text(f"{name}.{shorten(key)}", each)) for key, each in value.items()]
        else:
            raise refuse(name, str(value), "an object of names and values")
    return urlencode(pairs)


def _text(name: str, value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():  # JSON Schema calls 20.0 an integer
        return str(int(value))
    if isinstance(value, int | float):
        return str(value)
    raise refuse(name, str(value), "one text; several values stand in it with commas between them")


def plain(made: Any) -> Any:
    """Return a JSON Schema in which what stands for a component of the OpenAPI document is that component itself.

    A component that only the document defines, such as a run, is any object. Titles, which only repeat names, are left
    out.
    """
    if isinstance(made, list):
        return [plain(each) for each in made]
    if not isinstance(made, dict):
        return made
    rest = {key: plain(value) for key, value in made.items() if key != COMPONENT and not _is_title(key, value)}
    stands_for = [definition or {"type": "object"} for definition in made.get(COMPONENT, {}).values()]
    return {**plain(dict(stands_for[0])), **rest} if stands_for else rest


def _is_title(key: str, value: object) -> bool:
    """Return whether a key of a schema is its title, and not the schema of a property that is called so."""
    return key == "title" and isinstance(value, str)
