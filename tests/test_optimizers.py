"""Which parameter is decayed."""

import torch

from modeling_gpt2modern import GPT2ModernConfig, GPT2ModernForCausalLM
from training.optimizers import build_adamw, set_learning_rate


def gpt2():
    overrides = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    model = GPT2ModernForCausalLM(GPT2ModernConfig.from_preset("gpt2", **overrides, bos_token_id=0, eos_token_id=0))
    return model, build_adamw(model, learning_rate=0.1, weight_decay=0.5, betas=(0.9, 0.95), epsilon=1e-8)


def test_matrices_are_decayed_and_nothing_else():
    """With zero gradients AdamW's update is the decay alone: factor 1 - 0.1 x 0.5."""
    model, optimizer = gpt2()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


def test_every_parameter_is_in_exactly_one_group():
    model, optimizer = gpt2()
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


def test_a_set_learning_rate_reaches_every_group():
    _, optimizer = gpt2()
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
