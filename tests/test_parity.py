"""Vanilla settings equal GPT2LMHeadModel and modern ones LlamaForCausalLM, in logits and gradients, in fp32."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from modeling_gpt2modern import GPT2ModernForCausalLM
from tests.support.models import random_ids, tiny_config

ATOL = 1e-5


def gpt2_tensors(tensors: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """Rename tensors of a GPT2LMHeadModel (weights or gradients) to this project's names and transpose Conv1D."""
    renamed = {
        "model.embed_tokens.weight": tensors["transformer.wte.weight"],
        "model.embed_positions.weight": tensors["transformer.wpe.weight"],
        "model.norm.weight": tensors["transformer.ln_f.weight"],
        "model.norm.bias": tensors["transformer.ln_f.bias"],
    }
    for layer in range(num_layers):
        old, new = f"transformer.h.{layer}.", f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = tensors[f"{old}attn.c_attn.{kind}"].t().chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                renamed[f"{new}self_attn.{name}_proj.{kind}"] = part
            renamed[f"{new}self_attn.o_proj.{kind}"] = tensors[f"{old}attn.c_proj.{kind}"].t()
            renamed[f"{new}mlp.up_proj.{kind}"] = tensors[f"{old}mlp.c_fc.{kind}"].t()
            renamed[f"{new}mlp.down_proj.{kind}"] = tensors[f"{old}mlp.c_proj.{kind}"].t()
            renamed[f"{new}input_layernorm.{kind}"] = tensors[f"{old}ln_1.{kind}"]
            renamed[f"{new}post_attention_layernorm.{kind}"] = tensors[f"{old}ln_2.{kind}"]
    return renamed


def gpt2_pair():
    stock = GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    ).eval()
    return stock, tiny_config("gpt2"), lambda tensors: gpt2_tensors(tensors, 2)


def llama_pair(**overrides):
    config = tiny_config("gqa", **overrides)
    stock = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rms_norm_eps=config.norm_eps,
            initializer_range=0.2,
            tie_word_embeddings=config.tie_word_embeddings,
            rope_parameters=dict(config.rope_parameters),
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    return stock, config, dict


def qwen3_pair():
    layer_types = ["sliding_attention", "full_attention"]
    config = tiny_config("gqa", use_qk_norm=True, sliding_window=4, layer_types=layer_types)
    stock = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            rms_norm_eps=config.norm_eps,
            initializer_range=0.2,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=4,
            layer_types=layer_types,
        )
    ).eval()
    return stock, config, dict


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
PAIRS = {
    "gpt2": gpt2_pair,
    "llama": llama_pair,
    "llama untied with biases": lambda: llama_pair(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "llama linear rope": lambda: llama_pair(rope_parameters={"rope_type": "linear", "factor": 4.0}),
    "llama dynamic rope": lambda: llama_pair(rope_parameters={"rope_type": "dynamic", "factor": 4.0}),
    "llama yarn rope": lambda: llama_pair(
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    ),
    "llama longrope": lambda: llama_pair(
        rope_parameters={
            "rope_type": "longrope",
            "short_factor": [1.0, 1.5, 2.0, 2.5],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": 16,
        }
    ),
    "llama3 rope": lambda: llama_pair(rope_parameters=LLAMA3_ROPE),
    "llama proportional rope": lambda: llama_pair(
        rope_parameters={"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    "qwen3 with a sliding layer": qwen3_pair,
}


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("pair", PAIRS)
def test_logits_and_gradients_equal_the_stock_model(pair, attn_implementation):
    torch.manual_seed(0)
    stock, config, rename = PAIRS[pair]()
    with torch.no_grad():  # away from ones and zeros, so that norms and biases count
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    stock.set_attn_implementation(attn_implementation)
    model = GPT2ModernForCausalLM._from_config(config, attn_implementation=attn_implementation).eval()
    missing, unexpected = model.load_state_dict(rename(stock.state_dict()), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    input_ids = random_ids(2, 24)

    expected = stock(input_ids, labels=input_ids)
    actual = model(input_ids, labels=input_ids)
    torch.testing.assert_close(actual.logits, expected.logits, atol=ATOL, rtol=0)
    torch.testing.assert_close(actual.loss, expected.loss, atol=ATOL, rtol=0)

    expected.loss.backward()
    actual.loss.backward()
    expected_gradients = rename({name: weight.grad for name, weight in stock.named_parameters()})
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    torch.testing.assert_close(gradients, expected_gradients, atol=ATOL, rtol=0)


@pytest.mark.parametrize("pair", ["gpt2", "llama"])
def test_packed_row_longer_than_the_context_equals_the_stock_model(pair):
    """Both have 64 positions; the row holds two documents of 40 tokens."""
    torch.manual_seed(0)
    stock, config, rename = PAIRS[pair]()
    model = GPT2ModernForCausalLM(config).eval()
    model.load_state_dict(rename(stock.state_dict()), strict=False)
    position_ids = torch.arange(40).repeat(2).expand(2, -1)
    expected, actual = (
        each(random_ids(2, 80), position_ids=position_ids, use_cache=False).logits for each in (stock, model)
    )
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)
