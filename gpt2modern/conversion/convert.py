"""Convert a GPT2-Modern model to a stock class of transformers with the same logits, or a stock model to GPT2-Modern.

python -m gpt2modern.conversion --model DIR --output_dir CONVERTED [--architecture NAME]

A GPT2-Modern folder is exported: the result loads without trust_remote_code. A folder of a stock architecture is
imported as GPT2-Modern. A model without an exact counterpart is refused, and the error names the settings. The logits
differ by at most 1e-5 in fp32. Dropout probabilities that the other configuration cannot hold are lost.
"""

import copy
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCardData
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.conversion.architectures import ARCHITECTURES, unsupported
from gpt2modern.conversion.architectures import __doc__ as table_of_architectures
from gpt2modern.conversion.traits import Weights, of_layers
from gpt2modern.errors import GPT2ModernError
from gpt2modern.files import apply_umask, atomic_folder, check_writable_folder, write_file
from gpt2modern.loading import load_model, load_tokenizer, num_token_ids
from gpt2modern.pages import render
from gpt2modern.settings import setting
from modeling_gpt2modern.configuration_gpt2modern import GPT2ModernConfig
from modeling_gpt2modern.layers_gpt2modern import build_norm
from modeling_gpt2modern.modeling_gpt2modern import GPT2ModernForCausalLM

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SUPPORTED = ", ".join(ARCHITECTURES)
# How the settings end that do not change the logits of a finished model.
NOT_IN_THE_LOGITS = ("_dropout", "_token_id", "_range", "_projections", "use_cache")


def add_neutral_weights(weights: Weights, config: GPT2ModernConfig) -> Weights:
    """Return `weights` and, for norm gains and biases of the configured model that are missing, ones and zeros."""
    with torch.device("meta"):
        tensors = GPT2ModernForCausalLM(config).state_dict()
    missing = {name: tensor.shape for name, tensor in tensors.items() if name not in weights}
    like = weights[EMBEDDING]
    gains = {name: like.new_ones(shape) for name, shape in missing.items() if name.endswith("norm.weight")}
    biases = {name: like.new_zeros(shape) for name, shape in missing.items() if name.endswith(".bias")}
    return weights | gains | biases


def rewrite(weights: Weights, config: GPT2ModernConfig) -> tuple[Weights, GPT2ModernConfig]:
    """Return weights and settings that compute the same logits and that more stock architectures support, for example
    without padding rows in the vocabulary. What cannot be replaced exactly does not change."""
    config = copy.deepcopy(config)
    weights = weights | {name: weights[name][: config.unpadded_vocab_size] for name in (HEAD, EMBEDDING)}
    config.update({"vocab_size": len(weights[HEAD]), "unpadded_vocab_size": None})
    config.update({"norm_affine": True, "qk_norm_affine": True, "initializer_range": float(config.initializer_range)})
    weights = add_neutral_weights(weights, config)
    if config.use_embedding_norm and config.position_embedding_type == "rope":  # which adds nothing in between
        norm = build_norm(config).to(weights[EMBEDDING])
        norm.load_state_dict({kind: weights.pop(f"model.embedding_norm.{kind}") for kind in norm.state_dict()})
        weights[EMBEDDING] = norm(weights[EMBEDDING]).detach()
        config.update({"use_embedding_norm": False, "tie_word_embeddings": False})
    if config.attention_scale is not None:  # stock attention divides by sqrt(head_dim)
        queries = "self_attn.q_norm" if config.use_qk_norm else "self_attn.q_proj"
        factor = config.attention_scale * math.sqrt(config.head_dim)
        weights |= {name: weights[name] * factor for name in of_layers(weights, [queries])}
        config.attention_scale = None
    return weights, config


def to_native(model: PreTrainedModel, architecture: str | None = None) -> PreTrainedModel:
    """Return a new model of a stock class, in evaluation mode, with the logits of `model`, a GPT2ModernForCausalLM.

    The class is `architecture`, or if that is None the class in ARCHITECTURES that has the same logits and needs the
    fewest added biases of zero. The weights keep their dtype, or become fp32 if the conversion would round them. The
    generation configuration is copied; `model` does not change. A model on the meta device has no values: its biases
    are taken to be nonzero. Raises ValueError, with the unsupported settings or weights, if `architecture`, or any
    class if that is None, cannot have the same logits.
    """
    if type(model).__name__ != GPT2ModernForCausalLM.__name__:
        raise ValueError(f"a {type(model).__name__} cannot be exported; only a {GPT2ModernForCausalLM.__name__} can")
    if architecture not in (None, *ARCHITECTURES):
        raise ValueError(f"architecture={architecture!r} is unknown; choose from {SUPPORTED}")
    weights, config = rewrite(_in_full_precision(model), model.config)
    candidates = []
    for added in ([], ["attention_bias"], ["mlp_bias"], ["attention_bias", "mlp_bias"]):
        candidate = copy.deepcopy(config)
        candidate.update(dict.fromkeys(added, True))
        for name in ARCHITECTURES if architecture is None else [architecture]:
            candidates.append((unsupported(name, candidate, weights), name, candidate))
    problems, name, config = min(candidates, key=lambda candidate: len(candidate[0]))  # the first of the closest
    if problems:
        subject = name if architecture else f"no stock architecture has the same logits; the closest, {name},"
        values = [f"{key}={getattr(config, key)!r}" if hasattr(config, key) else key for key in problems]
        raise ValueError(f"{subject} does not allow {', '.join(values)}")
    weights = add_neutral_weights(weights, config)
    settings: dict[str, Any] = {}
    for trait in ARCHITECTURES[name]:
        settings |= trait.stock_settings(config)
        weights = trait.stock_weights(weights, config)
    stock_class = getattr(transformers, name)
    stock_config = stock_class.config_class(**settings)
    for key in settings.keys() - vars(stock_config).keys() - set(stock_config.attribute_map):
        setattr(stock_config, key, settings[key])  # an older name, which the class reads but does not keep
    return _build(stock_class, stock_config, weights, model)


def from_native(
    model: PreTrainedModel | str | os.PathLike, *, like: PreTrainedConfig | str | None = None, **place: Any
) -> GPT2ModernForCausalLM:
    """Return a new GPT2ModernForCausalLM, in evaluation mode, with the same logits as `model`: a stock model of
    transformers, or the folder or Hub name of one. The weights keep their dtype, and the generation configuration is
    copied. like: a configuration with which the model will be loaded. place: for `from_pretrained` (revision, ...).

    Raises ValueError if the architecture is not in ARCHITECTURES, or if a setting has no counterpart in GPT2-Modern or
    contradicts the configuration `like`, and GPT2ModernError if the folder cannot be read.
    """
    name = f"this {type(model).__name__}" if isinstance(model, PreTrainedModel) else str(model)
    if not isinstance(model, PreTrainedModel):
        our_config(PreTrainedConfig.get_config_dict(name, **place)[0], name)  # before the weights are read
        model = load_model(name, flag="the model", dtype="auto", **place)
    if (architecture := type(model).__name__) not in ARCHITECTURES:
        raise ValueError(f"a {architecture} cannot be converted to GPT2-Modern; supported are {SUPPORTED}")
    config = our_config(model.config.to_dict(), name)
    for key in GPT2ModernConfig.__annotations__ if isinstance(like, PreTrainedConfig) else ():
        here, wanted = getattr(config, key), getattr(like, key)
        if here != wanted and not key.endswith(NOT_IN_THE_LOGITS):
            raise ValueError(f"{name} has {key}={here!r}, but the given configuration has {key}={wanted!r}; omit it")
    weights = _in_full_precision(model)
    for trait in reversed(ARCHITECTURES[architecture]):
        weights = trait.our_weights(weights, config)
    return _build(GPT2ModernForCausalLM, config, add_neutral_weights(weights, config), model)


def our_config(settings: dict[str, Any], name: str | os.PathLike) -> GPT2ModernConfig:
    """Return the GPT2-Modern configuration with the same logits as a stock model with these `settings` (config.json).

    Raises ValueError, with the model's `name`, if the architecture or a setting has no counterpart in GPT2-Modern.
    """
    model_type, translated = settings["model_type"], {}
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    try:
        if architecture not in ARCHITECTURES:
            raise ValueError(f"a {model_type} model has no counterpart in GPT2-Modern; supported are {SUPPORTED}")
        stock = CONFIG_MAPPING[model_type].from_dict(settings)
        for trait in ARCHITECTURES[architecture]:
            translated |= trait.our_settings(stock)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = translated[key] if isinstance(translated[key], list) else [translated[key]]
            # GPT2Config has 50256 as BOS and EOS, whatever its vocab_size.
            if not all(token is None or 0 <= token < stock.vocab_size for token in ids):
                translated[key] = None
        return GPT2ModernConfig(**translated)
    except ValueError as error:
        raise ValueError(f"{name} cannot be imported: {error}") from error


def _in_full_precision(model: PreTrainedModel) -> Weights:
    """Return a copy of all weights by name, in at least fp32, so that later changes round them at most once."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    return {name: weight.detach().to(dtype, copy=True) for name, weight in model.state_dict().items()}


def _build(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, weights: Weights, source: PreTrainedModel
) -> PreTrainedModel:
    """Return a model of this class with exactly these weights, and the device and generation configuration of `source`;
    also its dtype if that rounds no weight. Raises ValueError if the class lacks or needs a weight."""
    if source.device.type == "meta":
        with source.device:
            return model_class(config).eval()
    fits = all(torch.equal(weight.to(source.dtype).to(weight.dtype), weight) for weight in weights.values())
    dtype = source.dtype if fits else weights[next(iter(weights))].dtype
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    if wrong := sorted(report["missing_keys"] | report["unexpected_keys"]):
        raise ValueError(f"the weight {wrong[0]} has no counterpart; merge adapters and undo quantisation first")
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.to(source.device)


@dataclass
class ConversionConfig:
    """Hold the arguments of the conversion command. Raises ValueError if --model has no config.json, or if --output_dir
    is not empty or cannot be written."""

    model: str = setting(help="folder of a GPT2-Modern model to export, or of a stock model to import")
    output_dir: str = setting(help="folder to write; it must not exist, or must be empty")
    architecture: str | None = setting(None, "stock class to export to; by default one with the same logits")

    def __post_init__(self):
        if not Path(self.model, "config.json").is_file():
            raise ValueError(f"--model {self.model} is not a model folder: it has no config.json")
        if os.path.isdir(self.output_dir) and os.listdir(self.output_dir):
            raise ValueError(f"--output_dir {self.output_dir} is not empty; delete it, or name another folder")
        check_writable_folder("--output_dir", self.output_dir)


# Letters, digits, spaces, line breaks and other scripts, which tokenizers of different classes split differently.
TOKENIZER_SAMPLE = "Hello  World's 12345\n\n\tdef f(x): return x+1  # \u00e9t\u00e9 \u65e5\u672c we'RE"


def convert_folder(
    model_dir: Path, output_dir: Path, architecture: str | None = None, parent: str | None = None
) -> dict[str, Any]:
    """Convert the model in `model_dir` and write it to `output_dir` with tokenizer, generation configuration and model
    card. A GPT2-Modern model is exported, a stock model is imported. `output_dir` appears complete or not at all.
    parent: name in the card of the folder or Hub repository of which `output_dir` is a subfolder.

    Returns the facts in the card: name, source, source_class, architecture, tokens, difference and largest (of logits).
    Raises GPT2ModernError if the model cannot be read, converted or written, and RuntimeError if the written model
    computes other logits, which would be a defect of this module.
    """
    original = load_model(str(model_dir), dtype="auto")
    is_export = original.config.model_type == GPT2ModernConfig.model_type
    if architecture and not is_export:
        raise GPT2ModernError(
            f"--architecture {architecture} works only for a GPT2-Modern model, but --model {model_dir} is a "
            f"{type(original).__name__}; omit --architecture"
        )
    try:
        converted = to_native(original, architecture) if is_export else from_native(original)
    except ValueError as error:
        raise GPT2ModernError(f"--model {model_dir}: {error}") from None
    facts = {"name": parent or output_dir.name, "source": parent or model_dir.resolve().name}
    facts |= {"source_class": type(original).__name__, "architecture": type(converted).__name__}
    tags = ["gpt2-modern", "text-generation"] if is_export else ["gpt2-modern", "text-generation", "custom_code"]
    card = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags)
    try:
        with atomic_folder(output_dir) as temporary:
            converted.save_pretrained(temporary)
            del converted
            _keep_tokenizer(model_dir, temporary, facts["architecture"])
            facts |= _compare(original, load_model(str(temporary)))
            options = f', subfolder="{output_dir.name}"' if parent else "" if is_export else ", trust_remote_code=True"
            write_file(temporary / "README.md", render("converted_card.md", card=card, options=options, **facts))
            apply_umask(temporary)
    except OSError as error:
        raise GPT2ModernError(f"--output_dir {output_dir} cannot be written: {error.strerror or error}") from None
    return facts


def _keep_tokenizer(model_dir: Path, output_dir: Path, architecture: str) -> None:
    """Copy the tokenizer of `model_dir`, if it has one, to `output_dir`. Raises GPT2ModernError if the copy splits text
    differently, because transformers chooses the tokenizer class by the model_type, which has changed."""
    if not any((model_dir / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "vocab.json")):
        return
    tokenizer = load_tokenizer(model_dir)
    template = not getattr(tokenizer, "response_template", None) and tokenizer.eos_token and tokenizer.chat_template
    if template and "<|im_start|>assistant" not in template:
        # `transformers serve` looks for the marks of Qwen's template in the chats of its classes; without them, it
        # takes the prompt for the answer. This says that the answer is all text after the prompt.
        answer = {"content": "text", "content_args": {"strip": False}, "close": tokenizer.eos_token}
        rule = {"start_anchor_pattern": r"\Z", "defaults": {"role": "assistant"}, "fields": {"content": answer}}
        tokenizer.response_template = rule
    tokenizer.save_pretrained(output_dir)
    kept = AutoTokenizer.from_pretrained(output_dir, trust_remote_code=False)
    if kept(TOKENIZER_SAMPLE, verbose=False).input_ids != tokenizer(TOKENIZER_SAMPLE, verbose=False).input_ids:
        raise GPT2ModernError(
            f"--model {model_dir}: for a {architecture}, transformers loads the tokenizer of this model as a "
            f"{type(kept).__name__}, which splits text differently; choose another class with --architecture"
        )


def _compare(original: PreTrainedModel, converted: PreTrainedModel) -> dict[str, Any]:
    """Return the largest difference between the fp32 logits of two models on random tokens, the largest logit, and the
    number of tokens, for the card. Raises RuntimeError if the difference is more than rounding."""
    config = original.config
    length = min(config.max_position_embeddings, 2 * (getattr(config, "sliding_window", None) or 64))
    vocab_size = num_token_ids(config)
    input_ids = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, actual = (model.float()(input_ids).logits[..., :vocab_size] for model in (original, converted))
    largest, difference = expected.abs().max().item(), (expected - actual).abs().max().item()
    # fp32 has 7 digits and a deep model loses some of them; a wrong layout changes the first.
    if not difference <= 1e-4 * max(1.0, largest):
        raise RuntimeError(f"logits of the converted model differ by {difference}; the largest logit is {largest}")
    return {"tokens": length, "difference": f"{difference:.1e}", "largest": f"{largest:.3g}"}


def main(argv: list[str] | None = None) -> None:
    """Convert the folder that the command line names; print both classes and the largest difference of the logits."""
    with one_line_errors():
        config = parse_arguments(ConversionConfig, argv, f"{__doc__}\n{table_of_architectures}")
        facts = convert_folder(Path(config.model), Path(config.output_dir), config.architecture)
        print(f"{facts['source_class']} -> {facts['architecture']}: {config.output_dir}")
        print("logits differ by at most {difference} on {tokens} tokens (largest logit: {largest})".format(**facts))
