"""Write a model with its tokenizer to one GGUF file, the format of llama.cpp and the programs that are built on it.

python -m gpt2modern.conversion.gguf --model DIR --output FILE.gguf [--quantize q8_0]

A GPT2-Modern model is converted to a stock class of transformers first. Stock models are GPT-2, Llama, Mistral, Qwen2,
Qwen3, Arcee, and Apertus with relu2, as far as llama.cpp computes the same. The tokenizer must be a byte-level BPE that
splits text as GPT-2's does, as those that prepare_data.py trains do. Without --quantize, weights keep their precision.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.conversion.convert import to_native
from gpt2modern.errors import GPT2ModernError, warn
from gpt2modern.files import atomic_file
from gpt2modern.loading import load_model, load_tokenizer
from gpt2modern.settings import setting
from modeling_gpt2modern.configuration_gpt2modern import GPT2ModernConfig

try:
    import gguf
except ImportError:  # the extra `gguf`
    gguf = None

GELU, SILU, RELU2 = {"activation_function": "gelu_new"}, {"hidden_act": "silu"}, {"hidden_act": "relu2"}
# Stock class -> llama.cpp's name of the architecture, and the settings with which llama.cpp computes it.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("gpt2", GELU | {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}),
    "LlamaForCausalLM": ("llama", SILU),
    "MistralForCausalLM": ("llama", SILU),
    "Qwen2ForCausalLM": ("qwen2", SILU),
    "Qwen3ForCausalLM": ("qwen3", SILU | {"attention_bias": False}),
    "ApertusForCausalLM": ("apertus", RELU2 | {"attention_bias": False}),
    "ArceeForCausalLM": ("arcee", RELU2 | {"attention_bias": False, "mlp_bias": False}),
}
GPT2_PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass
class GGUFConfig:
    """Hold the arguments of the command."""

    model: str = setting(help="folder or Hub name of a GPT2-Modern model, or of a stock model")
    output: str = setting(help="file to write, such as model.gguf; an existing one is replaced")
    quantize: Literal["f32", "f16", "bf16", "q8_0"] | None = setting(
        None, "precision of the matrices in the file; by default that of the model"
    )


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, quantize: str) -> None:
    """Write a stock model and its tokenizer to the GGUF file `path`, which appears complete or not at all.

    quantize: precision of the matrices, see GGUFConfig; vectors and learned positions are fp32. Where llama.cpp would
    ignore a sliding window, prints a warning, and the file gives the window as the context length. Raises
    GPT2ModernError if llama.cpp would compute other logits or split text differently, OSError if it cannot be written.
    """
    config, kind = model.config, type(model).__name__
    if kind not in ARCHITECTURES:
        raise GPT2ModernError(f"{kind} cannot be written as GGUF; supported are {', '.join(ARCHITECTURES)}")
    architecture, settings = ARCHITECTURES[kind]
    rope = getattr(config, "rope_parameters", None) or {}
    for name, value in (settings | {"rope_type": "default"}).items():
        if (found := getattr(config, name, rope.get(name, value))) != value:
            raise GPT2ModernError(f"llama.cpp computes {kind} with {name}={value!r} only, not with {found!r}")
    context, window = config.max_position_embeddings, getattr(config, "sliding_window", None) or math.inf
    if window < context and "sliding_attention" in getattr(config, "layer_types", ["sliding_attention"]):
        problem = f"llama.cpp ignores the sliding window of {kind} ({window} tokens), after which its logits differ"
        warn(f"{problem}; the file gives {window} as the context length, not {context}")
        context = window
    fields = {
        "name": path.stem,
        "file_type": gguf.LlamaFileType["ALL_F32" if quantize == "f32" else f"MOSTLY_{quantize.upper()}"],
        "quantization_version": gguf.GGML_QUANT_VERSION,
        "context_length": context,
        "vocab_size": config.vocab_size,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", 0) or config.n_inner or 4 * config.hidden_size,
        "block_count": config.num_hidden_layers,
        "head_count": config.num_attention_heads,
    }
    if rope:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        fields |= dict.fromkeys(("key_length", "value_length", "rope_dimension_count"), head_dim)
        fields |= {"head_count_kv": config.num_key_value_heads, "rope_freq_base": rope["rope_theta"]}
    fields |= {"layer_norm_rms_eps": config.rms_norm_eps} if rope else {"layer_norm_eps": config.layer_norm_epsilon}
    if architecture == "apertus":  # its xIELU becomes relu^2: softplus(alpha_p) = 1 and softplus(alpha_n) = 0
        xielu = {"alpha_p": math.log(math.e - 1), "alpha_n": -1e4, "beta": 0.0, "eps": -1e-6}
        fields |= {f"xielu_{name}": [value] * config.num_hidden_layers for name, value in xielu.items()}
    fields |= _tokenizer_fields(tokenizer, config.vocab_size)
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        for name, value in fields.items():
            getattr(writer, f"add_{name}")(value)
        _add_weights(writer, model, architecture, quantize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _tokenizer_fields(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, Any]:
    """Return vocabulary, merges, special tokens and chat template by the names of GGUFWriter's methods. Raises
    GPT2ModernError if the tokenizer is no byte-level BPE that splits text as GPT-2's does."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    found = {name: (state["pre_tokenizer"] or {}).get(name) for name in GPT2_PRE_TOKENIZER}
    if state["model"]["type"] != "BPE" or state["normalizer"] is not None or found != GPT2_PRE_TOKENIZER:
        problem = "the tokenizer is not a byte-level BPE that splits text as GPT-2's does"
        raise GPT2ModernError(f"{problem}; try llama.cpp's convert_hf_to_gguf.py, which knows some others")
    entries = {index: (token, gguf.TokenType.NORMAL) for token, index in tokenizer.get_vocab().items()}
    for index, token in tokenizer.added_tokens_decoder.items():
        entries[index] = token.content, gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    tokens = [entries.get(index, (f"[PAD{index}]", gguf.TokenType.UNUSED)) for index in range(vocab_size)]
    fields = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "gpt-2",
        "token_list": [token for token, _ in tokens],
        "token_types": [kind for _, kind in tokens],
        "token_merges": [" ".join(merge) for merge in state["model"]["merges"]],
        "add_bos_token": tokenizer("a").input_ids[0] == tokenizer.bos_token_id,
        "add_eos_token": tokenizer("a").input_ids[-1] == tokenizer.eos_token_id,
        "chat_template": tokenizer.chat_template,
    } | {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    return {name: value for name, value in fields.items() if value is not None}


def _add_weights(writer: Any, model: PreTrainedModel, architecture: str, quantize: str) -> None:
    """Add the weights of a model to a GGUFWriter, under the names and in the layout of llama.cpp's `architecture`."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.config.num_hidden_layers)
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": getattr(model.config, "num_key_value_heads", None)}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings and architecture != "apertus":
            continue  # llama.cpp takes the embedding, except for Apertus
        array, part = weight.float().cpu().numpy(), name.split(".")[-2]
        array = np.ascontiguousarray(array.T) if name in transposed else array
        if architecture in ("llama", "arcee") and part in heads:  # llama.cpp rotates neighbours, transformers halves
            halves = array.reshape(heads[part], 2, -1, *array.shape[1:])  # (heads, 2, head_dim / 2, ...)
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        uneven = quantize == "q8_0" and array.shape[-1] % 32  # numbers that share a scale
        precision = "f32" if array.ndim == 1 or part == "wpe" else "f16" if uneven else quantize
        dtype = gguf.GGMLQuantizationType[precision.upper()]
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(target, gguf.quantize(array, dtype), raw_dtype=dtype)


def main(argv: list[str] | None = None) -> None:
    """Write the GGUF file that the command line names, and print its class, precision and size."""
    with one_line_errors():
        config = parse_arguments(GGUFConfig, argv, __doc__)
        if gguf is None:
            raise GPT2ModernError("--output needs gguf, which is not installed: pip install gguf")
        model, tokenizer = load_model(config.model, dtype="auto"), load_tokenizer(config.model)
        output = Path(config.output)
        try:
            model = to_native(model) if model.config.model_type == GPT2ModernConfig.model_type else model
            precision = config.quantize or DTYPES[model.dtype]
            write_gguf(model, tokenizer, output, precision)
        except (ValueError, GPT2ModernError) as error:
            raise GPT2ModernError(f"--model {config.model}: {error}") from None
        except OSError as error:
            raise GPT2ModernError(f"--output {output} cannot be written: {error.strerror or error}") from None
        print(f"{type(model).__name__} -> {output}: {precision}, {output.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    main()
