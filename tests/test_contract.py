"""The model does what transformers, PEFT and TRL expect of a causal language model and test with Llama.

Not repeated here: recorded states, gradient checkpointing, loss and single-file loading, which are in test_modeling,
generation (test_generation), and the code that is saved along (test_remote_code).
"""

import os

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig
from trl import SFTConfig, SFTTrainer

from gpt2modern.evaluation.loss import batch_loss
from modeling_gpt2modern import (
    GPT2ModernForCausalLM,
    GPT2ModernForQuestionAnswering,
    GPT2ModernForSequenceClassification,
    GPT2ModernForTokenClassification,
    GPT2ModernModel,
)
from tests.support.models import FLAG_SETS, random_ids, tiny_config, tiny_model

EVERY_FLAG_SET = pytest.mark.parametrize("flag_set", FLAG_SETS)
PRESETS = pytest.mark.parametrize(
    "flag_set", ["gpt2", "modern", "modern_muon", "speedrun", "frontier", "frontier_sliding_mixed"]
)


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def logits_of(model: nn.Module, input_ids: torch.Tensor, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids, **kwargs).logits


# Outputs


@EVERY_FLAG_SET
def test_tuple_holds_what_the_dict_holds(flag_set):
    model, input_ids = tiny_model(flag_set), random_ids(2, 8)
    outputs = model(input_ids, labels=input_ids, output_hidden_states=True)
    loss, logits, cache, hidden_states = model(
        input_ids, labels=input_ids, output_hidden_states=True, return_dict=False
    )
    assert torch.equal(loss, outputs.loss) and torch.equal(logits, outputs.logits)
    assert cache.get_seq_length() == outputs.past_key_values.get_seq_length() == 8
    assert all(map(torch.equal, hidden_states, outputs.hidden_states))


@EVERY_FLAG_SET
def test_gradients_reach_every_weight_and_every_recorded_state(flag_set):
    model, input_ids = tiny_model(flag_set).train(), random_ids(2, 8)
    model.set_attn_implementation("eager")
    outputs = model(input_ids, labels=input_ids, output_hidden_states=True, output_attentions=True)
    recorded = (*outputs.hidden_states, *outputs.attentions)
    for state in recorded:
        state.retain_grad()
    outputs.loss.backward()
    assert all(state.grad is not None and state.grad.any() for state in recorded)
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.any(), name


@EVERY_FLAG_SET
def test_rows_of_a_batch_do_not_see_each_other(flag_set):
    model, input_ids = tiny_model(flag_set), random_ids(3, 8)
    close(logits_of(model, input_ids), torch.cat([logits_of(model, row[None]) for row in input_ids]))


@EVERY_FLAG_SET
def test_mask_of_four_dimensions_is_taken_as_it_is(flag_set):
    """One row holds two continuations of one prompt, as in tree decoding; it is not longer than any window."""
    model = tiny_model(flag_set)
    if model.model.num_histories:
        with pytest.raises(ValueError, match="neither continuous batching nor a mask of four dimensions"):
            model(random_ids(1, 4), attention_mask=torch.zeros(1, 1, 4, 4))
        return
    prompt, first, second = random_ids(1, 2), random_ids(1, 2, seed=2), random_ids(1, 2, seed=3)
    allowed = torch.ones(6, 6).tril()
    allowed[4:, 2:4] = 0
    mask = torch.zeros(1, 1, 6, 6).masked_fill(allowed == 0, torch.finfo(torch.float32).min)
    position_ids = torch.tensor([[0, 1, 2, 3, 2, 3]])
    row = torch.cat((prompt, first, second), dim=1)
    logits = logits_of(model, row, attention_mask=mask, position_ids=position_ids)
    close(logits[:, :4], logits_of(model, torch.cat((prompt, first), dim=1)))
    close(logits[:, 4:], logits_of(model, torch.cat((prompt, second), dim=1))[:, 2:])


@EVERY_FLAG_SET
def test_exports_as_one_graph(flag_set):
    model, shapes = tiny_model(flag_set), {"input_ids": {0: torch.export.Dim("batch", min=2, max=8)}, "use_cache": None}
    keywords = {"kwargs": {"use_cache": False}, "dynamic_shapes": shapes, "strict": False}
    exported = torch.export.export(model, (random_ids(2, 8),), **keywords).module()
    for batch in (2, 5):
        input_ids = random_ids(batch, 8)
        close(exported(input_ids, use_cache=False).logits, logits_of(model, input_ids))


# Embeddings


@EVERY_FLAG_SET
def test_embeddings_can_be_replaced_and_tied_again(flag_set):
    model, embeddings = tiny_model(flag_set), nn.Embedding(96, 32)
    model.set_input_embeddings(embeddings)
    assert model.get_input_embeddings() is model.model.embed_tokens is embeddings
    model.tie_weights()
    assert (model.get_output_embeddings().weight is embeddings.weight) == model.config.tie_word_embeddings


@EVERY_FLAG_SET
@pytest.mark.parametrize(("new_num_tokens", "pad_to_multiple_of"), [(101, None), (101, 8), (80, None), (None, 64)])
def test_resizing_keeps_what_the_model_knew(flag_set, new_num_tokens, pad_to_multiple_of, tmp_path):
    model, input_ids = tiny_model(flag_set), random_ids(2, 8) % 80
    before = logits_of(model, input_ids)
    model.resize_token_embeddings(new_num_tokens, pad_to_multiple_of=pad_to_multiple_of)
    real = new_num_tokens or before[0, 0].gt(torch.finfo(before.dtype).min).sum().item()
    known = min(real, 90)

    model.save_pretrained(tmp_path)
    loaded = GPT2ModernForCausalLM.from_pretrained(tmp_path)
    after = logits_of(loaded, input_ids)
    assert after[..., :real].isfinite().all() and after[..., real:].eq(torch.finfo(after.dtype).min).all()
    close(after[..., :known], before[..., :known])
    rows = loaded.config.vocab_size
    assert after.shape[-1] == rows == loaded.lm_head.weight.shape[0] == loaded.model.embed_tokens.weight.shape[0]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings

    last = torch.full((2, 8), real - 1)
    loaded(last, labels=last, skip_logits=True).loss.backward()
    assert loaded.lm_head.weight.grad[real - 1].any() and not loaded.lm_head.weight.grad[real:].any()


@pytest.mark.parametrize("new_num_tokens", [80, 92])
@pytest.mark.parametrize(
    "model_class",
    [
        GPT2ModernModel,
        GPT2ModernForSequenceClassification,
        GPT2ModernForTokenClassification,
        GPT2ModernForQuestionAnswering,
    ],
)
def test_resizing_without_a_language_head_keeps_count_of_the_real_ids(model_class, new_num_tokens, tmp_path):
    model = model_class(tiny_config("padded_vocabulary", pad_token_id=0))
    model.resize_token_embeddings(new_num_tokens)
    model.save_pretrained(tmp_path)
    language_model = GPT2ModernForCausalLM.from_pretrained(tmp_path)
    logits = logits_of(language_model, random_ids(1, 4) % 80)
    assert (logits > torch.finfo(logits.dtype).min).sum() == 4 * new_num_tokens


# Saving and loading


@EVERY_FLAG_SET
def test_checkpoint_in_shards_is_the_model(flag_set, tmp_path):
    model, input_ids = tiny_model(flag_set), random_ids(2, 8)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    names = [name for shard in shards for name in load_file(shard)]
    assert len(names) == len(set(names))
    assert ("lm_head.weight" in names) == (not model.config.tie_word_embeddings)
    assert torch.equal(
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), input_ids), logits_of(model, input_ids)
    )


@PRESETS
def test_base_model_and_language_model_load_each_other(flag_set, tmp_path):
    model, input_ids = tiny_model(flag_set), random_ids(2, 8)
    model.save_pretrained(tmp_path / "language")
    base = AutoModel.from_pretrained(tmp_path / "language")
    assert torch.equal(base(input_ids).last_hidden_state, model.model(input_ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    loaded, information = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not information["unexpected_keys"]
    assert set(information["missing_keys"]) == (set() if model.config.tie_word_embeddings else {"lm_head.weight"})
    if model.config.tie_word_embeddings:
        assert torch.equal(logits_of(loaded, input_ids), logits_of(model, input_ids))


def test_head_of_another_size_is_replaced_where_that_is_asked_for(tmp_path):
    GPT2ModernForSequenceClassification(tiny_config(num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert loaded.score.weight.shape == (5, 32) and loaded.score.weight.std() > 0.1


@PRESETS
def test_model_part_of_which_stays_on_disk_computes_the_same(flag_set, tmp_path):
    model, input_ids = tiny_model(flag_set), random_ids(2, 8)
    model.save_pretrained(tmp_path)
    device_map = {name: "cpu" for name, _ in model.model.named_children()}
    device_map = {f"model.{name}": place for name, place in device_map.items() if name != "layers"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "off")
    assert loaded.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(logits_of(loaded, input_ids), logits_of(model, input_ids))
    settings = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 4, "do_sample": False}
    settings |= {"pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(loaded.generate(input_ids, **settings), model.generate(input_ids, **settings))


@PRESETS
def test_device_map_auto_splits_the_model_between_layers(flag_set, tmp_path):
    changes = {"layer_types": ["sliding_attention", "full_attention"] * 2} if "mixed" in flag_set else {}
    model = tiny_model(flag_set, num_hidden_layers=4, **changes)
    model.save_pretrained(tmp_path)
    memory = {"cpu": model.get_memory_footprint() * 3 // 4}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map="auto", max_memory=memory, offload_folder=tmp_path / "off"
    )
    places = loaded.hf_device_map
    assert (places["model.layers.0"], places["model.layers.3"]) == ("cpu", "disk")
    assert not any(name.count(".") > 2 for name in places), "a layer is split, whose residuals need one device"
    assert torch.equal(logits_of(loaded, random_ids(1, 8)), logits_of(model, random_ids(1, 8)))


def test_casting_the_model_leaves_the_rotary_frequencies_in_fp32():
    model = tiny_model("modern")
    exact = model.model.rotary_emb.inv_freq.clone()
    assert torch.equal(model.bfloat16().model.rotary_emb.inv_freq, exact)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert model.to("meta").model.rotary_emb.inv_freq.device.type == "meta"


# Several processes


def parallel_results(rank: int, folder: str) -> dict:
    """Run two processes that share the models in `folder`, and collect what each finds."""
    input_ids, results = random_ids(2, 8), {}
    for name in os.listdir(folder):
        kind = name.split("-")[0]
        if kind not in ("tp", "fsdp", "pp"):
            continue
        settings = DistributedConfig(**{f"{kind}_size": 2})
        try:
            model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", distributed_config=settings)
        except ValueError as error:
            results[name] = str(error)
            continue
        model.eval()
        results[name] = {"logits": logits_of(model, input_ids).clone()}
        if kind == "pp":
            owned = [type(layer).__name__ == "GPT2ModernDecoderLayer" for layer in model.model.layers]
            generation = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 4, "do_sample": False}
            generated = model.generate(input_ids, pad_token_id=0, eos_token_id=None, **generation)
            results[name] |= {"generated": generated, "owned": owned}
            continue
        loss = model(input_ids, labels=input_ids, skip_logits=True).loss
        loss.backward()
        gradients = {key: weight.grad for key, weight in model.named_parameters()}
        results[name] |= {
            "loss": loss.detach(),
            "local": tuple(model.model.layers[0].mlp.up_proj.weight.to_local().shape),
            "gradients": {key: getattr(grad, "full_tensor", grad.clone)() for key, grad in gradients.items()},
        }
    return results


def parallel_worker(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = parallel_results(rank, folder)
    torch.save(results, f"{folder}/results{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may outlive an orderly exit


PARALLEL = {
    "tp-gpt2": ("gpt2", {}),
    "tp-speedrun": ("speedrun", {}),
    "tp-qk_norm": ("gqa", {"use_qk_norm": True}),
    "fsdp-gpt2": ("gpt2", {}),
    "fsdp-speedrun": ("speedrun", {}),
    "fsdp-frontier": ("frontier_sliding_mixed", {}),
    "pp-modern": ("modern", {}),
    "pp-sliding_mixed": ("sliding_mixed", {}),
    "pp-gpt2": ("gpt2", {}),
    "pp-unet": ("modern", {"use_unet_skips": True}),
    "pp-frontier": ("frontier_sliding_mixed", {}),
    "tp-frontier": ("frontier_sliding_mixed", {}),
}


@pytest.fixture(scope="module")
def parallel(tmp_path_factory) -> list[dict]:
    """Return the results of both processes."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, (flag_set, flags) in PARALLEL.items():
        tiny_model(flag_set, **flags).save_pretrained(folder / name)
    torch.multiprocessing.spawn(parallel_worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"results{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", [name for name in PARALLEL if not name.startswith("pp") and name != "tp-frontier"])
def test_model_that_two_processes_share_has_the_same_gradients(parallel, name):
    """transformers shards by tensor parallelism and FSDP2 with the plans of the configuration and the class."""
    flag_set, flags = PARALLEL[name]
    model, input_ids = tiny_model(flag_set, **flags), random_ids(2, 8)
    expected = model(input_ids, labels=input_ids)
    expected.loss.backward()
    for result in (process[name] for process in parallel):
        assert result["local"] == (model.config.intermediate_size // 2, 32)
        close(result["logits"], expected.logits)
        close(result["loss"], expected.loss)
        torch.testing.assert_close(
            result["gradients"], {key: weight.grad for key, weight in model.named_parameters()}, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("name", ["pp-modern", "pp-sliding_mixed"])
def test_pipeline_of_two_processes_computes_the_same(parallel, name):
    model, input_ids = tiny_model(PARALLEL[name][0]), random_ids(2, 8)
    generation = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(input_ids, pad_token_id=0, eos_token_id=None, **generation)
    assert [process[name]["owned"] for process in parallel] == [[True, False], [False, True]]
    for process in parallel:
        close(process[name]["logits"], logits_of(model, input_ids))
        assert torch.equal(process[name]["generated"], expected)


@pytest.mark.parametrize("name", ["pp-gpt2", "pp-unet", "pp-frontier", "tp-frontier"])
def test_distribution_that_would_be_wrong_is_refused(parallel, name):
    starts = {"pp": "pp_size=2, but a stage", "tp": "tp_size=2, but it cannot split"}
    assert all(process[name].startswith(starts[name[:2]]) for process in parallel)


@EVERY_FLAG_SET
def test_pipeline_and_fsdp_plans_name_modules_and_their_order(flag_set):
    model = tiny_model(flag_set)
    modules = [name for name, _ in model.named_modules()]
    for name in (*model.fsdp_plan, *model.pp_plan):
        assert name.replace("*", "1") in modules, name
    assert {"model.embed_tokens", "model.layers.*", "lm_head"} <= set(model.fsdp_plan)
    if model.config.base_model_pp_plan is not None:
        stages = model.config.base_model_pp_plan
        assert list(stages) == ["embed_tokens", "layers", "norm"]
        assert stages["layers"][1] == stages["norm"][0]


# Classification


@PRESETS
@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_loss_of_a_sequence_is_that_of_its_problem(flag_set, problem):
    torch.manual_seed(0)
    num_labels = 1 if problem == "regression" else 3
    model = AutoModelForSequenceClassification.from_config(
        tiny_config(flag_set, num_labels=num_labels, pad_token_id=0)
    ).eval()
    input_ids = random_ids(4, 6) + 1
    labels = {
        "single_label": torch.tensor([0, 2, 1, 1]),
        "multi_label": torch.eye(3)[[0, 2, 1, 1]],
        "regression": torch.randn(4),
    }[problem]
    outputs = model(input_ids, labels=labels)
    losses = {
        "single_label": F.cross_entropy,
        "multi_label": F.binary_cross_entropy_with_logits,
        "regression": lambda logits, labels: F.mse_loss(logits.squeeze(), labels),
    }
    close(outputs.loss, losses[problem](outputs.logits, labels), atol=1e-6)


@PRESETS
@pytest.mark.parametrize(
    "auto_class",
    [AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering],
)
def test_other_head_on_a_language_model_is_saved_and_loaded(flag_set, auto_class, tmp_path):
    tiny_model(flag_set).save_pretrained(tmp_path / "language")
    model = auto_class.from_pretrained(tmp_path / "language", num_labels=3, pad_token_id=0)
    base = tiny_model(flag_set).model.state_dict()
    assert all(torch.equal(weight, base[name]) for name, weight in model.model.state_dict().items())
    model.save_pretrained(tmp_path / "other")
    loaded = auto_class.from_pretrained(tmp_path / "other")
    assert type(loaded) is type(model) and loaded.config.num_labels == 3
    with torch.no_grad():
        outputs, expected = (each.eval()(random_ids(2, 6) + 1, use_cache=False).to_tuple() for each in (loaded, model))
    assert len(outputs) == len(expected) > 0 and all(map(torch.equal, outputs, expected))


@PRESETS
def test_loss_of_an_answer_is_that_of_its_first_and_last_token(flag_set):
    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_config(tiny_config(flag_set)).eval()
    assert type(model) is GPT2ModernForQuestionAnswering
    first, last = torch.tensor([1, 4]), torch.tensor([3, 5])
    outputs = model(random_ids(2, 6), start_positions=first, end_positions=last)
    assert outputs.start_logits.shape == outputs.end_logits.shape == (2, 6)
    expected = F.cross_entropy(outputs.start_logits, first) + F.cross_entropy(outputs.end_logits, last)
    close(outputs.loss, expected / 2, atol=1e-6)
    outputs.loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_tokens_without_a_label_do_not_count():
    model = AutoModelForTokenClassification.from_config(tiny_config("modern", num_labels=5)).eval()
    input_ids, labels = random_ids(2, 6), random_ids(2, 6) % 5
    labels[:, :2] = -100
    outputs = model(input_ids, labels=labels)
    close(outputs.loss, F.cross_entropy(outputs.logits[:, 2:].flatten(0, 1), labels[:, 2:].flatten()))


# Trainer


def train(model: nn.Module, rows: list[dict], folder, batch_size: int, accumulation: int, **arguments) -> dict:
    """Take two steps of plain gradient descent over `rows` in order, and return the weights."""
    arguments = TrainingArguments(
        folder,
        max_steps=2,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **arguments,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return model.state_dict()


def language_rows() -> list[dict]:
    """Return eight rows, each with a different number of labels."""
    rows = [{"input_ids": row, "labels": row.clone()} for row in random_ids(8, 10)]
    for index, row in enumerate(rows):
        row["labels"][: index % 5 * 2] = -100
    return rows


@PRESETS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_accumulates_to_the_gradient_of_the_whole_batch(flag_set, smoothing, tmp_path):
    """Each label has the same weight in any micro-batch; smoothed losses are averaged over micro-batches."""
    rows = language_rows()
    if smoothing:
        rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    whole = train(tiny_model(flag_set), rows, tmp_path, 4, 1, label_smoothing_factor=smoothing)
    pieces = train(tiny_model(flag_set), rows, tmp_path, 2, 2, label_smoothing_factor=smoothing)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=0)
    initial = tiny_model(flag_set).state_dict()
    assert all(not torch.equal(weight, initial[name]) for name, weight in whole.items())


def test_trainer_takes_the_step_of_the_loss_by_hand(tmp_path):
    rows = language_rows()
    trained = train(tiny_model("padded_vocabulary"), rows, tmp_path, 2, 2)
    model = tiny_model("padded_vocabulary")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in (rows[:4], rows[4:]):
        labels = torch.stack([row["labels"] for row in batch])
        logits = model(torch.stack([row["input_ids"] for row in batch])).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(trained, model.state_dict(), atol=1e-5, rtol=0)


def test_trainer_averages_a_classifier_over_its_micro_batches(tmp_path):
    """A head that accepted num_items_in_batch without using it would multiply the loss by the accumulation steps."""

    def classifier():
        torch.manual_seed(0)
        return GPT2ModernForSequenceClassification(tiny_config(num_labels=3, pad_token_id=95))

    rows = [{"input_ids": row, "labels": index % 3} for index, row in enumerate(random_ids(8, 6))]
    whole = train(classifier(), rows, tmp_path, 4, 1)
    torch.testing.assert_close(train(classifier(), rows, tmp_path, 2, 2), whole, atol=1e-5, rtol=0)


# PEFT and TRL


@EVERY_FLAG_SET
def test_lora_trains_and_is_saved_loaded_and_merged(flag_set, tmp_path):
    input_ids = random_ids(2, 8)
    model = get_peft_model(tiny_model(flag_set), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert (
        sum(name.endswith("_proj") for name in adapted)
        == len(adapted)
        == sum(name.endswith("_proj") for name, _ in tiny_model(flag_set).named_modules())
    )
    before = logits_of(model, input_ids)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):  # the first step moves B away from zero, the second one A
        optimizer.zero_grad()
        model(input_ids=input_ids, labels=input_ids, skip_logits=True).loss.backward()
        optimizer.step()
    trained = logits_of(model.eval(), input_ids)
    assert (trained - before).abs().max() > 1e-2

    model.save_pretrained(tmp_path)
    assert all("lora" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(tiny_model(flag_set), tmp_path).eval()
    close(logits_of(loaded, input_ids), trained)
    merged = loaded.merge_and_unload()
    assert type(merged) is GPT2ModernForCausalLM
    close(logits_of(merged, input_ids), trained)
    merged.save_pretrained(tmp_path / "merged")
    close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), input_ids), trained)


@EVERY_FLAG_SET
def test_lora_on_the_head_has_the_loss_of_the_trainer(flag_set):
    """The head is then called and not read, and the labels are a view of the batch."""
    batch = random_ids(2, 9)
    expected = batch_loss(tiny_model(flag_set, tie_word_embeddings=False), batch, num_items=16, z_loss=1e-4)
    adapter = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(flag_set, tie_word_embeddings=False), adapter)
    losses = batch_loss(model, batch, num_items=16, z_loss=1e-4)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
    losses[0].backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_lora_on_the_bigrams_starts_as_the_model():
    model, input_ids = tiny_model("frontier"), random_ids(2, 9)
    expected = logits_of(model, input_ids)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["embed_bigrams"], task_type="CAUSAL_LM"))
    close(adapted(input_ids).logits, expected)


@PRESETS
@pytest.mark.parametrize("tuning", [PrefixTuningConfig, PromptTuningConfig])
def test_virtual_tokens_in_front_of_the_input_are_trained_and_generated_from(flag_set, tuning):
    """Prefixes enter as a cache, prompts as inputs_embeds."""
    model, input_ids = tiny_model(flag_set), random_ids(2, 8)
    mask = torch.ones_like(input_ids)
    before = logits_of(model, input_ids)
    model = get_peft_model(model, tuning(task_type="CAUSAL_LM", num_virtual_tokens=3))
    if tuning is PromptTuningConfig and model.base_model.model.reads_token_ids:
        with pytest.raises(ValueError, match="need input_ids, not inputs_embeds"):
            model(input_ids=input_ids, attention_mask=mask)
        return
    outputs = model(input_ids=input_ids, attention_mask=mask, labels=input_ids)
    outputs.loss.backward()
    assert all(weight.grad.any() for weight in model.parameters() if weight.requires_grad)
    assert (outputs.logits[:, -8:] - before).abs().max() > 1e-3
    generated = model.generate(
        input_ids=input_ids, attention_mask=mask, max_new_tokens=4, pad_token_id=0, eos_token_id=None
    )
    assert generated.shape == (2, 12)


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(90)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0", eos_token="w89")


TEXTS = Dataset.from_dict({"text": ["w1 w2 w3 w4", "w5 w6 w7"] * 4})
CONVERSATIONS = Dataset.from_dict({"prompt": ["w1 w2 w3"] * 4, "completion": ["w4 w5"] * 4})


@pytest.mark.parametrize(
    ("flag_set", "dataset", "settings"),
    [
        ("gpt2", TEXTS, {}),
        ("modern", TEXTS, {"packing": True, "max_length": 8}),
        ("speedrun", CONVERSATIONS, {"completion_only_loss": True, "gradient_checkpointing": True}),
    ],
    ids=["texts", "packed texts", "completions"],
)
def test_trl_fine_tunes(flag_set, dataset, settings, tmp_path):
    model = tiny_model(flag_set)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    arguments = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "report_to": []}
    arguments |= {"gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True} | settings
    trainer = SFTTrainer(
        model, SFTConfig(tmp_path, **arguments), train_dataset=dataset, processing_class=word_tokenizer()
    )
    assert 3.0 < trainer.train().training_loss < 7.0
    assert all(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_trl_packs_texts_that_do_not_see_each_other(tmp_path):
    """TRL warns that only flash attention separates packed texts; in this model every attention does."""
    losses = []
    for settings in ({"per_device_train_batch_size": 8}, {"packing": True, "max_length": 9, "bf16": False}):
        arguments = {"max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False, "report_to": []}
        arguments |= {"gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True} | settings
        trainer = SFTTrainer(
            tiny_model("modern"),
            SFTConfig(tmp_path, **arguments),
            train_dataset=TEXTS,
            processing_class=word_tokenizer(),
        )
        losses.append(trainer.train().training_loss)
    assert len(trainer.train_dataset) == 4
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


# Quantisation


def test_head_of_a_quantised_weight_is_called_and_not_read():
    """torchao keeps nn.Linear and replaces its weight by a tensor of another type."""
    quantisation = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model, input_ids = tiny_model("speedrun"), random_ids(2, 8)
    expected = model(input_ids, labels=input_ids)
    quantisation.quantize_(model, quantisation.Int8WeightOnlyConfig())
    assert type(model.lm_head) is nn.Linear and type(model.lm_head.weight.data) is not torch.Tensor
    actual = model(input_ids, labels=input_ids, skip_logits=True)
    close(actual.loss, expected.loss, atol=0.02)
