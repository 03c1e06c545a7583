"""Build, read and verify manifest.json of a prepared folder: its settings, counts, and the sha256 of every file.

Writer and readers share this module, so it imports neither `datasets` nor torch.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.repocard import metadata_load

from gpt2modern.data.config import PrepareConfig
from gpt2modern.errors import GPT2ModernError, first_line
from gpt2modern.files import described, is_hub_name, public_name, sha256_of
from gpt2modern.hub import hub_errors, retried

FORMAT_VERSION = 3
CHOICES = {"dtype": ("uint16", "uint32"), "packing": ("concat", "best_fit")}
# Files of `tokenizer/` that are copied into a model's folder; any other could be mistaken for weights or code.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def local_folder(data_dir: str | Path) -> Path:
    """Return the path `data_dir`, or, if it is a Hub name (user/name) and no local folder, a downloaded copy.

    Downloads only the files that the dataset's manifest names. Raises GPT2ModernError if it cannot be downloaded from
    the Hub or has no valid manifest.
    """
    if not is_hub_name(data_dir):
        return Path(data_dir)
    fetch = functools.partial(retried, huggingface_hub.snapshot_download, str(data_dir), repo_type="dataset")
    advice = "prepare the data with prepare_data.py, or check the name and the network"
    with hub_errors(f"{data_dir}: no such folder, and it cannot be downloaded from the Hub", advice):
        folder = Path(fetch(revision=None, allow_patterns=["manifest.json"]))
        names = [path.relative_to(folder).as_posix() for path, _ in recorded_files(folder, read_manifest(folder))]
        # The folder of a snapshot is named after its commit: both calls have to take the same one.
        return Path(fetch(revision=folder.name, allow_patterns=["manifest.json", *names]))


def build_manifest(
    config: PrepareConfig, settings: dict, vocabulary: dict, rule: str, shards: list[dict], validation: dict
) -> dict:
    """Build the content of manifest.json. vocabulary: dtype, vocab_size and eos_token_id. rule: describes which
    documents are held out. shards, validation: the receipts (counts and file) of the written shards."""
    splits = {}
    for split, written in {"train": shards, "validation": [validation]}.items():
        summed = ("documents", "bytes", "tokens", "rows", "cut_documents")
        counts = {name: sum(each[name] for each in written) for name in summed}
        counts["padding"] = counts["rows"] * config.block_size - counts["tokens"]
        lengths = [sum(each) for each in zip(*(each["document_lengths"] for each in written), strict=True)]
        counts["document_lengths"] = {str(2**i): count for i, count in enumerate(lengths) if count}
        splits[split] = counts | {"shards": [each["shard"] for each in written]}
    folder = Path(config.output_dir)
    files = {each["shard"]["path"]: each["file"] for each in [*shards, validation]}
    others = [folder / "dataset_dict.json", *folder.glob("tokenizer/*")]
    others += [path for split in splits for path in folder.glob(f"{split}/*.json")]
    files |= {path.relative_to(folder).as_posix(): described(path) for path in others}
    manifest = {
        "format_version": FORMAT_VERSION,
        "block_size": config.block_size,
        **vocabulary,
        "packing": config.packing,
        "seed": config.shuffle_seed,
        "validation_rule": rule,
        "tokenizer": {
            "name": config.tokenizer_name and Path(config.tokenizer_name).name,
            "sha256": files["tokenizer/tokenizer.json"]["sha256"],
        },
        "source": {
            "name": (config.dataset_name and public_name(config.dataset_name))
            or [Path(name).name for name in config.train_file or []]
            or "dataset",
            **facts_of_card(config),
            "fingerprint": f"{sum(each['fingerprint'] for each in shards) % 2**64:016x}",
            "documents": sum(each["read_documents"] for each in shards),
            **{
                name: sum(each[name] for each in [*shards, validation])
                for name in ("empty_documents", "special_tokens")
            },
        },
        "settings": settings,
        "splits": splits,
        "files": dict(sorted(files.items())),
    }
    return manifest | {"checksum": checksum_of(manifest)}


def facts_of_card(config: PrepareConfig) -> dict[str, Any]:
    """Return {"card": language and licence}, as the card of a Hub dataset states them, or {} if it states none."""
    facts = {}
    with contextlib.suppress(Exception):  # of the network, the Hub or the YAML of others
        if is_hub_name(config.dataset_name):
            place = {"repo_type": "dataset", "revision": config.dataset_revision}
            facts = metadata_load(huggingface_hub.hf_hub_download(config.dataset_name, "README.md", **place)) or {}
    names = ("language", "license", "license_name", "license_link")
    return {"card": known} if (known := {name: facts[name] for name in names if facts.get(name)}) else {}


def read_manifest(data_dir: str | Path) -> dict:
    """Return the content of manifest.json of a prepared folder. Raises GPT2ModernError if the file is missing, has
    another format version, contradicts itself, or has a missing or mistyped value."""
    path = Path(data_dir) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"] if isinstance(manifest, dict) else None
        problem = _contradiction(manifest) if version == FORMAT_VERSION else None
    except OSError:
        raise GPT2ModernError(f"{path}: no such file; name a folder that prepare_data.py has written") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        problem = f"the file is not valid JSON ({error})"
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        problem = f"a value is missing or not of its type ({type(error).__name__}: {error})"
    else:
        if version != FORMAT_VERSION:
            problem = f"the file has format_version {version!r}, but this code reads only {FORMAT_VERSION}"
    if problem:
        raise GPT2ModernError(f"{path}: {problem}; prepare the data again")
    return manifest


def recorded_files(data_dir: Path, manifest: dict, splits: Iterable[str] | None = None) -> Iterator[tuple[Path, dict]]:
    """Yield the path and record ({size, sha256}) of each file of a prepared folder; with `splits`, only of the
    tokenizer and these splits."""
    for name, recorded in manifest["files"].items():
        if splits is None or Path(name).parts[0] in ("tokenizer", *splits):
            yield data_dir / name, recorded


def file_problem(path: Path, recorded: dict, *, checksum: bool) -> str | None:
    """Return a message that names the file and its problem, or None. Without `checksum`, only its size is checked."""
    try:
        size = path.stat().st_size
        if size != recorded["size"]:
            problem = f"the file has {size} bytes, but the manifest says {recorded['size']}"
        elif checksum and sha256_of(path) != recorded["sha256"]:
            problem = "the file was altered since it was written (its sha256 differs)"
        else:
            return None
    except (OSError, ValueError) as error:  # ValueError: no file can have this name
        problem = "the file is missing" if isinstance(error, FileNotFoundError) else first_line(error)
    return f"{path}: {problem}; prepare the data again"


def find_problems(data_dir: str | Path) -> list[str]:
    """Check the size and sha256 of every file of a prepared folder. Returns one message per file that is missing or
    altered (an empty list if the folder is valid), or a single message if the manifest cannot be read."""
    try:
        folder = local_folder(data_dir)
        manifest = read_manifest(folder)
    except GPT2ModernError as error:
        return [str(error)]
    problems = [file_problem(path, recorded, checksum=True) for path, recorded in recorded_files(folder, manifest)]
    if manifest.get("checksum", checksum_of(manifest)) != checksum_of(manifest):
        problems.append(f"{folder / 'manifest.json'} was altered since it was written; prepare the data again")
    return [problem for problem in problems if problem]


def checksum_of(manifest: dict) -> str:
    """Return the sha256, in hexadecimal, of a manifest without its own entry `checksum`."""
    content = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_tokenizer_files(data_dir: Path) -> dict[str, bytes]:
    """Return name and content of each tokenizer file. Raises GPT2ModernError for a link that leads out of the folder
    (or of its Hub cache), as its target would be copied into model folders, and so perhaps made public."""
    folder = data_dir.resolve()
    # The files of a snapshot in the Hub's cache are links to the folder `blobs` next to `snapshots`.
    roots = [folder, *([folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [])]
    paths = [path for name in TOKENIZER_FILES if (path := data_dir / "tokenizer" / name).is_file()]
    for path in paths:
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise GPT2ModernError(
                f"{path} is a link to a file outside of {data_dir}; replace the link by the file itself"
            )
    return {path.name: path.read_bytes() for path in paths}


def _contradiction(manifest: dict) -> str | None:
    """Return a message about values that contradict each other, or None. Raises KeyError, TypeError, AttributeError,
    ValueError or OverflowError if a value is missing or of another type."""
    for name, choices in CHOICES.items():
        if manifest[name] not in choices:
            return f"{name} is {manifest[name]!r}, but must be one of {', '.join(choices)}"
    block_size, vocab_size, eos_token_id = _integers(manifest, "block_size", "vocab_size", "eos_token_id")
    if block_size < 1 or not 0 <= eos_token_id < vocab_size:
        return f"block_size {block_size}, eos_token_id {eos_token_id} and vocab_size {vocab_size} contradict each other"
    _ = manifest["tokenizer"]["name"], manifest["tokenizer"]["sha256"], {**manifest.get("settings", {})}
    "".join(manifest["source"]["name"])  # a text or a list of texts
    for name, recorded in manifest["files"].items():
        _ = recorded["sha256"], recorded["size"]
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"the file {name!r} is outside of the folder"
    for split, counts in manifest["splits"].items():
        _integers(counts, "documents", "bytes", "cut_documents", "rows", "tokens", "padding")
        if unknown := {shard["path"] for shard in counts["shards"]} - set(manifest["files"]):
            return f"the file {min(unknown)!r} of the split {split} is not listed with its sha256"
        if counts["tokens"] and not 0 < counts["bytes"] < 2**63:
            return f"the split {split} has {counts['bytes']} bytes of text in {counts['tokens']} tokens"
        shards = [_integers(shard, "rows", "tokens") for shard in counts["shards"]]
        rows, tokens = (sum(shard[i] for shard in shards) for i in range(2))
        if (rows, tokens, rows * block_size - tokens) != (counts["rows"], counts["tokens"], counts["padding"]):
            return (
                f"the split {split} has {counts['rows']} rows, {counts['tokens']} tokens and {counts['padding']} "
                f"padding tokens, but its shards have {rows}, {tokens} and {rows * block_size - tokens}"
            )
    return None


def _integers(values: dict, *names: str) -> list[int]:
    """Return the values of these names. Raises TypeError for one that is not an integer, KeyError if it is missing."""
    for name in names:
        if type(values[name]) is not int:
            raise TypeError(f"{name} is {values[name]!r}, not an integer")
    return [values[name] for name in names]
