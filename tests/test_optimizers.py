"""Which parameter gets which update, at which learning rate, also where processes share the work."""

import math
import subprocess

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState

from gpt2modern.training.config import TrainConfig
from gpt2modern.training.muon import MUON_COEFFICIENTS, Muon, orthogonalize
from gpt2modern.training.optimizers import OPTIMIZERS, OptimizerChain, build_optimizers, set_schedules, state_bytes
from modeling_gpt2modern import GPT2ModernConfig, GPT2ModernForCausalLM
from tests.support import muon as shared_muon
from tests.support.trainer import REPOSITORY, TORCHRUN, environment


def tiny_model(preset="gpt2"):
    overrides = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    return GPT2ModernForCausalLM(GPT2ModernConfig.from_preset(preset, **overrides, bos_token_id=0, eos_token_id=0))


def config_of(**changes):
    settings = {"learning_rate": 0.1, "muon_learning_rate": 0.02, "weight_decay": 0.5} | changes
    return TrainConfig(data_dir="data", output_dir="out", **settings)


def optimizers_of(model, **changes):
    return build_optimizers(model, config_of(**changes))


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


def muon_of(weights, weight_decay=0.1, **settings):
    return Muon([{"params": weights, "lr": 0.02, "weight_decay": weight_decay}], **settings)


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHAPES = [(24, 64), (64, 24), (32, 32), (1, 16), (40, 1)]


def test_muon_is_torchs_to_the_bit(monkeypatch):
    """So that losses, resumed runs and checkpoints stay what they were; also where a matrix has no gradient."""
    monkeypatch.setattr("gpt2modern.training.muon.has_bf16_instructions", lambda device: True)
    ours, theirs = ([torch.nn.Parameter(normal(*shape, seed=1)) for shape in SHAPES] for _ in range(2))
    optimizers = muon_of(ours), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, nesterov=True)
    for step in range(6):
        for optimizer, weights in zip(optimizers, (ours, theirs), strict=True):
            optimizer.param_groups[0].update(momentum=0.85 + 0.02 * step, lr=0.02 / (1 + step))
            for index, weight in enumerate(weights):
                weight.grad = None if index == step else normal(*weight.shape, seed=10 * step + index)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for mine, other in zip(ours, theirs, strict=True):
        states = (optimizers[0].state[mine], optimizers[1].state[other])
        assert states[0].keys() == states[1].keys() == {"momentum_buffer"}
        assert torch.equal(states[0]["momentum_buffer"], states[1]["momentum_buffer"])


@pytest.mark.parametrize("supported", [True, False])
def test_muon_computes_in_the_dtype_that_the_device_is_fast_in(monkeypatch, supported):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    seen = []

    def seeing(matrix, **settings):
        seen.append(matrix.dtype)
        return orthogonalize(matrix, **settings)

    monkeypatch.setattr("gpt2modern.training.muon.orthogonalize", seeing)
    weight = torch.nn.Parameter(normal(24, 64, seed=1))
    weight.grad = normal(24, 64, seed=2)
    muon_of([weight]).step()
    assert seen == [torch.bfloat16 if supported else torch.float32] and weight.dtype == torch.float32


@pytest.mark.parametrize(("coefficients", "error"), [("quintic", 0.6), ("polar_express", 0.2)])
@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (128, 128)])
def test_singular_values_become_one(coefficients, error, shape):
    """The smallest one of the square matrix is a thousandth of its norm; Polar Express brings all nearer to 1."""
    matrix = normal(*shape, seed=1)
    vectors, values, others = torch.linalg.svd(matrix, full_matrices=False)
    values[-1] = 1e-3 * values.norm()
    found = orthogonalize((vectors * values @ others).bfloat16(), *MUON_COEFFICIENTS[coefficients]).float()
    assert (torch.linalg.svdvals(found) - 1).abs().max() < error
    assert ((vectors.T @ found @ others.T).diagonal() - 1).abs().max() < error


def test_rows_of_normuon_have_equal_sizes_and_the_norm_stays():
    """By hand, in float64. The first update has rows of one size; a later one those of the averages."""
    gradients = [normal(48, 24, seed=step) * torch.linspace(0.01, 1, 48)[:, None] for step in (1, 2)]
    plain, weight = (torch.nn.Parameter(torch.zeros(48, 24)) for _ in range(2))
    optimizers = muon_of([plain]), muon_of([weight], normalize_rows=True)
    average = torch.zeros(48, 1, dtype=torch.float64)
    for step, gradient in enumerate(gradients):
        before = plain.detach().clone(), weight.detach().clone()
        for parameter, optimizer in zip((plain, weight), optimizers, strict=True):
            parameter.grad = gradient
            optimizer.param_groups[0]["weight_decay"] = 0.0
            optimizer.step()
        update, found = (plain.detach() - before[0]).double(), (weight.detach() - before[1]).double()
        unscaled = update / (0.02 * math.sqrt(2))
        average = average.lerp(unscaled.square().mean(dim=1, keepdim=True), 0.05)
        expected = update / average.sqrt()
        expected *= update.norm() / expected.norm()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
        sizes = [change.norm(dim=1) for change in (update, found)]
        assert sizes[0].std() / sizes[0].mean() > 0.02
        assert (sizes[1].std() / sizes[1].mean() < 1e-4) == (step == 0)


def test_normuon_survives_gradients_of_zero():
    """Those of the first step, behind projections that start at zero; and of rows that are never used."""
    weight = torch.nn.Parameter(normal(8, 16, seed=1))
    muon = muon_of([weight], weight_decay=0.0, normalize_rows=True)
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    muon.step()
    assert torch.equal(weight, before)
    weight.grad = normal(8, 16, seed=2) * (torch.arange(8) > 0)[:, None]
    muon.step()
    assert torch.isfinite(weight).all() and torch.equal(weight[0], before[0]) and not torch.equal(weight[1], before[1])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_cautious_decay_is_that_of_weights_which_the_update_shrinks(optimizer):
    """Of matrices alone; what the update does is that of a run without decay."""
    changes = {"optimizer": optimizer, "muon_learning_rate": 0.1, "cautious_weight_decay": True}
    shares = []
    for seed in range(2):  # two steps: the second one has averages
        plain, model = fresh_model(), fresh_model()
        optimizers = optimizers_of(plain, **changes | {"weight_decay": 0.0}), optimizers_of(model, **changes)
        for step in range(seed + 1):
            for index, (other, parameter) in enumerate(zip(plain.parameters(), model.parameters(), strict=True)):
                other.grad = normal(*other.shape, seed=100 * step + index)
                parameter.grad = other.grad.clone()
                parameter.data.copy_(other.data)
            before = [parameter.detach().clone() for parameter in plain.parameters()]
            for each in [*optimizers[0], *optimizers[1]]:
                each.step()
        for first, other, parameter in zip(before, plain.parameters(), model.parameters(), strict=True):
            shrunk = (first * (first - other) >= 0) & (parameter.ndim >= 2)
            torch.testing.assert_close(parameter.detach(), other.detach() - 0.05 * first * shrunk)
            shares += [shrunk.float().mean().item()] if parameter.ndim >= 2 else []
    assert all(0.2 < share < 0.8 for share in shares)


def test_muons_momentum_falls_again_at_the_end():
    steps = {"muon_momentum_warmup_steps": 4, "muon_momentum_cooldown_steps": 5, "max_steps": 20}
    _, muon = optimizers_of(tiny_model(), optimizer="muon", **steps)
    found = []
    for step in range(20):
        set_schedules(muon, step=step, learning_rate_factor=1.0)
        found.append(muon.param_groups[0]["momentum"])
    expected = [0.85, 0.875, 0.90, 0.925] + [0.95] * 12 + [0.93, 0.91, 0.89, 0.87]
    assert found == pytest.approx(expected)


def rates_of(model, **changes):
    """Return the peak learning rate of each parameter, by name."""
    rates = {"embedding_learning_rate": 0.4, "head_learning_rate": 0.3, "scalar_learning_rate": 0.2} | changes
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [group for optimizer in optimizers_of(model, **rates) for group in optimizer.param_groups]
    return {names[id(parameter)]: group["peak_lr"] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_role_has_its_rate(optimizer):
    """Tables of token ids, wherever they are, are embeddings; learned positions are not. A tied head has no rate."""
    model = tiny_model("speedrun")
    model.model.value_embeddings = torch.nn.ModuleList(torch.nn.Embedding(64, 8) for _ in range(2))
    model.model.layers[0].bigrams = torch.nn.Embedding(128, 8)
    found = rates_of(model, optimizer=optimizer)
    tables = {name for name, rate in found.items() if rate == 0.4}
    assert tables == {f"model.{name}.weight" for name in (
        "embed_tokens", "value_embeddings.0", "value_embeddings.1", "layers.0.bigrams"
    )}  # fmt: skip
    assert [name for name, rate in found.items() if rate == 0.3] == ["lm_head.weight"]
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    assert {name for name, rate in found.items() if rate == 0.2} == {name for name in found if shapes[name] < 2}
    matrices = {rate for name, rate in found.items() if name.endswith("_proj.weight")}
    assert matrices == ({0.02} if optimizer == "muon" else {0.1}) and len(found) == len(shapes)
    found = rates_of(tiny_model("gpt2"), optimizer=optimizer)
    assert 0.3 not in found.values() and found["model.embed_positions.weight"] == 0.1


def test_two_processes_share_muons_work_and_agree_with_one(tmp_path):
    """To the bit, also where they hold shards of uneven sizes: each matrix is orthogonalised whole, once."""
    program = (*TORCHRUN, "2", "-m", "tests.support.muon", str(tmp_path / "found.pt"))
    result = subprocess.run(program, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    matrices = len(shared_muon.build()[1].param_groups[0]["params"])
    for kind, settings in shared_muon.SETTINGS.items():
        expected, calls = shared_muon.updated(settings)
        assert calls == shared_muon.STEPS * matrices
        for place in ("whole", "sharded"):
            tensors, shares = found[kind, place]
            assert sum(shares) == calls and max(shares) - min(shares) <= shared_muon.STEPS
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[name], expected[name]) for name in expected), (kind, place)


def test_the_schedule_scales_each_groups_own_peak_and_warms_muons_momentum_up():
    rates = {"embedding_learning_rate": 0.4, "scalar_learning_rate": 0.0}
    adamw, muon = optimizers_of(tiny_model("speedrun"), optimizer="muon", muon_momentum_warmup_steps=300, **rates)
    chain = OptimizerChain([adamw, muon])
    set_schedules(chain, step=150, learning_rate_factor=0.5)
    assert [group["lr"] for group in adamw.param_groups] == [0.2, 0.05, 0.0]
    assert muon.param_groups[0]["lr"] == 0.01 and muon.param_groups[0]["momentum"] == pytest.approx(0.90)
    set_schedules(chain, step=1000, learning_rate_factor=0.5)
    assert muon.param_groups[0]["momentum"] == pytest.approx(0.95)


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon"}, {"optimizer": "muon", "muon_normalize_rows": True}])
def test_state_bytes_are_those_that_an_update_makes(changes):
    model = tiny_model("speedrun")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made = 0
    for each in optimizers_of(model, **changes):
        each.step()
        made += sum(value.nbytes for state in each.state.values() for key, value in state.items() if key != "step")
    assert state_bytes(model, config_of(**changes)) == made


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
