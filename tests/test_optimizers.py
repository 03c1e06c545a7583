"""Which parameter gets which update, at which learning rate."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState

from gpt2modern.training.config import TrainConfig
from gpt2modern.training.optimizers import OPTIMIZERS, OptimizerChain, build_optimizers, set_schedules, state_bytes
from modeling_gpt2modern import GPT2ModernConfig, GPT2ModernForCausalLM


def tiny_model(preset="gpt2"):
    overrides = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    return GPT2ModernForCausalLM(GPT2ModernConfig.from_preset(preset, **overrides, bos_token_id=0, eos_token_id=0))


def optimizers_of(model, **changes):
    settings = {"learning_rate": 0.1, "muon_learning_rate": 0.02, "weight_decay": 0.5} | changes
    return build_optimizers(model, TrainConfig(data_dir="data", output_dir="out", **settings))


def test_matrices_are_decayed_and_nothing_else():
    """With zero gradients AdamW's update is the decay alone: factor 1 - 0.1 x 0.5."""
    model = tiny_model()
    (optimizer,) = optimizers_of(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("preset", ["gpt2", "modern", "speedrun"])
def test_every_parameter_is_in_exactly_one_group(preset, optimizer):
    model = tiny_model(preset)
    optimizers = optimizers_of(model, optimizer=optimizer)
    grouped = [id(p) for each in optimizers for group in each.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("preset", ["gpt2", "modern", "speedrun"])
def test_muon_gets_the_matrices_of_the_layers_and_no_others(preset):
    model = tiny_model(preset)
    _, muon = optimizers_of(model, optimizer="muon")
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p] for p in muon.param_groups[0]["params"]}
    assert found == {name for name in names.values() if name.endswith("_proj.weight")}


def test_muons_first_step_is_orthogonal():
    """After one update from zero, a weight is -lr x an (almost) orthogonal matrix: singular values near lr."""
    model = tiny_model("modern")
    _, muon = optimizers_of(model, optimizer="muon", muon_learning_rate=0.02, weight_decay=0.0)
    weight = model.model.layers[0].self_attn.q_proj.weight
    torch.manual_seed(0)
    weight.grad = torch.randn_like(weight)
    with torch.no_grad():
        weight.zero_()
    muon.step()
    singular_values = torch.linalg.svdvals(weight.detach()) / 0.02
    assert singular_values.min() > 0.5 and singular_values.max() < 1.5  # five Newton-Schulz steps come that near


def test_the_schedule_scales_each_groups_own_peak_and_warms_muons_momentum_up():
    rates = {"embedding_learning_rate": 0.4, "scalar_learning_rate": 0.0}
    adamw, muon = optimizers_of(tiny_model("speedrun"), optimizer="muon", muon_momentum_warmup_steps=300, **rates)
    chain = OptimizerChain([adamw, muon])
    set_schedules(chain, step=150, learning_rate_factor=0.5)
    assert [group["lr"] for group in adamw.param_groups] == [0.2, 0.05, 0.0]
    assert muon.param_groups[0]["lr"] == 0.01 and muon.param_groups[0]["momentum"] == pytest.approx(0.90)
    set_schedules(chain, step=1000, learning_rate_factor=0.5)
    assert muon.param_groups[0]["momentum"] == pytest.approx(0.95)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_bytes_are_those_that_an_update_makes(optimizer):
    model = tiny_model("speedrun")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made = 0
    for each in optimizers_of(model, optimizer=optimizer):
        each.step()
        made += sum(value.nbytes for state in each.state.values() for key, value in state.items() if key != "step")
    assert state_bytes(model, optimizer) == made


# Loss scale


def scaled_steps(model, broken_at=()):
    """Two updates of a chain of AdamW and Muon under a loss scale; one weight's gradient is infinite at `broken_at`."""
    optimizers = optimizers_of(model, optimizer="muon", learning_rate=0.01)
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True)
    chain, scaler = OptimizerChain(optimizers), torch.amp.GradScaler("cpu", init_scale=1024.0)
    prepared = AcceleratedOptimizer(chain, device_placement=False, scaler=scaler)  # as a run under fp16 has it
    for step in range(2):
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + index)
            parameter.grad = torch.randn(parameter.shape, generator=generator) * scaler.scale(torch.ones(()))
        if step in broken_at:
            model.get_input_embeddings().weight.grad[0, 0] = torch.inf
        scaler.unscale_(chain)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        prepared.step()
        prepared.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()], scaler.get_scale()


def fresh_model():
    torch.manual_seed(0)
    return tiny_model("modern")


def test_under_a_loss_scale_a_chain_of_optimizers_makes_the_updates_of_none():
    model = fresh_model()
    optimizers = optimizers_of(model, optimizer="muon", learning_rate=0.01)
    for step in range(2):
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + index)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
    found, scale = scaled_steps(fresh_model())
    assert scale == 1024.0
    for expected, weight in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(weight, expected.detach())


def test_an_overflow_in_one_optimizers_gradients_stops_all_of_them_for_that_step():
    untouched = [parameter.detach().clone() for parameter in fresh_model().parameters()]
    found, scale = scaled_steps(fresh_model(), broken_at=(0, 1))
    assert all(torch.equal(before, after) for before, after in zip(untouched, found, strict=True)) and scale == 256.0
    found, scale = scaled_steps(fresh_model(), broken_at=(0,))
    assert not any(torch.equal(before, after) for before, after in zip(untouched, found, strict=True)) and scale == 512
