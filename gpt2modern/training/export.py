"""Write a model folder that can be uploaded to the Hub: weights, config, model code, tokenizer, generation settings."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import GenerationConfig, PreTrainedModel

from gpt2modern.conversion.convert import convert_folder, to_native
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError, warn
from gpt2modern.files import apply_umask
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.models import ADAPTER_FOLDER, has_adapters, merged, save_adapters
from modeling_gpt2modern import GPT2ModernConfig, GPT2ModernForCausalLM

STOCK_FOLDER = "stock"


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
    Each file appears complete or not at all. Adapters, stock model and chat template of an earlier run are deleted."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(".tmp", ".export-", output_dir, ignore_cleanup_errors=True) as name:
        temporary = Path(name)
        save_model_folder(model, temporary, blocks)
        files = sorted(path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
        for path in (output_dir / STOCK_FOLDER, output_dir / ADAPTER_FOLDER, output_dir / "chat_template.jinja"):
            if path.is_file() or list(path.glob("*config.json")):
                path.rename(temporary / f".earlier_{path.name}")
        for path in files:
            (output_dir / path).parent.mkdir(exist_ok=True)
            (temporary / path).replace(output_dir / path)
    return [path.as_posix() for path in files]


def find_stock_class(config: TrainConfig, model_config: GPT2ModernConfig) -> str | None:
    """Return the class of transformers that --export_stock writes the trained model as, None if it writes none. Raises
    GPT2ModernError, which names the settings in the way, if there is no such class and --export_stock is `true`."""
    if config.export_stock == "false":
        return None
    try:
        with torch.device("meta"):
            return type(to_native(GPT2ModernForCausalLM(model_config))).__name__
    except ValueError as error:
        if config.export_stock == "auto":
            return None
        raise GPT2ModernError(f"--export_stock true: {error}; change that, or omit --export_stock") from None


def export_stock(config: TrainConfig, model_config: GPT2ModernConfig) -> tuple[str | None, list[str]]:
    """Convert the finished model in --output_dir to its subfolder `stock`, complete or not at all. Returns the class
    that `find_stock_class` names, and the paths of the files in --output_dir. If that fails, prints a warning and
    returns (None, []), or with --export_stock true raises GPT2ModernError."""
    folder = Path(config.output_dir)
    if find_stock_class(config, model_config) is None:
        return None, []
    try:
        facts = convert_folder(folder, folder / STOCK_FOLDER, parent=config.hub_model_id or folder.resolve().name)
    except (GPT2ModernError, RuntimeError) as error:  # also one of torch, for lack of memory
        problem = f"--export_stock {config.export_stock}: there is no stock model beside the finished one ({error})"
        if config.export_stock == "true":
            raise GPT2ModernError(f"{problem}; run the same command again to write it") from None
        warn(problem)
        return None, []
    return facts["architecture"], [f"{STOCK_FOLDER}/{path.name}" for path in (folder / STOCK_FOLDER).iterdir()]
