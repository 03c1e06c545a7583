"""Models small enough for a test, one for each set of flags that the tests of the model run on."""

from pathlib import Path

import torch

from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.export import export_model
from gpt2modern.training.models import build_model
from modeling_gpt2modern import GPT2ModernConfig, GPT2ModernForCausalLM
from modeling_gpt2modern.loss_gpt2modern import linear_cross_entropy_and_z_loss

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # ten times the usual, so that layers this narrow do something
}
SPEEDRUN_RESIDUALS = {
    "use_unet_skips": True,
    "use_value_residual": True,
    "use_x0_residual": True,
    "use_embedding_norm": True,
}

FRONTIER = {
    "bigram_vocab_size": 50,
    "use_smear": True,
    "use_backout": True,
    "rope_parameters": {"rope_theta": 1024.0},
    "num_key_value_heads": 2,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "zero_init_projections": False,
    "unpadded_vocab_size": 90,
}

# name -> (preset, overrides)
FLAG_SETS = {
    "gpt2": ("gpt2", {}),
    "modern": ("modern", {}),
    "modern_muon": ("modern-muon", {"zero_init_projections": False, "unpadded_vocab_size": 90}),
    "speedrun": ("speedrun", {"zero_init_projections": False, "unpadded_vocab_size": 90}),
    "gqa": ("modern", {"num_key_value_heads": 2}),
    "sliding": ("modern", {"sliding_window": 4}),
    "sliding_mixed": ("modern", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "learned_rmsnorm": ("modern", {"position_embedding_type": "learned"}),
    "padded_vocabulary": ("modern", {"unpadded_vocab_size": 90}),
    "partial_rope": ("modern", {"partial_rotary_factor": 0.5}),
    "value_residual_gqa": ("modern", {"use_value_residual": True, "num_key_value_heads": 2}),
    "odd_unet": ("modern", {"use_unet_skips": True, "num_hidden_layers": 3}),
    "frontier": ("frontier", {"bigram_vocab_size": 50, "zero_init_projections": False, "unpadded_vocab_size": 90}),
    "frontier_sliding_mixed": ("frontier", FRONTIER),
}


def tiny_config(flag_set: str = "modern", **overrides) -> GPT2ModernConfig:
    """Build the configuration of one of FLAG_SETS with 32 dimensions, 2 layers and no dropout."""
    preset, flags = FLAG_SETS[flag_set]
    dropouts = dict.fromkeys(("embedding_dropout", "attention_dropout", "hidden_dropout"), 0.0)
    return GPT2ModernConfig.from_preset(preset, **(TINY | dropouts | flags | overrides))


def tiny_model(flag_set: str = "modern", **overrides) -> GPT2ModernForCausalLM:
    """Build the model of `tiny_config` in evaluation mode, with every weight moved away from its initial value."""
    torch.manual_seed(0)
    model = GPT2ModernForCausalLM(tiny_config(flag_set, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def linear_cross_entropy(*inputs: torch.Tensor, **options) -> torch.Tensor:
    """Compute the loss of a linear head with or without z-loss; inputs: hidden states, weight, labels."""
    return linear_cross_entropy_and_z_loss(*inputs, **options)[0]


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    """Draw token ids below 90, which exist in every flag set."""
    return torch.randint(0, 90, shape, generator=torch.Generator().manual_seed(seed))


def export_fresh_model(data_dir: Path, folder: Path, model_preset: str) -> Path:
    """Write a freshly initialised model folder as a training run on `data_dir` leaves it."""
    blocks = PackedBlocks(data_dir, "train")
    torch.manual_seed(0)
    overrides = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2"
    config = TrainConfig(dry_run=True, model_preset=model_preset, config_overrides=overrides)
    export_model(build_model(config, blocks), folder, blocks)
    return folder
