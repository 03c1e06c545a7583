"""Define dataclass fields that are settings, with a help text, a group and a range, and check their values.

This module does not import torch, so that a configuration can be created and checked quickly.
"""

import dataclasses
import math
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


def check_ranges(config: Any) -> None:
    """Raise ValueError for the first field of the dataclass `config` whose value is not one of the choices of its
    Literal type or is outside the range given to `setting`. The message names the flag."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kinds = [kind for kind in (hints[field.name], *get_args(hints[field.name])) if get_origin(kind) is Literal]
        if kinds and value is not None and value not in get_args(kinds[0]):
            raise ValueError(f"--{field.name} {value} is unknown; choose from {', '.join(get_args(kinds[0]))}")
        if field.metadata.get("least") is not None and not isinstance(value, str):  # "auto"
            check_range(f"--{field.name}", value, field.metadata["least"], field.metadata["most"])


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
        number = int(value)
    except ValueError:
        raise ValueError(f"{name} {value!r} must be a whole number or auto") from None
    check_range(name, number, 1)
    return number
