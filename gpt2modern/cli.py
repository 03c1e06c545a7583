"""Parse command lines and YAML recipes into dataclasses, and report errors in one line.

The dataclass fields are made by `gpt2modern.settings.setting`. Flags override values of the YAML file given with
`--config`. For a mistake of the user, one line `error: ...` on stderr names the flag, file or value and how to fix it,
and the exit code is 2. A traceback is a bug of this project.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import yaml
from transformers.hf_argparser import HfArgumentParser

from gpt2modern.errors import GPT2ModernError

Arguments = TypeVar("Arguments")
MOST_CHARACTERS = 1000  # of an error, which may quote a value of any length, before its last 200


class _Output(io.FileIO):
    """Write to an open file as far as it takes the bytes: a full disk, a closed pipe or terminal is no error."""

    def write(self, content: bytes) -> int:
        try:
            return super().write(content) or len(content)
        except OSError:
            return len(content)


def never_fail_to_print() -> None:
    """Let the program, and Python at its exit, continue where stdout or stderr cannot be written; the text is lost."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or type(stream) is io.TextIOWrapper:  # not what a test or a notebook has put there
            output = io.BufferedWriter(_Output(os.devnull if stream is None else os.dup(stream.fileno()), "w"))
            encoding = "utf-8" if stream is None else stream.encoding
            setattr(sys, name, io.TextIOWrapper(output, encoding, "backslashreplace", line_buffering=True))


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a GPT2ModernError (exit code 2) or Ctrl-C (130) of the `with` block into one printed line and an exit.
    From then on, output that cannot be printed is lost and no error."""
    never_fail_to_print()
    try:
        yield
    except GPT2ModernError as error:
        line = " ".join(str(error).split())
        line = line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]} ... {line[-200:]}"
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:  # also of Path.exists, until Python 3.12
        if error.errno not in (errno.EACCES, errno.ENAMETOOLONG):
            raise
        print(f"error: {error.filename!s:.200} cannot be used ({error.strerror}); choose another path", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("error: interrupted by the user (Ctrl-C)", file=sys.stderr)
        raise SystemExit(130) from None


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Format --help with the default of each flag and with the line breaks of the description."""


class _Parser(HfArgumentParser):
    """Parse flags as HfArgumentParser does, but raise GPT2ModernError for errors, accept no abbreviated flags, and
    show the flags in groups."""

    def __init__(self, arguments: type, **kwargs):
        self.groups: dict[str, argparse._ArgumentGroup] = {}
        super().__init__(arguments, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def add_argument(self, *flags, **metadata):
        """Add one flag to its group. Of the field's metadata, only what argparse knows is passed to argparse."""
        known = ("help", "type", "default", "required", "nargs", "choices", "action", "const", "dest", "metavar")
        keywords = {name: value for name, value in metadata.items() if name in known}
        place = super()
        if metadata.get("group"):
            title = metadata["group"]
            place = self.groups[title] = self.groups.get(title) or self.add_argument_group(title)
        # HfArgumentParser adds a second, hyphenated name to every flag, which doubles each line of --help and errors.
        action = place.add_argument(*(flag for flag in flags if "-" not in flag[2:]), **keywords)
        action.may_be_empty = metadata.get("may_be_empty", False)
        return action

    def takes_a_list(self, flag: str) -> bool:
        return self._option_string_actions[flag].nargs == "+"

    def error(self, message: str) -> NoReturn:
        raise GPT2ModernError(f"{message} (--help lists every flag)")

    def parse_strict(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `argv` as `parse_args` does. Raises GPT2ModernError, with the closest flag, for an unknown flag."""
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
            raise GPT2ModernError(f"{flag} {text!r} is empty; give it a value or omit the flag")
        if "\0" in text or (not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)):
            raise GPT2ModernError(f"{flag} {text!r} contains bytes that are not valid UTF-8 text; type it in UTF-8")


def nearest(name: str, known: Sequence[str], otherwise: str = " (--help lists every flag)") -> str:
    """Return " (did you mean X?)" with the entry of `known` closest to `name`, or `otherwise` if none is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else otherwise


def parse_arguments(
    arguments: type[Arguments],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    derive: Callable[[argparse.Namespace, list[str]], list[str]] | None = None,
) -> Arguments:
    """Parse `argv` (default: that of the process) into the dataclass `arguments`.

    If the dataclass has a field `config`, its value names a YAML file of defaults with the same keys as the flags, or a
    recipe that is installed with this project. YAML values are parsed and checked in the same way as flags. derive: is
    called with the settings and the flags they come from, and returns further flags, which these override. Raises
    GPT2ModernError for an unknown flag or key, a wrong value, and a ValueError of the dataclass's `__post_init__`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(arguments, description=description)
    namespace = parser.parse_strict(argv)
    if getattr(namespace, "config", None):
        argv = _yaml_as_flags(parser, arguments, find_recipe(namespace.config)) + argv
        namespace = parser.parse_strict(argv)
    if derive is not None:
        namespace = parser.parse_strict(derive(namespace, argv) + argv)
    try:
        return arguments(**vars(namespace))
    except ValueError as error:
        raise GPT2ModernError(str(error)) from None


def find_recipe(name: str) -> Path:
    """Return the path of the YAML file `name`, or of the installed recipe `name` if it has no suffix and no folder.

    Raises GPT2ModernError, which lists the recipes, if a name without suffix and folder is neither.
    """
    path = Path(name)
    if (os.path.lexists(path) and not path.is_dir()) or path.suffix or len(path.parts) != 1:
        return path
    installed = Path(__file__).parent / "recipes"
    folder = installed if installed.is_dir() else Path(__file__).parents[1] / "recipes"
    recipes = {recipe.stem: recipe for recipe in sorted(folder.glob("*.yaml"))}
    if name not in recipes and path.exists():
        return path
    if name not in recipes:
        raise GPT2ModernError(f"--config {name}: no such file or recipe; the recipes are {', '.join(recipes)}")
    return recipes[name]


class _UniqueKeys(yaml.SafeLoader):
    """Load YAML with values as text, to be parsed like flags: `1.10`, `no` and `2024-01-31` stay as they are typed.
    Raises GPT2ModernError for a repeated key, of which other loaders silently use the last value."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value]
        repeated = [key for position, key in enumerate(keys) if key in keys[:position]]
        if repeated:
            raise GPT2ModernError(f"the key {repeated[0]!r} is given twice; keep only one of them")
        return super().construct_mapping(node, deep)


def _yaml_as_flags(parser: _Parser, arguments: type, path: Path) -> list[str]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except GPT2ModernError as error:
        raise GPT2ModernError(f"--config {path}: {error}") from None
    except OSError as error:
        raise GPT2ModernError(f"--config {path} cannot be read ({error.strerror}); name a YAML file") from None
    except RecursionError:
        raise GPT2ModernError(f"--config {path} is nested too deeply; write one 'flag: value' per line") from None
    except Exception as error:  # yaml also lets out ValueError, KeyError, IndexError, ... of a value with a wrong tag
        raise GPT2ModernError(f"--config {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        found = type(values).__name__
        raise GPT2ModernError(f"--config {path} must have 'flag: value' lines, but its content is of type {found}")

    known = [field.name for field in dataclasses.fields(arguments) if field.name != "config"]
    flags: list[str] = []
    for key, value in values.items():
        if key not in known:
            raise GPT2ModernError(f"--config {path}: unknown key {key!r}{nearest(str(key), known)}")
        is_list = parser.takes_a_list(f"--{key}")
        each = value if is_list and isinstance(value, list) else [value]
        if not each or any(one is None or isinstance(one, dict | list) for one in each):
            wanted = "a value or a list of values" if is_list else "one value"
            raise GPT2ModernError(f"--config {path}: the key {key!r} is {value!r}; give {wanted}, or remove it")
        # `flag=value` keeps a negative number or a leading dash from being read as a flag.
        flag = [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
        try:
            parser.parse_strict(flag)
        except GPT2ModernError as error:
            raise GPT2ModernError(f"--config {path}: {error}") from None
        flags += flag
    return flags
