"""What comes from outside, declared once: its type, its range, and both in the words of a message.

Settings and protocols are dataclasses made by :data:`declared`, with fields of the types below. pydantic checks a value
wherever one is made, defaults and :func:`dataclasses.replace` included; :func:`build` turns its errors into sentences.
A setting of a method says by :func:`setting` what stands in docs/settings.md too.
Arguments of commands use the same types (``commands/arguments.py``).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import pydantic
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from nnunet_ssl.errors import UserError

T = TypeVar("T")

CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)
declared = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=CONFIG)

# Whole numbers end where every library still takes them.

Weight = Annotated[float, Field(ge=0, description="a number from 0")]
Positive = Annotated[float, Field(gt=0, description="a number above 0")]
Share = Annotated[float, Field(ge=0, le=1, description="a number from 0 to 1")]
Part = Annotated[float, Field(gt=0, le=1, description="a number above 0 and at most 1")]
Decay = Annotated[float, Field(ge=0, lt=1, description="a number from 0 and below 1")]
Percentage = Annotated[float, Field(gt=0, le=100, description="a number above 0 and at most 100")]
Angle = Annotated[float, Field(gt=0, le=180, description="a number above 0 and at most 180")]

Count = Annotated[int, Field(ge=1, lt=10**9, description="a whole number from 1 and below 1e9")]
Whole = Annotated[int, Field(ge=0, lt=10**9, description="a whole number from 0 and below 1e9")]
TwoOrMore = Annotated[int, Field(ge=2, lt=10**9, description="a whole number from 2 and below 1e9")]
Seed = Annotated[int, Field(ge=0, lt=2**32, description="a whole number from 0 and below 2^32")]
DatasetId = Annotated[int, Field(ge=1, le=999, description="a dataset id from 1 to 999")]

Text = Annotated[str, Field(pattern=r"\S", description="a text")]

Counts = Annotated[tuple[Count, ...], Field(description="a list of whole numbers from 1 and below 1e9")]
Decays = Annotated[tuple[Decay, ...], Field(description="a list of numbers from 0 and below 1")]


def setting(default: Any, meaning: str, *, symbol: str = "", paper: Any = None) -> Any:
    """The default of a setting, and what docs/settings.md says of it: the page's tables are made from this.

    Args:
        default: the value that trains where no file says otherwise.
        meaning: one line of Markdown.
        symbol: what the paper calls it.
        paper: the paper's own value, where it is another one than the default.
    """
    return Field(default=default, json_schema_extra={"meaning": meaning, "symbol": symbol, "paper": paper})


def about(field: FieldInfo) -> dict[str, Any]:
    """What :func:`setting` was told: ``meaning``, ``symbol`` and ``paper``; nothing of a field made without it."""
    told = field.json_schema_extra
    return told if isinstance(told, dict) else {}


def papers_values(cls: type) -> dict[str, Any]:
    """The papers' own values of a declared class, of the fields where they are not the default."""
    return {
        name: told["paper"] for name, field in fields_of(cls).items() if (told := about(field)).get("paper") is not None
    }


def must_be(field: FieldInfo) -> str:
    """What the value of a field must be."""
    return field.description or words(field.annotation)


def words(kind: Any) -> str:
    """What a value of this type must be: its description, or what the type says itself."""
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        return next((field.description for field in more if isinstance(field, FieldInfo)), None) or words(kind)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if type(None) in get_args(kind):
        return f"{words(get_args(kind)[0])}, or null"
    return {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}.get(kind, "an object")


def fields_of(cls: type) -> dict[str, FieldInfo]:
    """The declared fields of ``cls`` by name.

    Raises:
        TypeError: ``cls`` was not made by :data:`declared`, so nothing would check it.
    """
    if "__pydantic_fields__" not in vars(cls):
        raise TypeError(f"{cls.__name__} needs the decorator nnunet_ssl.declared.declared in place of dataclass")
    return cls.__pydantic_fields__


def build(cls: type[T], given: object, source: str, what: str) -> T:
    """An instance of a declared class, from what was read of a JSON file.

    Args:
        cls: made by :data:`declared`.
        given: the object that was read.
        source: file, and place in it, for messages.
        what: what an unknown name is not, for instance ``"a setting of this trainer"``.

    Raises:
        UserError: ``given`` is no object, or a field is unknown, missing, or not what it must be.
    """
    fields_of(cls)
    if not isinstance(given, Mapping):
        raise UserError(f"{source} holds {shown(given)}; write a JSON object.")
    given = {str(name): value for name, value in given.items()}
    try:  # as JSON, whose lists may become tuples and whose objects classes, strict as everything else is
        return TypeAdapter(cls).validate_json(json.dumps(given, default=repr))
    except ValidationError as error:
        raise _refusal(cls, given, source, what, error) from None
    except RecursionError as error:  # json.dumps may give up earlier than what has read the file
        raise UserError(f"{source} cannot be read ({error}); write plain names and values.") from None


def shown(value: object) -> str:
    """``value`` as Python writes it, shortened: a number of 4,000 digits is no message."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    short.maxlist = short.maxdict = 20
    return short.repr(value)


def _refusal(cls: type, given: Any, source: str, what: str, error: ValidationError) -> UserError:
    """The first error as a sentence, with the way to it through lists and nested objects."""
    first = error.errors(include_url=False)[0]
    steps = list(first["loc"])
    while steps:
        name = steps.pop(0)
        fields = fields_of(cls)
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            remedy = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(fields)}."
            return UserError(f"{source} sets '{name}', which is not {what}; {remedy}")
        if first["type"] == "missing" and not steps:
            return UserError(f"{source} lacks '{name}'; give {must_be(fields[name])}.")
        inner, place = _declared_in(fields[name].annotation), name
        item = value = given.get(name, fields[name].default)
        if inner and steps and isinstance(steps[0], int):
            place, item = f"{name}[{steps[0]}]", value[steps.pop(0)]
        if inner is None or not isinstance(item, Mapping):
            return UserError(f"{source} sets '{name}' to {shown(value)}; it must be {must_be(fields[name])}.")
        cls, given, source = inner, item, f"{source.removesuffix(',')}, {place},"
    reason = first["ctx"]["error"]
    if first["type"] == "json_invalid":  # nested deeper than pydantic goes, or text that is no Unicode
        return UserError(f"{source} cannot be read ({reason}); write plain names and values.")
    return UserError(f"{source} {reason}.")  # of a check across fields


def _declared_in(annotation: Any) -> type | None:
    """The declared class that a field's type is made of: itself, a list of it, or it or None."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation
    return next(filter(None, map(_declared_in, get_args(annotation))), None)
