"""Build, read and verify manifest.json of a prepared folder: its settings, counts, and the sha256 of every file.

It is what the writer and the readers share, so it imports neither `datasets` nor torch.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import huggingface_hub

from gpt2modern.data.config import PrepareConfig
from gpt2modern.errors import GPT2ModernError, first_line
from gpt2modern.files import is_hub_name, sha256_of

FORMAT_VERSION = 2
CHOICES = {"dtype": ("uint16", "uint32"), "packing": ("concat", "best_fit")}
# What of `tokenizer/` goes into a model's folder: nothing else there could be taken for weights or code of the model.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def local_folder(data_dir: str | Path) -> Path:
    """Return `data_dir` itself, or, if it is no folder here but reads user/name, the copy of that dataset of the Hub.

    Of the repository only what its manifest names is fetched, and nothing if it has no manifest of this format.
    Raises GPT2ModernError where the Hub does not give it.
    """
    if not is_hub_name(data_dir):
        return Path(data_dir)
    fetch = functools.partial(huggingface_hub.snapshot_download, str(data_dir), repo_type="dataset")
    try:
        folder = Path(fetch(revision=None, allow_patterns=["manifest.json"]))
        names = [path.relative_to(folder).as_posix() for path, _ in recorded_files(folder, read_manifest(folder))]
        # The folder of a snapshot is named after its commit: both calls have to take the same one.
        return Path(fetch(revision=folder.name, allow_patterns=["manifest.json", "tokenizer/*", *names]))
    except GPT2ModernError:
        raise
    except Exception as error:  # the network, the Hub, the disk: none of it is a defect of ours
        raise GPT2ModernError(
            f"{data_dir}: no such folder, and no dataset that the Hub gives ({first_line(error)}); prepare the data, or "
            "check the name and the network"
        ) from None


def build_manifest(
    config: PrepareConfig, settings: dict, vocabulary: dict, rule: str, shards: list[dict], validation: dict
) -> dict:
    """Sum up what was written. vocabulary: dtype, vocab_size and eos_token_id; rule: what is held out; shards,
    validation: what was counted while the training shards and the one of validation were written."""
    splits = {}
    for split, written in {"train": shards, "validation": [validation]}.items():
        summed = ("documents", "bytes", "tokens", "rows", "cut_documents")
        counts = {name: sum(each[name] for each in written) for name in summed}
        counts["padding"] = counts["rows"] * config.block_size - counts["tokens"]
        lengths = [sum(each) for each in zip(*(each["document_lengths"] for each in written), strict=True)]
        counts["document_lengths"] = {str(2**i): count for i, count in enumerate(lengths) if count}
        splits[split] = counts | {"shards": [each["shard"] for each in written]}
    folder = Path(config.output_dir) / "tokenizer"
    files = {p.name: {"size": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(folder.iterdir())}
    manifest = {
        "format_version": FORMAT_VERSION,
        "block_size": config.block_size,
        **vocabulary,
        "packing": config.packing,
        "seed": config.shuffle_seed,
        "validation_rule": rule,
        "tokenizer": {
            "name": config.tokenizer_name and Path(config.tokenizer_name).name,
            "sha256": files["tokenizer.json"]["sha256"],
            "files": files,
        },
        "source": {
            "name": config.dataset_name or [Path(name).name for name in config.train_file or []] or "dataset",
            "fingerprint": f"{sum(each['fingerprint'] for each in shards) % 2**64:016x}",
            "documents": sum(each["read_documents"] for each in shards),
            "empty_documents": sum(each["empty_documents"] for each in [*shards, validation]),
        },
        "settings": settings,
        "splits": splits,
    }
    return manifest | {"checksum": checksum_of(manifest)}


def read_manifest(data_dir: str | Path) -> dict:
    """Read manifest.json of a prepared folder; GPT2ModernError if there is none, it is of another format, or it
    contradicts itself."""
    path = Path(data_dir) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"] if isinstance(manifest, dict) else None
        problem = _contradiction(manifest) if version == FORMAT_VERSION else None
    except OSError:
        raise GPT2ModernError(f"{path}: no such file; prepare_data.py makes folders that have one") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        problem = f"not JSON ({error})"
    except KeyError as error:
        problem = f"has no {error.args[0]}"
    except (TypeError, AttributeError, ValueError, OverflowError) as error:
        problem = f"a value is not of its type ({error})"
    else:
        if version != FORMAT_VERSION:
            problem = f"format_version {version!r}, this code reads {FORMAT_VERSION}"
    if problem:
        raise GPT2ModernError(f"{path}: {problem}; prepare the data again")
    return manifest


def recorded_files(data_dir: Path, manifest: dict, splits: Iterable[str] | None = None) -> Iterator[tuple[Path, dict]]:
    """List the files of the tokenizer and of the splits (None: of all) with what is recorded of each: {size, sha256}.

    Of a tokenizer without a list of files, tokenizer.json, whose checksum is its name in training and evaluation.
    """
    named = {"tokenizer.json": {"sha256": manifest["tokenizer"]["sha256"]}}
    for name, recorded in manifest["tokenizer"].get("files", named).items():
        yield data_dir / "tokenizer" / name, recorded
    for split in manifest["splits"] if splits is None else splits:
        for shard in manifest["splits"][split]["shards"]:
            for name, recorded in shard["files"].items():
                yield data_dir / shard["path"] / name, recorded


def file_problem(path: Path, recorded: dict, *, checksum: bool) -> str | None:
    """Say in one line what is wrong with a file; None if nothing is. Without `checksum` its bytes are not read."""
    try:
        size = path.stat().st_size
        if size != recorded.get("size", size):
            problem = f"has {size} bytes, the manifest says {recorded['size']}"
        elif checksum and sha256_of(path) != recorded["sha256"]:
            problem = "altered since it was written (sha256 differs)"
        else:
            return None
    except (OSError, ValueError) as error:  # ValueError for what no file can be called
        problem = "missing" if isinstance(error, FileNotFoundError) else first_line(error)
    return f"{path}: {problem}; prepare the data again"


def find_problems(data_dir: str | Path) -> list[str]:
    """Read every byte of a prepared folder; one line for each file that is missing, cut or altered, none if it is
    whole. A folder whose manifest cannot be read has that one problem."""
    try:
        folder = local_folder(data_dir)
        manifest = read_manifest(folder)
    except GPT2ModernError as error:
        return [str(error)]
    problems = [file_problem(path, recorded, checksum=True) for path, recorded in recorded_files(folder, manifest)]
    if manifest.get("checksum", checksum_of(manifest)) != checksum_of(manifest):
        problems.append(f"{folder / 'manifest.json'}: altered since it was written; prepare the data again")
    return [problem for problem in problems if problem]


def checksum_of(manifest: dict) -> str:
    """Hash all that the manifest says besides its own `checksum`."""
    content = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_tokenizer_files(data_dir: Path) -> dict[str, bytes]:
    """Read the files of the tokenizer. Raises GPT2ModernError for a link that leads out of the folder, or out of its
    place in the Hub's cache, whose content a model's folder would otherwise make public."""
    folder = data_dir.resolve()
    # The snapshots of the Hub's cache are links to the blobs beside them.
    roots = [folder, *([folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [])]
    paths = [path for name in TOKENIZER_FILES if (path := data_dir / "tokenizer" / name).is_file()]
    for path in paths:
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise GPT2ModernError(f"{path}: is a link out of {data_dir}; put the file itself there")
    return {path.name: path.read_bytes() for path in paths}


def _contradiction(manifest: dict) -> str | None:
    """Say what in the manifest cannot be; KeyError or TypeError for what is absent or of another type."""
    for name, choices in CHOICES.items():
        if manifest[name] not in choices:
            return f"{name} {manifest[name]!r} is none of {', '.join(choices)}"
    block_size, vocab_size, eos_token_id = (manifest[name] for name in ("block_size", "vocab_size", "eos_token_id"))
    if block_size < 1 or not 0 <= eos_token_id < vocab_size:
        return f"block_size {block_size}, eos_token_id {eos_token_id} and vocab_size {vocab_size} do not go together"
    _ = manifest["source"]["name"], manifest["tokenizer"]["sha256"]
    for split, counts in manifest["splits"].items():
        _ = counts["documents"], counts["bytes"], counts["cut_documents"]
        for path, recorded in recorded_files(Path(), manifest, [split]):
            _ = recorded["sha256"]
            if path.is_absolute() or ".." in path.parts:
                return f"{str(path)!r} of split {split} is not inside of the folder"
        rows, tokens = (sum(shard[name] for shard in counts["shards"]) for name in ("rows", "tokens"))
        if (rows, tokens, rows * block_size - tokens) != (counts["rows"], counts["tokens"], counts["padding"]):
            return (
                f"split {split} has {counts['rows']} rows, {counts['tokens']} tokens and {counts['padding']} of "
                f"padding, its shards have {rows}, {tokens} and {rows * block_size - tokens}"
            )
    return None
