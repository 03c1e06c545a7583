"""Convert a GPT2-Modern model to a stock architecture of transformers with the same logits, or a stock model to ours.

python -m gpt2modern.conversion --model DIR --output_dir STOCK [--architecture NAME]

A folder of GPT2-Modern is exported, so that it loads without trust_remote_code; a folder of a stock architecture is
imported. A model without an exact counterpart is refused, and the error names the settings. The logits differ by at
most 1e-5 in fp32; dropout probabilities that the other configuration lacks are lost.
"""

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.conversion.architectures import ARCHITECTURES, Architecture
from gpt2modern.conversion.architectures import __doc__ as table_of_architectures
from gpt2modern.conversion.traits import Weights, of_layers
from gpt2modern.errors import GPT2ModernError, first_line
from gpt2modern.files import apply_umask, atomic_folder, check_writable_folder
from gpt2modern.loading import load_tokenizer
from gpt2modern.settings import setting
from modeling_gpt2modern.configuration_gpt2modern import GPT2ModernConfig
from modeling_gpt2modern.layers_gpt2modern import NORMS
from modeling_gpt2modern.modeling_gpt2modern import GPT2ModernForCausalLM

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def cut_vocabulary(weights: Weights, config: GPT2ModernConfig) -> Weights:
    """Cut off the rows of the embedding and of the head that are padding."""
    return weights | {name: weights[name][: config.unpadded_vocab_size] for name in (EMBEDDING, HEAD)}


def norm_embedding_table(weights: Weights, config: GPT2ModernConfig) -> Weights:
    """Apply the norm after the embedding to the embedding table; exact with RoPE, which adds nothing in between."""
    norm = NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps, elementwise_affine=config.norm_affine)
    own = {f"model.embedding_norm.{kind}": kind for kind in norm.state_dict()}
    norm.to(weights[EMBEDDING]).load_state_dict({kind: weights[name] for name, kind in own.items()})
    with torch.no_grad():
        table = norm(weights[EMBEDDING])
    return {name: weight for name, weight in weights.items() if name not in own} | {EMBEDDING: table}


def scale_queries(weights: Weights, config: GPT2ModernConfig) -> Weights:
    """Multiply the queries by attention_scale x sqrt(head_dim), because stock attention divides by sqrt(head_dim).

    Behind a norm only its gain can carry the factor.
    """
    module = "self_attn.q_norm" if config.use_qk_norm else "self_attn.q_proj"
    factor = config.attention_scale * math.sqrt(config.head_dim)
    return weights | {name: weights[name] * factor for name in of_layers(weights, [module])}


def add_neutral_weights(weights: Weights, config: GPT2ModernConfig) -> Weights:
    """Add the gains of one and the biases of zero that a model with this configuration has and `weights` lack."""
    with torch.device("meta"):
        tensors = GPT2ModernForCausalLM(config).state_dict()
    missing = {name: tensor.shape for name, tensor in tensors.items() if name not in weights}
    like = weights[EMBEDDING]
    gains = {name: like.new_ones(shape) for name, shape in missing.items() if name.endswith("norm.weight")}
    biases = {name: like.new_zeros(shape) for name, shape in missing.items() if name.endswith(".bias")}
    return weights | gains | biases


# Ways to turn a model of ours into an equal one with another configuration: a function that changes the weights, given
# the configuration from before (None: neutral weights are added and no more), and a function that returns the fields
# that change. The first field is the one that must be in the way of an architecture; no fields: it is impossible.
RewriteWeights = Callable[[Weights, GPT2ModernConfig], Weights] | None
REWRITES: tuple[tuple[RewriteWeights, Callable[[GPT2ModernConfig], dict[str, Any]]], ...] = (
    (cut_vocabulary, lambda config: {"unpadded_vocab_size": None, "vocab_size": config.unpadded_vocab_size}),
    (
        norm_embedding_table,
        lambda config: (
            {"use_embedding_norm": False, "tie_word_embeddings": False}
            if config.position_embedding_type == "rope"
            else {}
        ),
    ),
    (None, lambda config: {"norm_affine": True}),
    (None, lambda config: {"qk_norm_affine": True}),
    (
        scale_queries,
        lambda config: {"attention_scale": None} if config.qk_norm_affine or not config.use_qk_norm else {},
    ),
    (None, lambda config: {"attention_bias": True}),
    (None, lambda config: {"mlp_bias": True}),
)


class Plan(NamedTuple):
    """Describe how a model becomes `architecture`.

    rewrites: functions for the weights, each with the configuration before and after it; config: the last of these;
    in_the_way: settings and weights that no rewrite removes, empty where the conversion is exact.
    """

    architecture: Architecture
    rewrites: list[tuple[RewriteWeights, GPT2ModernConfig, GPT2ModernConfig]]
    config: GPT2ModernConfig
    in_the_way: list[str]


def plan_export(architecture: Architecture, config: GPT2ModernConfig, weights: Weights) -> Plan:
    """Choose the rewrites that bring a model with this configuration and these weights nearer to `architecture`."""
    rewrites = []
    for rewrite, changes_of in REWRITES:
        changes = changes_of(config)
        if not changes or next(iter(changes)) not in architecture.in_the_way(config):
            continue
        rewritten = copy.deepcopy(config)
        rewritten.update(changes)
        if next(iter(changes)) not in architecture.in_the_way(rewritten):
            rewrites.append((rewrite, config, rewritten))
            config = rewritten
    return Plan(architecture, rewrites, config, architecture.in_the_way(config, weights))


def to_native(model: PreTrainedModel, architecture: str | None = None) -> PreTrainedModel:
    """Export `model` (GPT2ModernForCausalLM) to a stock class with the same logits, in evaluation mode.

    Of the classes in ARCHITECTURES that are exact, the one that needs the fewest rewrites is taken, of those the first;
    `architecture` names another. Weights keep their dtype, or become fp32 where a rewrite would round them. The
    generation configuration comes along. The model itself is not changed.

    Raises ValueError if no class, or not `architecture`, is exact, naming the settings or weights in the way.
    """
    if type(model).__name__ != GPT2ModernForCausalLM.__name__:
        raise ValueError(f"a {type(model).__name__} cannot be exported, only a {GPT2ModernForCausalLM.__name__}")
    candidates = [candidate for candidate in ARCHITECTURES if architecture in (None, candidate.name)]
    if not candidates:
        names = ", ".join(candidate.name for candidate in ARCHITECTURES)
        raise ValueError(f"architecture={architecture!r} is unknown; choose from {names}")
    weights = _in_full_precision(model)
    plans = [plan_export(candidate, model.config, weights) for candidate in candidates]
    exact = [plan for plan in plans if not plan.in_the_way]
    if not exact:
        raise ValueError(_refusal(plans, model.config))
    plan = min(exact, key=lambda plan: len(plan.rewrites))
    for rewrite, before, after in plan.rewrites:
        weights = add_neutral_weights(rewrite(weights, before) if rewrite else weights, after)
    settings: dict[str, Any] = {}
    for trait in plan.architecture.traits:
        settings |= trait.stock_settings(plan.config)
        weights = trait.stock_weights(weights, plan.config)
    stock_class = getattr(transformers, plan.architecture.name)
    return _build(stock_class, AutoConfig.for_model(plan.architecture.model_type, **settings), weights, model)


def from_native(model: PreTrainedModel | str | os.PathLike) -> GPT2ModernForCausalLM:
    """Import a stock model, or a folder of one, with the same logits, in evaluation mode.

    Weights keep their dtype and the generation configuration comes along. Raises ValueError for an architecture that is
    not in ARCHITECTURES, and for a setting or weight of it that has no counterpart here, naming it.
    """
    if not isinstance(model, PreTrainedModel):
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        _architecture_of(config.model_type, (config.architectures or [None])[0])
        model = _load(model)
    architecture = _architecture_of(model.config.model_type, type(model).__name__)
    settings: dict[str, Any] = {}
    try:
        for trait in architecture.traits:
            settings |= trait.our_settings(model.config)
        config = GPT2ModernConfig(**settings)
        weights = _in_full_precision(model)
        for trait in reversed(architecture.traits):
            weights = trait.our_weights(weights, config)
    except ValueError as error:
        raise ValueError(f"this {architecture.name} cannot be imported: {error}") from error
    return _build(GPT2ModernForCausalLM, config, weights, model)


def _architecture_of(model_type: str, class_name: str | None) -> Architecture:
    if model_type == GPT2ModernConfig.model_type:
        raise ValueError("this is a GPT2-Modern model already; to_native exports it")
    for architecture in ARCHITECTURES:
        if architecture.model_type == model_type and class_name in (None, architecture.name):
            return architecture
    names = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise ValueError(f"architecture {class_name or model_type} cannot be imported; choose from {names}")


def _refusal(plans: list[Plan], config: GPT2ModernConfig) -> str:
    """Say what the three nearest architectures do not allow; one that adds no reason of its own is left out."""

    def described(name: str) -> str:
        if not hasattr(config, name):
            return f"{name} (its values)"
        return f"{name}={sorted(set(config.layer_types)) if name == 'layer_types' else getattr(config, name)!r}"

    shown: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (len(plan.in_the_way), len(plan.rewrites))):
        if not any(set(plan.in_the_way) >= set(other.in_the_way) for other in shown):
            shown.append(plan)
    reasons = [
        f"{plan.architecture.name} does not allow {', '.join(map(described, plan.in_the_way))}" for plan in shown
    ]
    subject = "no stock architecture has" if len(plans) > 1 else f"{plans[0].architecture.name} cannot have"
    return f"{subject} the same logits: {'; '.join(reasons[:3])}"


def _in_full_precision(model: PreTrainedModel) -> Weights:
    """Copy all weights, in fp32 if they have less, so that rewrites round at most once."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    return {name: weight.detach().to(dtype, copy=True) for name, weight in model.state_dict().items()}


def _build(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, weights: Weights, source: PreTrainedModel
) -> PreTrainedModel:
    """Build the model with exactly these weights, in `source`'s dtype if that loses nothing."""
    fits = all(torch.equal(weight.to(source.dtype).to(weight.dtype), weight) for weight in weights.values())
    dtype = source.dtype if fits else next(iter(weights.values())).dtype
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    if wrong := sorted({*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]}, key=str):
        raise ValueError(
            f"weight {wrong[0]} has no counterpart; merge adapters and undo quantisation before the conversion"
        )
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.to(source.device)


def _load(name: str | os.PathLike, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """Load the causal language model of a folder; raises ValueError for missing weights, which would be random."""
    model, report = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, trust_remote_code=False, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{len(missing)} of its weights are missing, among them {missing[0]}")
    return model


@dataclass
class ConversionConfig:
    """Hold and check the arguments of the command."""

    model: str = setting(help="folder of a GPT2-Modern model to export, or of a stock model to import")
    output_dir: str = setting(help="folder to write, which must not exist yet")
    architecture: str | None = setting(None, "stock class to export to; by default the nearest that is exact")

    def __post_init__(self):
        if not Path(self.model, "config.json").is_file():
            raise ValueError(f"--model {self.model} is not a model folder: it has no config.json")
        output_dir = Path(self.output_dir)
        if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
            raise ValueError(f"--output_dir {self.output_dir} exists; delete it, or name another folder")
        check_writable_folder("--output_dir", self.output_dir)


CARD = """\
---
{{ card_data }}
---

# {{ name }}

`{{ source }}`, {{ source_class }}, as {{ architecture }}: the same model in another layout, converted by GPT2-Modern.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{{ name }}"{{ trust }})
```

In fp32 the logits of the two differ by at most {{ difference }} on {{ tokens }} random tokens (largest: {{ largest }}).
"""

# Letters, digits, spaces, line breaks and other scripts, which tokenizers of different classes split differently.
TOKENIZER_SAMPLE = "Hello  World's 12345\n\n\tdef f(x): return x+1  # \u00e9t\u00e9 \u65e5\u672c we'RE"


def convert_folder(model_dir: Path, output_dir: Path, architecture: str | None = None) -> dict[str, Any]:
    """Export or import the folder `model_dir` to `output_dir`, with tokenizer, generation configuration and a card.

    Returns what the card says: name, source, source_class, architecture, tokens, difference and largest (of logits).
    `output_dir` appears complete or not at all. Raises GPT2ModernError for what is wrong with the folder or the disk,
    and RuntimeError if the written model computes other logits, which would be a defect of this module.
    """
    try:
        original = _load(model_dir)
    except Exception as error:  # OSError, KeyError, UnpicklingError, ... by what is wrong with the folder
        raise GPT2ModernError(f"--model {model_dir} cannot be loaded: {first_line(error)}") from error
    is_export = original.config.model_type == GPT2ModernConfig.model_type
    if architecture and not is_export:
        raise GPT2ModernError(f"--architecture {architecture} is for exports, but --model {model_dir} is a stock model")
    try:
        converted = to_native(original, architecture) if is_export else from_native(original)
    except ValueError as error:
        raise GPT2ModernError(f"--model {model_dir}: {error}") from None
    names = {"name": output_dir.name, "source": model_dir.resolve().name}
    facts = names | {"source_class": type(original).__name__, "architecture": type(converted).__name__}
    try:
        with atomic_folder(output_dir) as temporary:
            converted.save_pretrained(temporary)
            del converted
            _keep_tokenizer(model_dir, temporary, facts["architecture"])
            facts |= _compare(original, _load(temporary, torch.float32))
            _write_card(temporary / "README.md", facts, needs_trust=not is_export)
            apply_umask(temporary)
    except OSError as error:
        raise GPT2ModernError(f"--output_dir {output_dir}: {error.strerror or error}") from None
    return facts


def _keep_tokenizer(model_dir: Path, output_dir: Path, architecture: str) -> None:
    """Save the tokenizer if there is one, and check that it still splits text in the same way.

    transformers chooses the class of a tokenizer by the model_type beside it too.
    """
    if not any((model_dir / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "vocab.json")):
        return
    tokenizer = load_tokenizer(model_dir)
    tokenizer.save_pretrained(output_dir)
    kept = AutoTokenizer.from_pretrained(output_dir, trust_remote_code=False)
    if kept(TOKENIZER_SAMPLE).input_ids != tokenizer(TOKENIZER_SAMPLE).input_ids:
        raise GPT2ModernError(
            f"--model {model_dir}: transformers loads this tokenizer as a {type(kept).__name__} beside a "
            f"{architecture}, and that class splits text differently; choose another class with --architecture"
        )


def _compare(original: PreTrainedModel, converted: PreTrainedModel) -> dict[str, Any]:
    """Measure in fp32, on random tokens, the largest difference between the logits of two models and the largest logit.

    Returns them as texts, with the number of tokens.
    """
    config = original.config
    length = min(config.max_position_embeddings, 2 * (getattr(config, "sliding_window", None) or 64))
    vocab_size = getattr(config, "unpadded_vocab_size", None) or config.vocab_size
    input_ids = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, actual = (model.float().eval()(input_ids).logits for model in (original, converted))
    largest = expected.abs().max().item()
    difference = (expected - actual).abs().max().item()
    if not math.isfinite(largest):
        raise GPT2ModernError("--model computes NaN or infinite logits, which cannot be compared")
    # fp32 has 7 digits and a deep model loses some of them; a wrong layout changes the first.
    if not difference <= 1e-4 * max(1.0, largest):
        raise RuntimeError(f"logits of the converted model differ by {difference}, the largest is {largest}")
    return {"tokens": length, "difference": f"{difference:.1e}", "largest": f"{largest:.3g}"}


def _write_card(path: Path, facts: dict[str, Any], needs_trust: bool) -> None:
    """Write the model card; needs_trust: loading the model needs trust_remote_code."""
    tags = ["gpt2-modern", "text-generation", *(["custom_code"] if needs_trust else [])]
    card_data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags)
    trust = ", trust_remote_code=True" if needs_trust else ""
    ModelCard.from_template(card_data, template_str=CARD, trust=trust, **facts).save(path)


def main(argv: list[str] | None = None) -> None:
    """Run the command and print what was converted and how far the logits differ."""
    with one_line_errors():
        config = parse_arguments(ConversionConfig, argv, f"{__doc__}\n{table_of_architectures}")
        hf_logging.set_verbosity_error()  # what matters of the warnings of loading is raised here
        hf_logging.disable_progress_bar()
        facts = convert_folder(Path(config.model), Path(config.output_dir), config.architecture)
        print(f"{facts['source_class']} -> {facts['architecture']}: {config.output_dir}")
        print(
            f"logits differ by at most {facts['difference']} on {facts['tokens']} tokens (largest: {facts['largest']})"
        )
