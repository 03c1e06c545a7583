"""benchmarks.targets and benchmarks.precision: peers, ratios, targets; what is measured is the trainer's step."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch.profiler import profile

from benchmarks import attention, measuring, precision, targets, throughput
from benchmarks.peers import PEERS, peer_loss
from benchmarks.targets import Target, TargetsConfig, compare, measure, measure_generation, table
from benchmarks.throughput import (
    Row,
    StepConfig,
    batches_of,
    build_model,
    compare_rungs,
    ladder,
    loss_from_logits,
    read_blocks,
    training_step,
    weightless_model,
)
from eval.evidence import median_and_spread
from gpt2modern.evaluation.loss import batch_loss
from gpt2modern.training.config import TrainConfig
from modeling_gpt2modern import GPT2ModernConfig, GPT2ModernForCausalLM
from train_accelerate import StepResult

TINY = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
VOCABULARY = "vocab_size=320,unpadded_vocab_size=300"  # that of data_dir, with padding rows
CONFIG = StepConfig(config_overrides=f"{TINY},{VOCABULARY}", block_size=16, per_device_train_batch_size=2, device="cpu")
GPT2, MODERN = Row("gpt2"), Row("modern")
PLAIN, TRAINER = replace(GPT2, loop="plain loop"), replace(GPT2, loop="train_accelerate.py")
PEER_ROWS = [
    replace(GPT2, peer="GPT2LMHeadModel"),
    replace(PLAIN, peer="nanoGPT"),
    replace(MODERN, peer="LlamaForCausalLM"),
]


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_percentiles_lie_between_neighbours():
    assert median_and_spread([4.0, 1.0, 2.0], ".2f") == "2.00 (1.40 to 3.20)"
    assert median_and_spread([1.0, 2.0], ".2f", low=0.25, high=1) == "1.50 (1.25 to 2.00)"
    assert median_and_spread([3.0], ".0f") == "3 (3 to 3)"
    assert median_and_spread([10.0, 20.0, 30.0], ".0f") == "20 (14 to 26)"


@pytest.mark.parametrize("row", PEER_ROWS, ids=str)
def test_a_peer_has_as_many_parameters_as_the_124m_preset_beside_it(row):
    config = replace(CONFIG, config_overrides="vocab_size=50304,unpadded_vocab_size=50257", block_size=512)
    ours = num_parameters(weightless_model(replace(row, peer=None), config))
    assert num_parameters(weightless_model(row, config)) == ours > 123_000_000


def test_every_peer_stands_in_the_table_beside_a_preset():
    assert {line.peer.peer for line in targets.targets()} - {None} == set(PEERS) == {row.peer for row in PEER_ROWS}


def test_the_form_of_nanogpt_is_gpt2():
    """With GELU in its exact form and the same weights, it has the logits of the preset, and the loss of GPT-2."""
    config = GPT2ModernConfig.from_preset("gpt2", vocab_size=96, hidden_size=64, num_hidden_layers=2, mlp_type="gelu")
    ours, peer = GPT2ModernForCausalLM(config).eval(), PEERS["nanoGPT"](config)
    weights = {"wte.weight": ours.model.embed_tokens.weight, "wpe.weight": ours.model.embed_positions.weight}
    for name, tensor in ours.model.norm.state_dict().items():
        weights[f"norm.{name}"] = tensor
    names = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "attn_out": "self_attn.o_proj"}
    names |= {"mlp_in": "mlp.up_proj", "mlp_out": "mlp.down_proj"}
    for index, layer in enumerate(ours.model.layers):
        for kind in ("weight", "bias"):
            for theirs, name in names.items():
                weights[f"blocks.{index}.{theirs}.{kind}"] = layer.get_submodule(name).get_parameter(kind)
            parts = [layer.get_submodule(f"self_attn.{part}_proj").get_parameter(kind) for part in "qkv"]
            weights[f"blocks.{index}.qkv.{kind}"] = torch.cat(parts)
    peer.load_state_dict(weights, strict=False)
    ids = torch.randint(96, (2, 9))
    result = peer(input_ids=ids, labels=ids)
    torch.testing.assert_close(result.logits, ours(input_ids=ids).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.loss, ours(input_ids=ids, labels=ids).loss, atol=1e-5, rtol=0)


LEARNERS = [*PEER_ROWS, MODERN, Row("speedrun", "muon"), PLAIN, replace(GPT2, gradient_checkpointing=True)]
LEARNERS += [replace(PLAIN, keeps_logits=True)]


@pytest.mark.parametrize("row", LEARNERS, ids=repr)
def test_a_measured_step_learns(row):
    with training_step(row, CONFIG) as step:
        torch.manual_seed(0)
        batch = torch.randint(256, (2, 17))
        losses = [getattr(result := step(batch), "loss", result).item() for _ in range(20)]
    assert losses[-1] < losses[0] - 0.05


def test_the_measured_step_begins_where_the_seed_does():
    batch = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
    with training_step(MODERN, CONFIG) as step:
        result = step(batch)
    torch.manual_seed(TrainConfig(dry_run=True).seed)
    model = build_model(MODERN, CONFIG).train()
    assert isinstance(result, StepResult) and result.finite
    assert result.loss.item() == batch_loss(model, batch, num_items=torch.tensor(32.0))[1].item()


@pytest.mark.parametrize(
    ("row", "objective", "tokens"),
    [(GPT2, batch_loss, 300), (GPT2, loss_from_logits, 300), *((row, peer_loss, 320) for row in PEER_ROWS)],
)
def test_every_objective_is_a_mean_loss(row, objective, tokens):
    """Weights of zero give every token the same probability. To a peer, padding rows are tokens."""
    model = build_model(row, CONFIG)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    minimised, loss = objective(model, torch.randint(256, (2, 17)), num_items=torch.tensor(32.0))
    assert minimised.item() == loss.item() == pytest.approx(math.log(tokens))
    assert minimised.requires_grad and not loss.requires_grad


def test_no_block_is_measured_twice(data_dir):
    blocks = read_blocks(CONFIG, data_dir, 10)
    batches = torch.cat([*batches_of(blocks, CONFIG, 10)])
    assert len(batches.unique(dim=0)) == len(batches) == 20


AT_LEAST = Target("train", GPT2, PLAIN, "tokens/s", 1.2)
AT_MOST = Target("memory", GPT2, PLAIN, "peak GiB", 0.6, at_most=True)


@pytest.mark.parametrize(
    ("target", "ratios", "reached"),
    [
        (AT_LEAST, [1.2], "yes"),
        (AT_LEAST, [0.9, 1.3, 1.25], "yes"),
        (AT_LEAST, [1.1, 1.15, 1.2], "within the spread"),  # 1.12 to 1.18
        (AT_LEAST, [1.13, 1.13, 1.14], "no"),
        (AT_LEAST, [1.19], "no"),
        (AT_MOST, [0.5, 0.59, 0.7], "yes"),
        (AT_MOST, [0.6, 0.63, 0.66], "within the spread"),
        (AT_MOST, [0.7, 0.7, 0.71], "no"),
        (AT_MOST, [math.nan], "no"),
        (replace(AT_LEAST, bound=None), [0.1], "-"),
    ],
)
def test_a_target_may_be_missed_by_no_more_than_the_spread(target, ratios, reached):
    assert target.reached(ratios) == reached


def made_up(*speeds):
    return [{"tokens/s": speed, "peak GiB": 1.0} for speed in speeds]


def test_the_table_has_both_medians_and_the_ratio_of_each_turn():
    """The machine is twice as slow in the third turn: the ratios do not see it."""
    results = {("train", GPT2): made_up(300.0, 303.0, 150.0), ("train", PLAIN): made_up(200.0, 202.0, 100.0)}
    results |= {("memory", GPT2): made_up(1.0), ("memory", PLAIN): "out of memory"}
    numbers = compare([AT_LEAST, AT_MOST], results)
    assert numbers[0]["ratios"] == [1.5] * 3 and numbers[0]["values"] == [300.0, 303.0, 150.0]
    lines = table(numbers)
    assert lines[0][0] == "gpt2, eager" and lines[0][3] == "gpt2, plain loop, eager"
    assert lines[0][2] == "300 (210 to 302)"
    assert lines[0][5:] == ["3", "1.50 (1.50 to 1.50)", "at least 1.2", "yes"]
    assert lines[1][2] == "out of memory" and lines[1][5:] == ["0", "-", "at most 0.6", "no"]
    assert {len(line) for line in lines} == {len(targets.HEADER)}


@pytest.mark.parametrize(("peer_speed", "misses"), [(1.0, False), (10.0, True)])
def test_the_command_fails_if_a_target_is_missed(data_dir, tmp_path, monkeypatch, capfd, peer_speed, misses):
    def measured(lines, config, blocks):
        assert blocks.block_size == 16 and all(line.part == "train" for line in lines)
        speeds = {row: peer_speed for line in lines for row in (line.row, line.peer) if row.peer}
        return {("train", row): made_up(speeds.get(row, 5.0)) for line in lines for row in (line.row, line.peer)}

    monkeypatch.setattr(targets, "measure", measured)
    flags = f"--data {data_dir} --parts train --config_overrides {TINY} --block_size 16 --memory_tokens 32"
    try:
        targets.main([*flags.split(), "--output", str(tmp_path)])
    except SystemExit as stop:
        assert stop.code == 1 and misses
    else:
        assert not misses
    page, numbers = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert page.name.endswith("_targets_train_cpu.md") and page.read_text() in capfd.readouterr().out
    assert "Command: `python -m benchmarks.targets --data data" in page.read_text()
    assert (
        "Verdict: not reached: gpt2, compiled over GPT2LMHeadModel, plain loop, compiled" in page.read_text()
    ) == misses
    content = json.loads(numbers.read_text())
    assert content["versions"].startswith("torch ") and content["command"].startswith("python -m benchmarks.targets")
    assert [each["reached"] for each in content["results"]].count("no") == (4 if misses else 0)
    assert page.read_text().count("\n| ") == 2 + len(content["results"])


def test_rows_are_measured_in_turn_each_in_a_process(data_dir):
    """A row that fails does not end the others, and the trainer as a whole says how fast it was."""
    config = TargetsConfig(
        data=str(data_dir), config_overrides=TINY, vocab_size=300, block_size=16, per_device_train_batch_size=2,
        steps=2, repetitions=1,
    )  # fmt: skip
    blocks = read_blocks(config, data_dir, 6)
    line = Target("train", TRAINER, replace(GPT2, optimizer="unknown"), "tokens/s", 0.97)
    results = measure([line], config, blocks)
    ((trainer,), failed) = results.values()
    assert trainer["tokens/s"] == pytest.approx(32 / trainer["s per step"])
    assert trainer["peak GiB"] > trainer["GiB above imports"] > 0
    assert "unknown" in failed


@pytest.mark.parametrize("row", [GPT2, replace(GPT2, peer="GPT2LMHeadModel")], ids=str)
def test_generation_is_measured_for_every_batch_size(data_dir, row):
    config = TargetsConfig(data=str(data_dir), config_overrides=CONFIG.config_overrides, block_size=16)
    results = measure_generation(row, config, read_blocks(config, data_dir, 4))
    wanted = {line.unit for line in targets.targets() if line.part == "generation"}
    assert results.keys() == wanted and all(value > 0 for value in results.values())


def test_each_rung_of_the_ladder_has_one_change_more():
    rungs = [vars(row) for row in ladder().values()]
    changes = [{key for key in row if row[key] != before[key]} for before, row in itertools.pairwise(rungs)]
    assert [len(each) for each in changes] == [2, 1, 1, 1, 1, 1, 2] and set.union(*changes) == {
        "fused", "precision", "attention", "compiled", "padded", "keeps_logits", "loop"
    }  # fmt: skip
    assert rungs[-1] == vars(Row("gpt2", precision="bf16", compiled=True))  # what train_accelerate.py does by itself


@pytest.mark.parametrize(("padded", "rows"), [(True, 320), (False, 300)])
def test_a_vocabulary_is_padded_to_a_multiple_of_64(padded, rows):
    config = replace(CONFIG, config_overrides=TINY, vocab_size=300)
    model = build_model(replace(GPT2, padded=padded), config)
    assert model.config.vocab_size == len(model.lm_head.weight) == rows and model.config.unpadded_vocab_size == 300


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_fused_where_the_row_says_so(fused):
    with training_step(replace(PLAIN, fused=fused), CONFIG) as step, profile() as profiler:
        step(torch.randint(256, (2, 17)))
    operators = {event.key for event in profiler.key_averages()}
    assert ("aten::_fused_adamw_" in operators) == fused and any("Optimizer.step#AdamW" in name for name in operators)


def test_ratios_of_rungs_are_those_of_each_turn():
    """In the second turn the machine is twice as slow. A batch that does not fit is shown and counts for nothing."""
    rungs = {("fp32", GPT2, 2): (10.0, 5.0), ("+ a", GPT2, 2): (20.0, 10.0), ("+ 8", GPT2, 8): "out of memory"}
    rungs |= {("peer", PEER_ROWS[0], 2): (15.0, 7.5)}
    results = {
        key: each if isinstance(each, str) else [{"tokens/s": rate, "MFU": None, "peak GiB": 1.5} for rate in each]
        for key, each in rungs.items()
    }
    numbers, lines = compare_rungs(results)
    assert [each.get("total") for each in numbers] == [1, 2, None, 1.5]
    assert [line[3:] for line in lines[1:]] == [["-", "1.50", "2.00", "2.00"], ["-"] * 4, ["-", "1.50", "-", "1.50"]]
    assert lines[2][:3] == ["+ 8", "8", "out of memory"] and {len(line) for line in lines} == {len(throughput.HEADER)}


def test_the_ladder_writes_a_report_with_a_picture(data_dir, tmp_path, monkeypatch):
    """Every rung but the compiled ones, which take long, in this process instead of one of its own."""
    monkeypatch.setattr(measuring, "in_fresh_process", lambda function, *arguments: function(*arguments))
    uncompiled = {name: replace(row, compiled=False) for name, row in ladder().items()}
    monkeypatch.setattr(throughput, "ladder", lambda: uncompiled)
    monkeypatch.setattr(throughput, "LADDER_PEERS", {"a peer": PEER_ROWS[0]})
    flags = f"--data {data_dir} --config_overrides {TINY} --vocab_size 300 --block_size 16 --device cpu"
    flags += f" --per_device_train_batch_size 1 --larger_batches 2 3 --steps 1 --repetitions 2 --output {tmp_path}"
    throughput.main(flags.split())
    (page,) = tmp_path.glob("*_throughput_ladder_cpu.md")
    content = json.loads(page.with_suffix(".json").read_text())
    rungs = content["results"]["rungs"]
    assert [each["sequences"] for each in rungs] == [1] * len(uncompiled) + [2, 3, 1]
    assert all(len(each["tokens_per_s"]) == 2 and each["peak_gib"] > 0 for each in rungs)
    assert content["results"]["total"] == rungs[-2]["total"] and rungs[0]["total"] == 1
    assert content["picture"] in page.read_text() and (tmp_path / content["picture"]).exists()


def check(data, output, *flags):
    precision.main(
        f"--data {data} --model_preset modern --config_overrides {TINY} --block_size 16 --steps 12 "
        f"--per_device_train_batch_size 2 --output {output}".split()
        + list(flags)
    )
    return next(output.glob("*_precision_cpu.md")).read_text()


def test_bf16_ends_where_fp32_ends_and_a_tolerance_of_nothing_fails(data_dir, tmp_path):
    text = check(data_dir, tmp_path)
    assert "every row ends where fp32 ends" in text
    assert "| modern | adamw | fp32 | cpu |" in text and "| modern | adamw | bf16 | cpu |" in text
    with pytest.raises(SystemExit) as caught:
        check(data_dir, tmp_path, "--tolerance", "0")
    assert caught.value.code == 1


def test_fp32_repeats_itself(data_dir, tmp_path):
    text = check(data_dir, tmp_path, "--precision", "fp32", "--tolerance", "0")
    assert text.count("| +0.0000 | 0.0000 |") == 2


def test_attention_is_timed_with_and_without_documents(tmp_path, capsys):
    flags = ["--seq_len", "12", "--num_tokens", "24", "--num_attention_heads", "2", "--repetitions", "2"]
    attention.main([*flags, "--attn_implementation", "blockwise", "--output", str(tmp_path)])
    (page,) = tmp_path.glob("*_attention_cpu.md")
    results = json.loads(page.with_suffix(".json").read_text())["results"]
    assert len(results) == 8 and all(len(each["seconds"]) == 2 for each in results)
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith(("| bf16", "| fp32"))]
    assert [row[2:4] for row in rows] == [[documents, name] for documents in "13" for name in ("sdpa", "blockwise")] * 2
    assert all(row[-1] == "1.00 |" for row in rows if row[3] == "sdpa") and page.read_text() in capsys.readouterr().out
