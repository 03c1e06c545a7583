"""Define dataclass fields that are settings, with a help text, a group and a range, and check their values.

This module does not import torch, so that a configuration can be created and checked quickly.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

LARGEST_COUNT = 2**31 - 1  # the limit of whole numbers that have no limit of their own


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    default_factory: Callable[[], Any] = dataclasses.MISSING,
    group: str | None = None,
    least: float | None = None,
    most: float | None = None,
    may_be_empty: bool = False,
    **metadata: Any,
) -> Any:
    """Return a dataclass field that is also a flag of the command line and a key of the YAML file.

    group: heading in --help. least, most: smallest and largest value of a number, checked by `check_ranges`.
    may_be_empty: whether an empty string is accepted. metadata: further entries for `field.metadata`.
    """
    metadata |= {"help": help, "group": group, "least": least, "most": most, "may_be_empty": may_be_empty}
    return dataclasses.field(default=default, default_factory=default_factory, metadata=metadata)


def check_ranges(config: Any, prefix: str = "--") -> None:
    """Raise ValueError that names the first field, after `prefix`, whose value has another type than the field, is none
    of its Literal type's choices, or is outside the range of its `setting`."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint, name = getattr(config, field.name), hints[field.name], f"{prefix}{field.name}"
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (_has_type(value, hint) or (is_number and field.metadata.get("or_number"))):
            kinds = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal]
            choices = f"unknown; choose from {', '.join(get_args(kinds[0]))}" if kinds else None
            raise ValueError(f"{name} {value} is {choices or f'{type(value).__name__}, expected {_type_name(hint)}'}")
        for number in value if isinstance(value, list | tuple) else [value] if is_number else []:
            if field.metadata.get("least") is not None:
                check_range(name, number, field.metadata["least"], field.metadata["most"])


def _has_type(value: Any, hint: Any) -> bool:
    """Return whether `value` fits a type hint of a setting: int fits float, a path fits str, bool only fits bool."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list | tuple) and all(_has_type(each, get_args(hint)[0]) for each in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_has_type(each, get_args(hint)[1]) for each in value.values())
    if get_args(hint):
        return any(_has_type(value, kind) for kind in get_args(hint))
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, {float: int | float, str: str | os.PathLike}.get(hint, hint))


def _type_name(hint: Any) -> str:
    return str(hint).replace("<class '", "").replace("'>", "").replace(" | None", "")


def check_range(name: str, value: float | None, least: float, most: float | None = None) -> None:
    """Raise ValueError, which names the flag `name`, unless `value` is None or a finite number in [least, most].
    Without `most`, a float has no upper limit, and a whole number may be at most 2^31 - 1."""
    if value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} {value} must be a finite number")
    if value < least:
        raise ValueError(f"{name} {value} must be at least {least}")
    if most is None and isinstance(value, int):
        most = LARGEST_COUNT
    if most is not None and value > most:
        raise ValueError(f"{name} {value} must be at most {most}")


def number_or_auto(name: str, value: str | int) -> int | Literal["auto"]:
    """Return `value` as an integer of at least 1, or "auto". Raises ValueError, naming the flag `name`, otherwise."""
    if value == "auto":
        return "auto"
    try:
        number = int(str(value))  # 2.5 is not a number of things
    except ValueError:
        raise ValueError(f"{name} {value!r} must be a whole number or auto") from None
    check_range(name, number, 1)
    return number
