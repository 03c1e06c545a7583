"""A prepared folder as a dataset of the Hub: its card, and the upload."""

from pathlib import Path

from gpt2modern.errors import GPT2ModernError
from gpt2modern.data.files import cause_of

CARD = """
# {name}

Packed token blocks for training a language model: {description}.

{table}

Each row holds `input_ids`, block_size + 1 = {row_size} tokens of which the first is context only, and `num_tokens`, the
number of targets that follow it; the rest of a row is padding with EOS (id {eos_token_id}). Documents end with EOS.
The tokenizer is in `tokenizer/`; `manifest.json` has the settings and the sha256 of shards and tokenizer.

Validation: {validation_rule}.

```python
from datasets import load_dataset

blocks = load_dataset("{repo_id}")
```

GPT2-Modern trains on it by name: `--data_dir {repo_id}`.
"""


def dataset_card(manifest: dict, repo_id: str) -> str:
    """README.md of the dataset; its metadata tells `load_dataset` which files are which split."""
    from huggingface_hub import DatasetCard, DatasetCardData

    from gpt2modern.data.report import COLUMNS, split_row

    source = manifest["source"]["name"]
    table = "| split | " + " | ".join(COLUMNS) + " |\n|---" + "|---" * len(COLUMNS) + "|\n"
    for split, counts in manifest["splits"].items():
        table += f"| {split} | " + " | ".join(split_row(counts)) + " |\n"
    data = DatasetCardData(
        pretty_name=repo_id.split("/")[-1],
        tags=["gpt2-modern", "packed"],
        task_categories=["text-generation"],
        source_datasets=[source] if isinstance(source, str) and source != "stdlib" else None,
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"{split}/*/*.arrow"} for split in manifest["splits"]],
            }
        ],
    )
    content = CARD.format(
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        table=table,
        row_size=manifest["block_size"] + 1,
        description=f"blocks of {manifest['block_size']} tokens, packing {manifest['packing']}, "
        f"{manifest['vocab_size']:,} vocabulary entries",
        eos_token_id=manifest["eos_token_id"],
        validation_rule=manifest["validation_rule"],
    )
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n{content}"))


def push_to_hub(folder: Path, manifest: dict, repo_id: str, *, private: bool) -> None:
    """Upload a finished folder with its card; GPT2ModernError when the Hub refuses or is not there. The folder stays whole.

    The token is the one that `hf auth login` stored, or HF_TOKEN.
    """
    from huggingface_hub import HfApi

    (folder / "README.md").write_text(dataset_card(manifest, repo_id), encoding="utf-8")
    try:
        api = HfApi()
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            commit_message="Packed token blocks",
            ignore_patterns=[".*"],
        )
    except Exception as error:  # the network, the token, the name: none of it is a defect of ours
        raise GPT2ModernError(
            f"--hub_dataset_id {repo_id}: the upload failed ({cause_of(error)}); {folder} is finished: the same "
            "command tries the upload again"
        ) from error
    print(f"uploaded to https://huggingface.co/datasets/{repo_id}")
