"""Print where the parameters of a model are, and its FLOPs per token, by part: embedding, attention, MLP, norms, head.

python -m eval.breakdown --model_preset gpt2 gpt2-medium gpt2-large gpt2-xl [--config_overrides mlp_type=swiglu]
python -m eval.breakdown --model DIR [--block_size 2048]
"""

import re
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.loading import load_config
from gpt2modern.settings import check_ranges, setting
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.dry_run import assumed_data
from gpt2modern.training.models import build_model
from gpt2modern.training.speed import flops_per_token
from modeling_gpt2modern import GPT2ModernForCausalLM

PARTS = {  # the first pattern that is found in a parameter's name decides
    "embedding": "embed_tokens|embed_bigrams|value_embeddings",
    "positions": "embed_positions",
    "norms": "norm",
    "gates": "gate(?!_proj)",
    "attention projections": r"[qkvo]_proj",
    "MLP": "mlp",
    "head": "lm_head",
    "residual weights": "",
}


@dataclass
class BreakdownConfig:
    model_preset: list[str] | None = setting(None, "gpt2 (the default), modern, speedrun, ...")
    config_overrides: str | None = setting(None, "model settings that replace those of the preset: hidden_size=64,...")
    model: str | None = setting(None, "model folder, or Hub repository id (owner/name), instead of a preset")
    block_size: int | None = setting(None, "tokens per sequence; default: the model's maximum", least=1)

    def __post_init__(self):
        check_ranges(self)
        if self.model and (self.config_overrides or self.model_preset):
            raise ValueError("--model is no preset: remove it, or --model_preset and --config_overrides")


def build(config: BreakdownConfig, name: str) -> tuple[PreTrainedModel, int]:
    """Return the model `name` on the meta device, where it takes no memory, and the tokens per sequence."""
    with torch.device("meta"):
        if config.model:
            model = GPT2ModernForCausalLM(load_config(name))
            return model, config.block_size or model.config.max_position_embeddings
        preset = TrainConfig(
            dry_run="true", model_preset=name, config_overrides=config.config_overrides, block_size=config.block_size
        )
        data = assumed_data(preset)
        return build_model(preset, data), data.block_size


def breakdown(model: PreTrainedModel, seq_len: int) -> dict[str, tuple[int, int]]:
    """Return (parameters, FLOPs per token of a forward pass) of each part. The FLOPs are those of --dry_run: 2 for each
    parameter, also of gains and learned positions, but none for the look-up of a token; the FLOPs of a tied head are
    its own, its parameters the embedding's."""
    config, counts = model.config, dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[next(part for part, pattern in PARTS.items() if re.search(pattern, name))] += parameter.numel()
    multiplied = counts | {"embedding": 0, "head": model.get_output_embeddings().weight.numel()}
    parts = {part: (counts[part], flops_per_token(multiplied[part], 0, 0, seq_len) // 3) for part in PARTS}
    width = config.num_attention_heads * config.head_dim
    parts["attention scores"] = (0, flops_per_token(0, config.num_hidden_layers, width, seq_len) // 3)
    return parts


def table(name: str, model: PreTrainedModel, seq_len: int) -> str:
    parts = breakdown(model, seq_len)
    totals = [sum(column) for column in zip(*parts.values(), strict=True)]
    lines = [["part", "parameters", "%", "FLOPs/token forward", "training", "%"], ["---"] * 6]
    for part, (parameters, flops) in (parts | {"total": totals}).items():
        shares = (f"{parameters / totals[0]:.1%}", f"{flops / totals[1]:.1%}")
        lines.append([part, f"{parameters:,}", shares[0], f"{flops:,}", f"{3 * flops:,}", shares[1]])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines if line[1] != "0" or line[3] != "0")
    return f"{name}, sequences of {seq_len} tokens\n\n{rows}\n"


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(BreakdownConfig, argv, __doc__)
        names = [config.model] if config.model else config.model_preset or ["gpt2"]
        for name in names:
            print(table(name, *build(config, name)))


if __name__ == "__main__":
    main()
