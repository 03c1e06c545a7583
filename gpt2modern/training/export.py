"""Write the Hub-ready model folder: weights, configuration, the model's code, tokenizer, generation defaults."""

import shutil
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel

from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.files import apply_umask
from gpt2modern.training.models import has_adapters, merged, save_adapters


def save_model_folder(model: PreTrainedModel, folder: Path, blocks: PackedBlocks) -> None:
    """Write what from_pretrained expects into `folder`; adapters both merged into the weights and alone.

    blocks: of the data it was trained on, which has the tokenizer's files as they were when the run began.
    """
    model.generation_config = GenerationConfig(
        bos_token_id=blocks.eos_token_id,
        eos_token_id=blocks.eos_token_id,
        pad_token_id=blocks.eos_token_id,
        do_sample=True,  # greedy decoding of a base model soon repeats itself
        temperature=0.8,
        top_k=50,
    )
    if has_adapters(model):
        save_adapters(model, folder)
        model = merged(model)
    model.save_pretrained(folder)
    for name, content in blocks.tokenizer_files.items():
        (folder / name).write_bytes(content)
    apply_umask(folder)


def export_model(model: PreTrainedModel, output_dir: Path, blocks: PackedBlocks) -> list[str]:
    """Put the model folder's files beside a run's records; each file appears complete or not at all.

    Returns the names of those that make up the model, without the folder of adapters.
    """
    temporary = output_dir / ".export.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_model_folder(model, temporary, blocks)
        files = sorted(path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
        for path in files:
            (output_dir / path).parent.mkdir(exist_ok=True)
            (temporary / path).replace(output_dir / path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [path.name for path in files if len(path.parts) == 1]
