"""Command lines: typed arguments from a dataclass and a YAML recipe, errors in one line, exit codes.

The fields are made by `gpt2modern.settings.setting`. A YAML file given with `--config` is read before the command
line, which wins. A mistake of the user is one line on stderr, `error: ...`, that names the flag, file or value and the
way out, and exit code 2; a traceback is a defect of ours.
"""

import argparse
import contextlib
import dataclasses
import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import yaml
from transformers.hf_argparser import HfArgumentParser

from gpt2modern.errors import GPT2ModernError

Arguments = TypeVar("Arguments")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line and exit code 2 for a GPT2ModernError, 130 for Ctrl-C."""
    try:
        yield
    except GPT2ModernError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults, keep the line breaks of the description."""


class _Parser(HfArgumentParser):
    """HfArgumentParser with groups, without abbreviations, whose errors are GPT2ModernErrors."""

    def __init__(self, arguments: type, **kwargs):
        self.groups: dict[str, argparse._ArgumentGroup] = {}
        super().__init__(arguments, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def add_argument(self, *flags, **metadata):
        """Add one flag; its keywords are those of argparse among the field's metadata."""
        known = {
            "help",
            "type",
            "default",
            "required",
            "nargs",
            "choices",
            "action",
            "const",
            "dest",
            "metavar",
            "version",
        }
        keywords = {name: value for name, value in metadata.items() if name in known}
        place = super()
        if metadata.get("group"):
            title = metadata["group"]
            place = self.groups[title] = self.groups.get(title) or self.add_argument_group(title)
        # HfArgumentParser adds a hyphenated twin to every flag, which doubles each line of --help and of an error.
        action = place.add_argument(*(flag for flag in flags if "-" not in flag[2:]), **keywords)
        action.may_be_empty = metadata.get("may_be_empty", False)
        return action

    def takes_a_list(self, flag: str) -> bool:
        return self._option_string_actions[flag].nargs == "+"

    def has_choice(self, flag: str, choice: str) -> bool:
        return choice in (self._option_string_actions[flag].choices or ())

    def error(self, message: str) -> NoReturn:
        raise GPT2ModernError(f"{message} (--help lists every flag)")

    def parse_strict(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse as `parse_args` does; the error for an unknown flag names the nearest known one."""
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
    """Return ' (did you mean X?)' for the closest of `known`, or `otherwise` where none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else otherwise


def parse_arguments(
    arguments: type[Arguments], argv: Sequence[str] | None = None, description: str | None = None
) -> Arguments:
    """Parse `argv` (default: the process's own) into the dataclass `arguments`.

    If the dataclass has a field `config`, its value names a YAML file of defaults with the same keys as the flags, or
    one of the recipes that are installed with this project. YAML values go through the same parser as flags do, so
    both are typed and checked alike. Raises GPT2ModernError for an unknown or mistyped flag or key, and for whatever
    the dataclass's `__post_init__` refuses with ValueError.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(arguments, description=description)
    namespace = parser.parse_strict(argv)
    if getattr(namespace, "config", None):
        namespace = parser.parse_strict(_yaml_as_flags(parser, arguments, find_recipe(namespace.config)) + argv)
    try:
        return arguments(**vars(namespace))
    except ValueError as error:
        raise GPT2ModernError(str(error)) from None


def find_recipe(name: str) -> Path:
    """Return the YAML file `name`, or, if there is none and it is a bare word, the shipped recipe of that name.

    Raises GPT2ModernError, listing the shipped ones, for a bare word that is neither.
    """
    path = Path(name)
    if os.path.lexists(path) or path.suffix or len(path.parts) != 1:
        return path
    installed = Path(__file__).parent / "recipes"
    folder = installed if installed.is_dir() else Path(__file__).parents[1] / "recipes"
    recipes = {recipe.stem: recipe for recipe in sorted(folder.glob("*.yaml"))}
    if name not in recipes:
        raise GPT2ModernError(f"--config {name}: no such file, and no shipped recipe; there are {', '.join(recipes)}")
    return recipes[name]


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a second value for a key, of which YAML loaders silently take the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value]
        repeated = [key for position, key in enumerate(keys) if key in keys[:position]]
        if repeated:
            raise GPT2ModernError(f"{repeated[0]!r} is given twice; keep one")
        return super().construct_mapping(node, deep)


def _yaml_as_flags(parser: _Parser, arguments: type, path: Path) -> list[str]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except GPT2ModernError as error:
        raise GPT2ModernError(f"--config {path}: {error}") from None
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
