"""Write a model folder that can be uploaded to the Hub: weights, config, model code, tokenizer, generation settings."""

from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import GenerationConfig, PreTrainedModel

from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.files import apply_umask
from gpt2modern.training.models import has_adapters, merged, save_adapters


def save_model_folder(model: PreTrainedModel, folder: Path, blocks: PackedBlocks) -> None:
    """Write all files that from_pretrained needs into `folder`; LoRA adapters are merged into the weights and also
    written separately, into its subfolder `adapter`.

    blocks: of the training data; their tokenizer files, read when the run started, are written too.
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
    """Write the files of the model folder into `output_dir`, next to the run's records, and return their paths in it.
    Each file appears complete or not at all."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(".tmp", ".export-", output_dir, ignore_cleanup_errors=True) as name:
        temporary = Path(name)
        save_model_folder(model, temporary, blocks)
        files = sorted(path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
        for path in files:
            (output_dir / path).parent.mkdir(exist_ok=True)
            (temporary / path).replace(output_dir / path)
    return [path.as_posix() for path in files]
