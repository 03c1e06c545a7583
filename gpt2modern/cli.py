"""The contract of every command of this project with the person who types it.

Arguments are the fields of a dataclass; a YAML file given with `--config` comes before the command line, which wins.
A user's mistake gets one line on stderr, `error: ...`, that names the flag, file or value and the way out, and exit
code 2; a traceback means a defect of ours.
"""

import argparse
import dataclasses
import difflib
import functools
import math
import os
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

from transformers.hf_argparser import HfArgumentParser

from gpt2modern.errors import GPT2ModernError

Arguments = TypeVar("Arguments")


def exit_code_2_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate an entry point: GPT2ModernError and Ctrl-C end the process with one line instead of a traceback."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except GPT2ModernError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapped


def check_range(name: str, value: float | None, least: float, most: float | None = None) -> None:
    """Raise ValueError unless `value` is None or a finite number in [least, most]; counts end at 2^31 - 1 anyway."""
    if value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} {value} must be a finite number")
    if value < least:
        raise ValueError(f"{name} {value} must be at least {least}")
    if most is None and isinstance(value, int):
        most = 2**31 - 1
    if most is not None and value > most:
        raise ValueError(f"{name} {value} must be at most {most}")


def check_writable_folder(flag: str, path: str | None) -> None:
    """Raise ValueError, before any work is done, unless `path` is None, a folder, or can become one. Makes nothing."""
    if path is not None:
        _check_writable(f"{flag} {path}", Path(os.path.abspath(path)))


def _check_writable(given: str, place: Path) -> None:
    try:
        while not _exists(place):
            place = place.parent
        if not stat.S_ISDIR(place.stat().st_mode):
            raise ValueError(f"{given}: {place} is a file, not a folder; name another place")
    except OSError as error:
        raise ValueError(f"{given}: {error.strerror}; name another place") from None
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{given}: {place} is not a folder that you may write to; name another place")


def _exists(path: Path) -> bool:
    """As os.path.lexists, which also says no where the name is too long or symbolic links go round."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_writable_file(flag: str, path: str | None) -> None:
    """Raise ValueError, before any work is done, unless `path` is None or a file can stand there. Makes nothing."""
    if path is None:
        return
    if os.path.isdir(path):
        raise ValueError(f"{flag} {path}: is a folder; name a file in it")
    _check_writable(f"{flag} {path}", Path(os.path.abspath(path)).parent)


def number_or_auto(name: str, value: str | int) -> int | Literal["auto"]:
    """A whole number from 1 on, or the word auto; raises ValueError for anything else."""
    if value == "auto":
        return "auto"
    try:
        number = int(value)
    except ValueError:
        raise ValueError(f"{name} {value!r} is neither a number nor auto") from None
    check_range(name, number, 1)
    return number


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults, keep the line breaks of the description."""


class _Parser(HfArgumentParser):
    """HfArgumentParser that raises GPT2ModernError instead of printing its usage, and never guesses abbreviations."""

    def __init__(self, arguments: type, **kwargs):
        super().__init__(arguments, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def add_argument(self, *flags, may_be_empty: bool = False, **kwargs):
        """may_be_empty: from the field's metadata; whether an empty text means something for this flag."""
        # HfArgumentParser adds a hyphenated twin to every flag, which doubles each line of --help and of an error.
        action = super().add_argument(*(flag for flag in flags if "-" not in flag[2:]), **kwargs)
        action.may_be_empty = may_be_empty
        return action

    def takes_a_list(self, flag: str) -> bool:
        return self._option_string_actions[flag].nargs == "+"

    def has_choice(self, flag: str, choice: str) -> bool:
        return choice in (self._option_string_actions[flag].choices or ())

    def error(self, message: str) -> NoReturn:
        raise GPT2ModernError(f"{message} (--help lists every flag)")

    def parse_strict(self, argv: Sequence[str]):
        """Like `parse_args`, but an unknown flag is answered with the nearest known one."""
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].split("=")[0]
            raise GPT2ModernError(f"unknown argument {flag!r}{nearest(flag, self._option_string_actions)}")
        for name, value in vars(namespace).items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    self._check_text(f"--{name}", text)
        return namespace

    def _check_text(self, flag: str, text: str) -> None:
        if not text.strip() and not self._option_string_actions[flag].may_be_empty:
            raise GPT2ModernError(f"{flag} {text!r} is empty; give it a value, or leave the flag out")
        if "\0" in text or (not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)):
            raise GPT2ModernError(f"{flag} {text!r} has bytes that are not text (UTF-8)")


def nearest(name: str, known: Sequence[str], otherwise: str = " (--help lists every flag)") -> str:
    """' (did you mean X?)' for the closest of `known`, or `otherwise`, the way to the full list."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else otherwise


def parse_arguments(
    arguments: type[Arguments], argv: Sequence[str] | None = None, description: str | None = None
) -> Arguments:
    """Parse `argv` (default: the process's own) into the dataclass `arguments`.

    If the dataclass has a field `config`, its value names a YAML file of defaults with the same keys as the flags.
    YAML values go through the same parser as flags do, so both are typed and checked alike.
    Raises GPT2ModernError for an unknown or mistyped flag or key, and for whatever the dataclass's `__post_init__` refuses
    with ValueError.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(arguments, description=description)
    namespace = parser.parse_strict(argv)
    if getattr(namespace, "config", None):
        namespace = parser.parse_strict(_yaml_as_flags(parser, arguments, Path(namespace.config)) + argv)
    try:
        return arguments(**vars(namespace))
    except ValueError as error:
        raise GPT2ModernError(str(error)) from None


def _yaml_as_flags(parser: _Parser, arguments: type, path: Path) -> list[str]:
    import yaml

    class UniqueKeys(yaml.SafeLoader):
        """A second value for a key is a slip of the pen; YAML loaders silently take the last."""

        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key) for key, _ in node.value]
            repeated = [key for position, key in enumerate(keys) if key in keys[:position]]
            if repeated:
                raise GPT2ModernError(f"--config {path}: {repeated[0]!r} is given twice; keep one")
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
    except OSError as error:
        raise GPT2ModernError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GPT2ModernError(f"--config {path}: not valid YAML: {error}") from None
    except RecursionError:
        raise GPT2ModernError(f"--config {path}: nested too deeply; expected 'flag: value' lines") from None
    if not isinstance(values, dict):
        raise GPT2ModernError(f"--config {path}: expected 'flag: value' lines, found {type(values).__name__}")

    known = [field.name for field in dataclasses.fields(arguments) if field.name != "config"]
    flags: list[str] = []
    for key, value in values.items():
        if key not in known:
            raise GPT2ModernError(f"--config {path}: unknown key {key!r}{nearest(str(key), known)}")
        if value is False and parser.has_choice(f"--{key}", "no"):
            value = "no"  # YAML 1.1 reads a bare no as false
        is_list = parser.takes_a_list(f"--{key}")
        each = value if is_list and isinstance(value, list) else [value]
        if not each or any(one is None or isinstance(one, dict | list) for one in each):
            raise GPT2ModernError(f"--config {path}: {key}: expected a value, found {value!r}")
        # `flag=value` keeps a negative number or a leading dash from being read as a flag.
        flag = [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
        try:
            parser.parse_strict(flag)
        except GPT2ModernError as error:
            raise GPT2ModernError(f"--config {path}: {error}") from None
        flags += flag
    return flags
