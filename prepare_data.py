"""Turn text into packed blocks of tokens: read documents, hold out a validation split, train or load a tokenizer,
encode, pack, and write a folder that train_accelerate.py reads.

    python prepare_data.py --dataset_name stdlib --train_tokenizer 8192 --block_size 256 --output_dir data/stdlib
    python prepare_data.py --train_file a.txt 'b/*.jsonl.gz' c.parquet --tokenizer_name data/stdlib/tokenizer \\
        --block_size 1024 --output_dir data/mine
    python prepare_data.py --dataset_name HuggingFaceFW/fineweb-edu --dataset_config_name sample-10BT \\
        --tokenizer_name openai-community/gpt2 --num_shards 100 --num_proc 16 --output_dir data/fineweb-edu
    python prepare_data.py verify data/mine
    python prepare_data.py report --data_dir data/mine --output report.html
    python prepare_data.py export --data_dir data/mine --format nanogpt --output_dir nanogpt/data/mine

From Python: `prepare(PrepareConfig(output_dir=..., train_file=[...], ...))` or `prepare(config, dataset=...)`.

The folder holds (training reads it with `gpt2modern.data.blocks.PackedBlocks`):

    manifest.json                          settings, counts, sha256 of shards and tokenizer; written last
    report.html                            counts, sources, packing, document lengths, blocks as text
    tokenizer/                             a transformers tokenizer
    train/data-00000-of-00001.arrow        rows of block_size tokens: input_ids, and labels, which are equal
    validation/data-00000-of-00001.arrow
    README.md, *.json                      by which `datasets` opens the folder (load_dataset, load_from_disk)

Order. The source is divided into pieces, ranges of bytes or rows. `--shuffle_seed` shuffles them before they are
distributed over the shards; in a shard, documents are shuffled again, 32 MB at a time. The output does not depend on
the number of processes, or of machines with `--shard_index`. A killed run resumes where it stopped.

Tokens. Each document ends with EOS. `concat` cuts one stream of tokens into rows of block_size tokens; the trainer
reads the stream, so that every token is a target once. `best_fit` does not cut a document that fits into a block.
"""

import gpt2modern  # noqa: F401  first, as it refuses a deleted working directory  # isort: skip
import sys
import time
from pathlib import Path

import datasets
import psutil
import transformers

from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.data.config import PrepareConfig
from gpt2modern.data.folder import WORKSPACE, finish, folder_in_preparation, settings_of, write_dataset_files
from gpt2modern.data.formats import ReadOptions
from gpt2modern.data.formats.reading import check_unchanged
from gpt2modern.data.manifest import build_manifest, find_problems
from gpt2modern.data.publishing import ReportConfig, dataset_card, print_summary, push_to_hub, report_page, write_report
from gpt2modern.data.rows import schema_of
from gpt2modern.data.shards import Job, keep_filled_shards, write_validation
from gpt2modern.data.sources import AnyDataset, open_source, open_validation, stats_of_files, with_token_files
from gpt2modern.data.splits import choose_rule
from gpt2modern.data.tokenizing import Encoder, get_tokenizer, named_tokenizer, vocabulary_size
from gpt2modern.data.workers import write_shards
from gpt2modern.errors import GPT2ModernError


def main(argv: list[str] | None = None) -> None:
    """Run the command line: prepare, verify, report or export. A user's mistake prints one line: exit code 2."""
    started = None
    if argv is None:
        argv, started = sys.argv[1:], psutil.Process().create_time()  # before the imports, which take a second
        datasets.config.TORCH_AVAILABLE = False  # otherwise every IterableDataset imports torch, which takes 2 s
    with one_line_errors():
        if argv[:1] == ["verify"]:
            verify(argv[1:])
            return
        if argv[:1] == ["export"]:
            from gpt2modern.data.exporting import ExportConfig, export  # noqa: PLC0415  imports torch, which takes 2 s

            export(parse_arguments(ExportConfig, argv[1:], description="Write token files that other trainers read."))
            return
        if argv[:1] == ["report"]:
            write_report(parse_arguments(ReportConfig, argv[1:], description="Write a page about a prepared folder."))
            return
        config = parse_arguments(PrepareConfig, argv, description="\n\n".join(__doc__.split("\n\n")[:2]))
        # A user's mistake prints one line, without warnings of the libraries before it.
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        transformers.logging.set_verbosity_error()
        prepare(config, started=started)


def verify(folders: list[str]) -> None:
    """Check every file of finished folders against its sha256. Raises GPT2ModernError that names all damaged files."""
    if not folders or folders[0].startswith("-"):
        raise GPT2ModernError("usage: python prepare_data.py verify FOLDER [FOLDER ...]")
    problems = [problem for folder in folders for problem in find_problems(folder)]
    if problems:
        raise GPT2ModernError("; ".join(problems))
    print(f"{', '.join(folders)}: all files are valid (sha256 as recorded)")


def prepare(config: PrepareConfig, dataset: AnyDataset | None = None, started: float | None = None) -> dict | None:
    """Write the folder `config.output_dir` and return its manifest, or None if only shard --shard_index is written.

    dataset: documents from Python instead of --dataset_name or --train_file. Of a DatasetDict, the split
    `dataset_split` is used, and the split `validation` if it exists. Finished shards of a run with the same settings
    are verified and kept. started: `time.time()` from which the printed time counts (None: now). Raises
    GPT2ModernError if the user can fix the cause; a folder started by this call is then emptied, unless writing failed.
    """
    if (config.dataset_name is not None) + (config.train_file is not None) + (dataset is not None) != 1:
        raise GPT2ModernError("give exactly one of --dataset_name (such as stdlib) and --train_file, the text to read")
    stats = stats_of_files(config)
    output_dir, settings = Path(config.output_dir), settings_of(config, dataset)
    with folder_in_preparation(output_dir, settings, shared=config.shard_index is not None) as manifest:
        if manifest is None:
            manifest = write_folder(config, settings, stats, dataset, started or time.time())
        else:
            print(f"{output_dir} is already prepared with these settings; nothing to do")
    if config.push_to_hub and manifest is not None:
        push_to_hub(output_dir, manifest, config.hub_dataset_id, private=config.hub_private_repo)
    return manifest


def write_folder(
    config: PrepareConfig, settings: dict, stats: dict, dataset: AnyDataset | None, started: float
) -> dict | None:
    """Read, encode and pack the documents. Returns the manifest, or None if --shard_index is given.

    stats: of the files before `settings` were computed from their content. started: see `prepare`.
    """
    output_dir, workspace = Path(config.output_dir), Path(config.output_dir) / WORKSPACE
    config = with_token_files(config)
    tokenizer = named_tokenizer(config)  # None: it is trained below, on the documents
    options = ReadOptions.of(config, tokenizer)
    source = open_source(config, dataset, options, tokenizer, workspace)
    validation = open_validation(config, settings, dataset, options, workspace)
    check_unchanged(stats)
    rule = choose_rule(source.arrays(), config.validation_split_percentage, validation is not None)
    tokenizer = get_tokenizer(config, tokenizer, source.arrays(), rule, output_dir / "tokenizer", workspace)
    encoder = Encoder.of(tokenizer, output_dir / "tokenizer", config)
    num_shards = config.num_shards or source.default_num_shards
    job = Job(source, rule, encoder, config, num_shards, output_dir, workspace)
    if config.shard_index is not None:
        write_shards(job, [config.shard_index], config.num_proc)
        missing = sum(not job.receipt_dir(index).exists() for index in range(num_shards))
        left = f"; {missing} of {num_shards} shards are still missing" if missing else ""
        last = "when all shards are written, run the same command without --shard_index to finish the folder"
        print(f"{job.shard_path(config.shard_index)} is written{left}; {last}")
        return None
    if validation is not None:  # first, so that its mistakes are seen at once
        held_out = write_validation(job, validation)
    write_shards(job, range(num_shards), config.num_proc)
    if validation is None:
        held_out = write_validation(job, None)
    sizes = {"dtype": encoder.dtype, "vocab_size": vocabulary_size(tokenizer), "eos_token_id": encoder.eos_token_id}
    shards = keep_filled_shards(job)
    schema = schema_of(encoder.dtype, config.packing)
    write_dataset_files(output_dir, schema, {"train": shards, "validation": [held_out]})
    manifest = build_manifest(config, settings, sizes, str(rule), shards, held_out)
    finish(output_dir, manifest, report_page(output_dir, manifest), dataset_card(manifest))
    print_summary(output_dir, manifest, time.time() - started)
    return manifest


if __name__ == "__main__":
    main()
