"""Wrong inputs of every command and the line each is answered with: the cases of test_bad_inputs.py.

Those with advice are the rows of docs/errors.md; `python -m tests.support.bad_inputs` writes the page.
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
TINY = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"

# What precedes the flags of a case; a flag is left out where the case gives it or its rival.
COMMANDS = {
    "train_accelerate.py": {
        "--data_dir": "data", "--output_dir": "run", "--config_overrides": TINY, "--per_device_train_batch_size": "4",
        "--total_batch_size": "256", "--max_steps": "8", "--warmup_steps": "2",
    },
    "prepare_data.py": {
        "--train_file": "text.txt", "--tokenizer_name": "data/tokenizer", "--output_dir": "prepared", "--num_proc": "1",
    },
    "prepare_data.py verify": {},
    "prepare_data.py report": {"--data_dir": "data", "--output": "page.html"},
    "eval.perplexity": {"--model": "model", "--data": "data"},
    "eval.run": {"--model": "model", "--data": "data", "--tasks": "hellaswag,lambada"},
    "eval.generate": {"--model": "model", "--prompt": "def "},
    "eval.compare": {"--run": "model", "--output": "page.html"},
    "eval.playground": {"--model": "model"},
    "benchmarks.targets": {"--output": "reports", "--data": "data", "--steps": "1", "--block_size": "32"},
    "benchmarks.precision": {"--output": "reports", "--data": "data"},
    "benchmarks.gpu": {"--output": "reports", "--data": "data", "--device": "cpu"},
    "benchmarks.data": {"--tokenizer_name": "data/tokenizer", "--output": "reports", "--work_dir": "reports"},
    "gpt2modern.conversion": {"--model": "model", "--output_dir": "native"},
}  # fmt: skip
TRAIN, PREPARE, VERIFY, REPORT, PERPLEXITY, RUN, GENERATE, COMPARE, PLAYGROUND, *BENCHMARKS_OF_SPEED, CONVERT = COMMANDS
TARGETS, PRECISION, GPU, DATA_BENCHMARK = BENCHMARKS_OF_SPEED
RIVALS = {"--dataset_name": "--train_file", "--train_tokenizer": "--tokenizer_name"}


@dataclass(frozen=True)
class BadInput:
    """A command with a mistake in it, and a part of the line that it is answered with.

    flags: added to those of COMMANDS. advice: what to do, where the line does not say it. Names of files and folders
    are those that test_bad_inputs.py makes and describes. environment: variables set; without: a package that is not
    installed; bare: without the flags of COMMANDS.
    """

    command: str
    flags: str
    error: str
    advice: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    without: str | None = None
    bare: bool = False

    @property
    def typed(self) -> str:
        """Return the command as the page shows it."""
        words = [f"{name}={value}" for name, value in self.environment.items()]
        text = " ".join([*words, self.command, *([self.flags] if self.flags else [])])
        return text.replace(f"{TINY},", "").replace("\udce9", "\\xe9").replace("long" * 80, "longlong...")

    @property
    def argv(self) -> list[str]:
        given = shlex.split(self.flags)
        names = {word.split("=")[0] for word in given}
        left_out = names | {RIVALS[name] for name in names if name in RIVALS}
        first = {} if self.bare else {k: v for k, v in COMMANDS[self.command].items() if k not in left_out}
        subcommand = self.command.split()[1:]
        return [*subcommand, *(word for pair in first.items() for word in pair), *given]


def train(flags: str, error: str, advice: str = "", **more) -> BadInput:
    return BadInput(TRAIN, flags, error, advice, **more)


def overrides(settings: str, error: str, advice: str = "") -> BadInput:
    return train(f"--config_overrides {TINY},{settings}", error, advice)


def environment(name: str, value: str, error: str, advice: str = "") -> BadInput:
    return train("", error, advice, environment={name: value})


HUGE = 10**23
FLAGS = [
    train("--max_stepss 3", "unknown argument '--max_stepss' (did you mean '--max_steps'?)"),
    train("--max_steps many", "--max_steps: invalid int value: 'many'"),
    train("--max_steps 0", "--max_steps 0 must be at least 1"),
    train("--max_steps 99999999999", "--max_steps 99999999999 must be at most 2147483647"),
    train("--learning_rate nan", "--learning_rate nan must be a finite number"),
    train("--learning_rate inf", "--learning_rate inf must be a finite number"),
    train("--adam_beta1 1.5", "--adam_beta1 1.5 must be at most 0.99999"),
    train("--adam_epsilon -1", "--adam_epsilon -1.0 must be at least 0"),
    train("--seed 18446744073709551616", "--seed 18446744073709551616 must be at most 9223372036854775807"),
    train("--dataloader_num_workers 100000", "--dataloader_num_workers 100000 must be at most 256"),
    train("--ddp_timeout 99999999999999", "--ddp_timeout 99999999999999 must be at most 2147483647"),
    train("--warmup_steps 9", "--warmup_steps 9 is more than --max_steps 8"),
    train("--warmup_ratio 0.5", "--warmup_steps 2 and --warmup_ratio 0.5 set the same value; give only one of them"),
    train("--warmup_ratio 1.5", "--warmup_ratio 1.5 must be at most 1"),
    train("--batch_size_ramp 2 1", "--batch_size_ramp [2.0, 1.0] must rise"),
    train("--batch_size_ramp 0 1", "--batch_size_ramp 0.0 must be at least 0.001"),
    train("--batch_size_ramp 1 2 --batch_size_warmup_steps 2", "replaces --batch_size_warmup_steps; omit one"),
    train(
        "--batch_size_ramp 0.001 1000", "--batch_size_ramp [0.001, 1000.0] of --total_batch_size 256 gives steps that"
    ),
    train("--batch_size_ramp 1 3", "--batch_size_ramp [1.0, 3.0] of --total_batch_size 256 gives steps that are not"),
    train("--sliding_window_ramp 0 1", "--sliding_window_ramp 0.0 must be at least 0.001"),
    train("--sliding_window_ramp 1 2 3 4 5 6 7 8 9", "--sliding_window_ramp has more than 8 values"),
    train("--sliding_window_ramp 1 2 --max_steps 1 --warmup_steps 0", "--sliding_window_ramp has more than 1 values"),
    train("--sliding_window_ramp 1 2", "--sliding_window_ramp needs a model with sliding layers"),
    train("--max_document_length 8", "--max_document_length 8 needs --document_masking true"),
    train("--depth 0", "--depth 0 must be at least 1"),
    train("--depth 4 --max_steps 0", "--max_steps 0 must be at least 1"),
    train("--depth 4 --block_size -5", "--block_size -5 must be at least 1"),
    train("--depth 4 --total_batch_size -8", "--total_batch_size -8 must be at least 1"),
    train("--depth 4 --model_name_or_path model", "--depth 4 is the size of a new model"),
    train("--average_last 1.5", "--average_last 1.5 must be at most 1"),
    train("--multi_token_prediction 0.5 -1", "--multi_token_prediction -1.0 must be at least 0"),
    train("--decay_steps 2", "are only for --lr_scheduler_type warmup_stable_decay, not for cosine; remove them"),
    train("--decay_type linear", "--decay_type linear is only for --lr_scheduler_type warmup_stable_decay"),
    train("--max_grad_norm inf", "--max_grad_norm inf must be a finite number"),
    train("--total_batch_size -64", "--total_batch_size -64 must be at least 1"),
    train("--total_batch_size 100", "= 128 tokens; use 128"),
    train("--total_batch_size 0", "--total_batch_size 0 must be at least 1"),
    train("--total_batch_size 128000", "blocks but one step takes 4000"),
    train("--per_device_train_batch_size some", "--per_device_train_batch_size 'some' must be a whole number or auto"),
    train("--per_device_train_batch_size 0", "--per_device_train_batch_size 0 must be at least 1"),
    train("--batch_size_warmup_steps 3", "warm-up cannot start from 32 tokens (--initial_total_batch_size)"),
    train("--initial_total_batch_size 128", "--initial_total_batch_size needs --batch_size_warmup_steps above 0"),
    train(
        "--block_size 1000000",
        "x --block_size 1000000 x 1 processes",
        "take a --block_size that divides --total_batch_size",
    ),
    train("--block_size 9223372036854775808", "--block_size 9223372036854775808 must be at most 2147483647"),
    train("--model_preset gpt5", "unknown preset 'gpt5'; the presets are gpt2,"),
    train("--attn_implementation fast", "--attn_implementation fast"),
    train("--mixed_precision int4", "--mixed_precision: invalid choice: 'int4'"),
    train("--max_train_time soon", "--max_train_time soon is invalid; give seconds, or hours:minutes:seconds"),
    train("--report_to printer", "--report_to printer is unknown; choose from none, trackio, tensorboard, wandb"),
    train("--optimizer sgd", "--optimizer sgd is unknown; choose from adamw, muon"),
    train("--project ''", "--project '' is empty; give it a value or omit the flag"),
    train("--run_name caf\udce9", "contains bytes that are not valid UTF-8 text; type it in UTF-8"),
    train("--hub_model_id a/b/c", "--hub_model_id 'a/b/c' is not a repository name; give owner/name"),
    train("--export_stock maybe", "argument --export_stock: invalid choice: 'maybe' (choose from"),
    train(
        f"--export_stock true --config_overrides {TINY},use_unet_skips=true",
        "the closest, LlamaForCausalLM, does not allow use_unet_skips=True",
        "leave out the setting, or `--export_stock`: then the model keeps its own code",
    ),
    train("--lora_rank 2", "--lora_rank 2 needs --model_name_or_path"),
    train("--lora_target_modules q_proj", "--lora_alpha and --lora_target_modules need --lora_rank above 0"),
    train("--lora_rank -1", "--lora_rank -1 must be at least 0"),
    BadInput(TRAIN, "--max_steps 3", "--data_dir and --output_dir are required", bare=True),
]

SETTINGS_OF_THE_MODEL = [
    train("--config_overrides hiden_size=3", "no setting 'hiden_size' (did you mean 'hidden_size'?)"),
    train("--config_overrides hidden_size", "expected key=value, found 'hidden_size'"),
    train("--config_overrides hidden_size=abc", "hidden_size='abc' must be a whole number"),
    train(
        "--config_overrides hidden_size=!!python/object/apply:os.getcwd",
        "cannot read the value of 'hidden_size'",
        "give a plain value: YAML tags are not allowed",
    ),
    train("--config_overrides hidden_size=30,num_attention_heads=4", "hidden_size=30 is not a multiple of"),
    overrides("hidden_size=64", "'hidden_size' is given twice; keep one"),
    overrides("return_dict=false", "the model has no setting 'return_dict'", "choose a setting that README.md lists"),
    overrides("vocab_size=8", "must be between 1 and vocab_size=8", "omit it: the data decides it"),
    overrides("max_position_embeddings=16", "--block_size 32 is longer than max_position_embeddings=16"),
    overrides("initializer_range=-1", "initializer_range=-1 must not be negative"),
    overrides("norm_eps=.nan", "norm_eps=nan must be a finite number"),
    overrides("attention_scale=.inf", "attention_scale=inf must be a finite number"),
    overrides("hidden_dropout=1.0", "hidden_dropout=1.0 must be at least 0 and below 1"),
    overrides("layer_types=[full_attention]", "(2) must be equal to the number of"),
    overrides("rope_theta=-5", "rope_parameters has rope_theta=-5; it must be a finite number above 0"),
    overrides("rope_theta=nan", "rope_parameters has rope_theta='nan'; it must be a finite number above 0"),
    overrides("rope_parameters='{rope_type: linear, factor: -3}'", "factor=-3; it must be a finite number above 0"),
    overrides(
        "rope_parameters='{rope_type: longrope, factor: 2, short_factor: [1], long_factor: [1]}'",
        "short_factor=[1]; it must be a list of 8 numbers",
    ),
    overrides("rope_theta=null", "rope_parameters has rope_theta=None; it must be a finite number above 0"),
    overrides(f"rope_theta={HUGE}", f"rope_parameters has rope_theta={HUGE}; it must be a finite number above 0"),
    train(f"--config_overrides hidden_size={HUGE}", f"hidden_size={HUGE} must be at most 2147483647"),
    train(f"--config_overrides num_hidden_layers={2**63 - 1}", "num_hidden_layers=9223372036854775807 must be at most"),
    overrides(f"head_dim={HUGE}", f"head_dim={HUGE} must be at most 2147483647"),
    overrides(f"sliding_window={HUGE}", f"sliding_window={HUGE} must be at most 2147483647"),
    overrides(f"final_logit_softcapping={HUGE}", f"final_logit_softcapping={HUGE} must be at most 2147483647"),
    overrides(f"max_position_embeddings={'9' * 5000}", "cannot read the value of 'max_position_embeddings'"),
    overrides("max_position_embeddings=2024-99-99", "cannot read the value of 'max_position_embeddings': '2024-99-99'"),
    overrides("eos_token_id=99999", "eos_token_id=99999 must be between 0 and 319", "omit it: the data has it"),
    overrides(
        "value_embedding_layers=[2]", "value_embedding_layers=[2] must be None, 'alternating', or rising layers up to 1"
    ),
    overrides("use_key_offset=true", "use_key_offset needs position_embedding_type='rope' with partial_rotary"),
    overrides("pad_token_id=-1", "pad_token_id=-1 must be between 0 and 319"),
]

RECIPES = [
    train("--config dmeo", "--config dmeo: no such file or recipe; the recipes are ablation, chat-finetune, demo,"),
    train("--config nowhere.yaml", "--config nowhere.yaml cannot be read (No such file or directory)"),
    train("--config data", "--config data cannot be read (Is a directory); name a YAML file"),
    train("--config loop", "--config loop cannot be read (Too many levels of symbolic links)"),
    train("--config typo.yaml", "--config typo.yaml: unknown key 'sed' (did you mean 'seed'?)"),
    train("--config twice.yaml", "--config twice.yaml: the key 'seed' is given twice; keep only one"),
    train("--config tag.yaml", "--config tag.yaml is not valid YAML", "give plain values: YAML tags are refused"),
    train("--config tab.yaml", "--config tab.yaml is not valid YAML", "indent with spaces, not tabs"),
    train("--config nested.yaml", "--config nested.yaml: unknown key 'training'", "put all keys at the left edge"),
    train("--config deep.yaml", "--config deep.yaml is nested too deeply"),
    train("--config list.yaml", "--config list.yaml must have 'flag: value' lines, but"),
    train("--config no_value.yaml", "--config no_value.yaml: the key 'seed' is None; give one value"),
    train(
        "--config list_in_list.yaml",
        "--config list_in_list.yaml: the key 'sample_prompts' is [['a'], 'b']; give a value or a list of values",
    ),
    train("--config latin.yaml", "--config latin.yaml is not valid YAML: 'utf-8' codec", "save it as UTF-8"),
    train("--config nan.yaml", "--learning_rate nan must be a finite number"),
    train("--config digits.yaml", "--config digits.yaml: argument --seed: invalid int value: '99999999999"),
    train("--config hexadecimal.yaml", "--config hexadecimal.yaml: argument --seed: invalid int value: '0xfffff"),
    train("--config date.yaml", "--config date.yaml: argument --seed: invalid int value: '2024-99-99'"),
    train("--config date_key.yaml", "--config date_key.yaml: unknown key '2024-99-99'"),
    train("--config no_digits.yaml", "--config no_digits.yaml is not valid YAML: string index out of range"),
    train("--config no_pairs.yaml", "--config no_pairs.yaml is not valid YAML"),
]

PLACES = [
    train("--data_dir nowhere", "nowhere/manifest.json: no such file; name a folder that prepare_data.py has written"),
    train("--data_dir model", "model/manifest.json: no such file"),
    train("--data_dir loop", "loop/manifest.json: no such file"),
    train("--data_dir no_bytes", "no_bytes/manifest.json: the split validation has 0 bytes of text in"),
    train("--data_dir odd_source", "odd_source/manifest.json: a value is missing or not of its type (TypeError"),
    train("--data_dir a/b", "a/b: no such folder, and it cannot be downloaded from the Hub"),
    train("--output_dir ''", "--output_dir '' is empty"),
    train("--output_dir data", "--output_dir data is the --data_dir or inside it; use another folder"),
    train("--output_dir data/train", "--output_dir data/train is the --data_dir or inside it"),
    train("--output_dir text.txt/run", "text.txt is a file, not a folder; choose another path"),
    train("--output_dir loop", "--output_dir loop cannot be used (Too many levels of symbolic links)"),
    train(f"--output_dir {'long' * 80}", "(File name too long); choose another path"),
    train("--output_dir thesis", "--output_dir thesis contains a README.md that was not written by a training run"),
    train("--resume_from_checkpoint nowhere", "--resume_from_checkpoint nowhere: nowhere/checksums.json is missing"),
    train("--resume_from_checkpoint model", "model/checksums.json is missing", "name a folder of RUN/checkpoints"),
    train(
        "--resume_from_checkpoint escaping",
        "'../model/model.safetensors' is outside the checkpoint",
        "take another checkpoint: this one was tampered with",
    ),
    train("--resume_from_checkpoint altered", "altered/model.safetensors was altered", "take another checkpoint"),
    train(
        "--resume_from_checkpoint hub --hub_model_id a/b",
        "--resume_from_checkpoint hub: a/b cannot be downloaded: OfflineModeIsEnabled",
        "unset HF_HUB_OFFLINE, or resume from --output_dir with auto",
    ),
]

ENVIRONMENT = [
    environment("WORLD_SIZE", "two", "WORLD_SIZE=two in the environment is not a number from 1 to"),
    environment("WORLD_SIZE", "2", "has variables of a launcher, but not RANK, LOCAL_RANK, MASTER_ADDR"),
    environment("LOCAL_RANK", "first", "is not a number from 0 to 0", "unset what an earlier launch left behind"),
    environment("ACCELERATE_TORCH_DEVICE", "toaster", "cannot set up 1 process(es)", "unset ACCELERATE_TORCH_DEVICE"),
    environment(
        "ACCELERATE_MIXED_PRECISION", "fp7", "mixed precision 'fp7' of the launcher is unknown; choose from no,"
    ),
    environment("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "sets gradient_accumulation_steps=4; remove it"),
    environment("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed is not supported"),
    environment("ACCELERATE_DYNAMO_BACKEND", "inductor", "sets dynamo_backend inductor; remove it"),
    train("--mixed_precision fp16", "--mixed_precision fp16 needs a GPU", environment={"ACCELERATE_USE_CPU": "true"}),
    train(
        "--report_to wandb",
        "--report_to wandb: wandb is not installed; run: python -m pip install wandb",
        without="wandb",
    ),
    train(
        "--model_name_or_path model --config_overrides '' --lora_rank 2",
        "--lora_rank needs peft, which is not installed: pip install peft",
        without="peft",
    ),
]


def finetune(flags: str, error: str, advice: str = "") -> BadInput:
    return train(f"--config_overrides '' {flags}", error, advice)


MODELS = [
    finetune("--model_name_or_path data", "--model_name_or_path data is not a model folder: it has no config.json"),
    finetune("--model_name_or_path bloom", "a bloom model has no counterpart in GPT2-Modern; supported"),
    finetune("--model_name_or_path gpt2_config", "gpt2_config cannot be loaded"),
    finetune("--model_name_or_path other_tokenizer", "another tokenizer than"),
    finetune("--model_name_or_path no_weights", "--model_name_or_path no_weights cannot be loaded: Error no file"),
    finetune("--model_name_or_path half_weights", "--model_name_or_path half_weights cannot be loaded"),
    finetune("--model_name_or_path lost_tensor", "tensor model.norm.weight is missing"),
    finetune("--model_name_or_path not_numbers", "has NaN or infinite values; use an earlier checkpoint"),
    finetune(
        "--model_name_or_path own_code",
        "a evil model has no counterpart in GPT2-Modern",
        "convert it to an architecture of transformers: code in a model folder is never run",
    ),
    finetune("--model_name_or_path model --output_dir model", "--output_dir model is the --model_name_or_path"),
    finetune("--model_name_or_path model --block_size 64", "is longer than max_position_embeddings=32"),
    finetune(
        "--model_name_or_path model --lora_rank 2 --lora_target_modules c_attn",
        "--lora_target_modules c_attn is not in this model; its layers have down_proj,",
    ),
    finetune("--model_name_or_path model --lora_rank 2 --optimizer muon", "use --optimizer adamw with --lora_rank"),
    train("--model_name_or_path model", "--config_overrides cannot set hidden_size with --model_name_or_path"),
    BadInput(GENERATE, "", "required: --model", bare=True),
    BadInput(GENERATE, "--model nowhere/at/all", "--model nowhere/at/all is neither a folder nor a Hub repository id"),
    BadInput(GENERATE, "--model data", "--model data is not a model folder: it has no config.json"),
    BadInput(GENERATE, "--model no_weights", "--model no_weights cannot be loaded: Error no file"),
    BadInput(GENERATE, "--model half_weights", "--model half_weights cannot be loaded", "copy it again"),
    BadInput(GENERATE, "--model lost_tensor", "tensor model.norm.weight is missing", "copy it again"),
    BadInput(
        GENERATE,
        "--model other_width",
        "has shape (32, 128) in the file, but (32, 8) according to config.json",
        "put back its own config.json",
    ),
    BadInput(GENERATE, "--model gpt2_config", "(config.json describes a gpt2 model)", "put back its own config.json"),
    BadInput(GENERATE, "--model not_numbers", "has NaN or infinite values"),
    BadInput(GENERATE, "--model own_code", "code from the folder is never run"),
    BadInput(
        GENERATE,
        "--model pickled",
        "--model pickled cannot be loaded: Weights only load failed",
        "ask for it as safetensors: pickled files can run code",
    ),
    BadInput(GENERATE, "--model quantized", "--model quantized cannot be loaded"),
    BadInput(GENERATE, "--model broken_config", "is not a valid JSON file"),
    BadInput(GENERATE, "--model no_tokenizer", "it has no tokenizer.json; save the tokenizer in the model folder"),
    BadInput(
        GENERATE,
        "--model other_tokenizer",
        "--model other_tokenizer has no tokenizer that can be loaded",
        "put back its own tokenizer.json",
    ),
    BadInput(
        GENERATE, "--model larger_tokenizer", "the tokenizer returns token id 300, but the model's vocab_size is only"
    ),
    BadInput(GENERATE, "--model learned --max_new_tokens 99", "in total more than the model's 32 positions"),
    BadInput(GENERATE, "--temperature nan", "--temperature nan must be a finite number"),
    BadInput(GENERATE, "--temperature 1e-9", "--temperature 1e-09 must be 0 or at least 0.01"),
    BadInput(GENERATE, "--top_p -0.5", "--top_p -0.5 must be at least 0"),
    BadInput(GENERATE, "--top_p 1.5", "--top_p 1.5 must be at most 1"),
    BadInput(GENERATE, "--seed -1", "--seed -1 must be at least 0"),
    BadInput(GENERATE, "--prompt caf\udce9", "contains bytes that are not valid UTF-8 text"),
    BadInput(GENERATE, "--output data", "--output data is a folder; give the path of a file"),
    BadInput(COMPARE, "", "required: --run", bare=True),
    BadInput(COMPARE, "--run nowhere", "nowhere is not the output folder of a training run"),
    BadInput(COMPARE, "", "model is not the output folder of a training run"),
    BadInput(PLAYGROUND, "--push_to_space page", "--push_to_space page must have the form owner/name"),
    BadInput(COMPARE, "--output page.pdf", "--output page.pdf must end in .html"),
    BadInput(PERPLEXITY, "--blok_size 3", "(did you mean '--block_size'?)"),
    BadInput(PERPLEXITY, "--split test", "--split: invalid choice: 'test'"),
    BadInput(PERPLEXITY, "--per_device_eval_batch_size 0", "--per_device_eval_batch_size 0 must be at least 1"),
    BadInput(PERPLEXITY, "--output text.txt/x", "text.txt is a file, not a folder; choose another path"),
    BadInput(PERPLEXITY, "--model other_tokenizer", "was prepared with another tokenizer than"),
    BadInput(PERPLEXITY, "--model learned --block_size 64", "use --block_size 32"),
    BadInput(PERPLEXITY, "--stride 33", "--stride 33 must be at most the block size 32"),
    BadInput(PERPLEXITY, "--length_factors 1 0", "--length_factors 0 must be at least 1"),
    BadInput(PERPLEXITY, "--data no_bytes", "the split validation has 0 bytes of text in"),
    BadInput(PERPLEXITY, "--data model", "model/manifest.json: no such file"),
    BadInput(RUN, "--tasks hellaswag,arc", "the task 'arc' is unknown; choose from perplexity, hellaswag, lambada"),
    BadInput(RUN, "--hellaswag missing.jsonl", "hellaswag: missing.jsonl cannot be read (No such file or directory)"),
    BadInput(RUN, "--hellaswag empty.txt", "hellaswag: empty.txt is empty; give a JSON-lines file with the columns of"),
    BadInput(RUN, "--hellaswag body.jsonl", "body.jsonl, document 1: 'ctx' is missing or of another type"),
    BadInput(RUN, "--hellaswag label.jsonl", "label.jsonl, document 1: its label 2 is none of the 2 endings"),
    BadInput(RUN, "--tasks lambada --lambada broken.jsonl", "lambada: broken.jsonl, document 1: Expecting property"),
    BadInput(RUN, "--tasks lambada --lambada latin.txt", "lambada: latin.txt cannot be read ("),
    BadInput(RUN, "--limit 0", "--limit 0 must be at least 1"),
    BadInput(RUN, "--model owner/name --update_card true", "--update_card: owner/name is no folder with a"),
    BadInput(RUN, "--model model --tasks perplexity", "--tasks perplexity needs --data with prepared data", bare=True),
    train("--eval_tasks arc", "the task 'arc' is unknown; choose from hellaswag, lambada"),
    train("--eval_tasks hellaswag=label.jsonl", "document 1: its label 2 is none of the 2 endings"),
    BadInput(CONVERT, "--model data", "--model data is not a model folder: it has no config.json"),
    BadInput(CONVERT, "--model lost_tensor", "tensor model.norm.weight is missing"),
    BadInput(
        CONVERT,
        "--model pickled",
        "--model pickled cannot be loaded",
        "get it as safetensors: pickled files can run code",
    ),
    BadInput(
        CONVERT,
        "--model own_code",
        "--model own_code cannot be loaded",
        "convert it with other tools: code in a model folder is never run",
    ),
    BadInput(CONVERT, "--architecture BertModel", "BertModel"),
    BadInput(CONVERT, "--outptu_dir x", "unknown argument '--outptu_dir' (did you mean '--output_dir'?)"),
    BadInput(CONVERT, "--output_dir data", "--output_dir data is not empty; delete it, or name another folder"),
    BadInput(CONVERT, "--output_dir text.txt/native", "text.txt is a file, not a folder; choose another path"),
]


def prepare(flags: str, error: str, advice: str = "") -> BadInput:
    return BadInput(PREPARE, flags, error, advice)


PREPARATION = [
    prepare("--dataset_name stdlib --train_file text.txt", "give exactly one of --dataset_name"),
    prepare("--train_tokenizer 300 --tokenizer_name data/tokenizer", "give exactly one of --train_tokenizer"),
    prepare("--train_tokenizer 100", "--train_tokenizer 100 must be at least 257"),
    prepare("--train_tokenizer 99999999999", "--train_tokenizer 99999999999 must be at most 16777216"),
    prepare("--block_size 0", "--block_size 0 must be at least 1"),
    prepare("--block_size 99999999999999999999", "--block_size 99999999999999999999 must be at most 16777216"),
    prepare(
        "--validation_split_percentage nan",
        "--validation_split_percentage nan must be greater than 0 and less than 100",
    ),
    prepare(
        "--train_file /dev/null", "/dev/null is a pipe or a device, which can be read only once; save it as a file"
    ),
    prepare("--train_file ''", "--train_file '' is empty"),
    prepare("--train_file missing.txt", "missing.txt: no such file"),
    prepare("--train_file table.xyz", "table.xyz has an unknown extension; known are"),
    prepare("--train_file empty.txt", "empty.txt is an empty file; omit it"),
    prepare("--train_file latin.txt", "latin.txt: byte 3 is not UTF-8"),
    prepare("--train_file broken.jsonl", "broken.jsonl: the JSON at byte 0 is not valid"),
    prepare("--train_file body.jsonl", "body.jsonl has no column 'text'; choose --text_column from body"),
    prepare("--train_file text.txt --file_format parquet", "text.txt cannot be read as parquet"),
    prepare("--tokenizer_name nowhere", "--tokenizer_name nowhere is not a tokenizer"),
    prepare("--tokenizer_name broken_tokenizer", "--tokenizer_name broken_tokenizer is not a tokenizer"),
    prepare("--tokenizer_name damaged_tokenizer", "has token id 4000000000; its tokenizer.json is damaged"),
    prepare("--dataset_name a/b", "--dataset_name a/b cannot be loaded"),
    prepare(
        "--tokenizer_name data/tokenizer --train_file text.txt --max_tokens 5",
        "--max_tokens 5 works only with --streaming or files of tokens; use --max_documents instead",
    ),
    prepare("--chat_template x", "--chat_template x works only with --chat_column; give both or none"),
    prepare(
        "--shard_index 5",
        "--shard_index 5 must be at least 0 and below --num_shards; give it, too",
        "give --num_shards",
    ),
    prepare("--push_to_hub true", "--push_to_hub needs the name of the dataset: --hub_dataset_id user/name"),
    prepare("--output_dir model", "--output_dir model exists and is not a prepared dataset; choose another folder"),
    prepare("--output_dir text.txt", "text.txt is a file, not a folder; choose another path"),
    prepare("--output_dir data", "--output_dir data was prepared with other settings or files"),
    BadInput(VERIFY, "", "usage: python prepare_data.py verify FOLDER"),
    BadInput(VERIFY, "model", "model/manifest.json: no such file"),
    BadInput(VERIFY, "escaping_data", "the file '../data/x.arrow' is outside of the folder"),
    BadInput(VERIFY, "cut_data", "the manifest says"),
    BadInput(REPORT, "--data_dir model", "model/manifest.json: no such file"),
    BadInput(REPORT, "--data_dir cut_data", "cannot be read"),
    BadInput(REPORT, "--output data", "--output data is a folder; give the path of a file"),
]

BENCHMARKS = [
    BadInput(TARGETS, "--parts speed", "speed"),
    BadInput(TARGETS, "--data nowhere", "nowhere"),
    BadInput(TARGETS, "--repetitions 0", "--repetitions 0 must be at least 1"),
    BadInput(TARGETS, "--steps 900", "1802 steps of 4 sequences need 7208; lower one of them"),
    BadInput(TARGETS, "--memory_tokens 320000", "3 steps of 10000 sequences need 30000; lower one of them"),
    BadInput(TARGETS, "--parts train --device tpu", "--device tpu"),
    BadInput(TARGETS, "--parts train --attn_implementation fast", "fast"),
    BadInput(TARGETS, "--output text.txt", "text.txt is a file, not a folder; choose another path"),
    BadInput(PRECISION, "--model_preset gpt5 --steps 10 --per_device_train_batch_size 1 --block_size 32", "gpt5"),
    BadInput(PRECISION, "--device cpu --precision tf32", "--precision tf32"),
    BadInput(PRECISION, "--data nowhere", "nowhere"),
    BadInput(PRECISION, "--data data", "50 steps of 8 sequences need 400; lower one of them"),
    BadInput(PRECISION, "--steps 3", "--steps 3 must be at least 10"),
    BadInput(PRECISION, "--tolerance nan", "--tolerance nan must be a finite number"),
    BadInput(GPU, "--minutes 0", "--minutes 0.0 must be at least 0.1"),
    BadInput(GPU, "--parts everything", "everything"),
    BadInput(GPU, "--data nowhere", "nowhere"),
    BadInput(GPU, "--data data", "15 steps of 64 sequences need 960; lower one of them"),
    BadInput(GPU, f"--config_overrides {TINY},heads=2 --block_size 4 --per_device_train_batch_size 4", "heads"),
    BadInput(DATA_BENCHMARK, "--text_dir nowhere", "--text_dir nowhere: no such folder"),
    BadInput(DATA_BENCHMARK, "--repetitions 0", "--repetitions 0 must be at least 1"),
    BadInput(DATA_BENCHMARK, "--tokenizer_name nowhere", "--tokenizer_name nowhere cannot be loaded"),
    BadInput(DATA_BENCHMARK, "--output text.txt", "text.txt is a file, not a folder; choose another path"),
]

TABLE = {
    "Flags of a run": FLAGS,
    "Settings of the model": SETTINGS_OF_THE_MODEL,
    "Recipes": RECIPES,
    "Folders and checkpoints": PLACES,
    "The environment": ENVIRONMENT,
    "Models": MODELS,
    "Preparing data": PREPARATION,
    "Benchmarks": BENCHMARKS,
}

HEAD = """\
# Errors

A wrong input is answered with one line on stderr that begins with `error: `, and exit code 2; nothing half-written is
left. A traceback is a defect of this project: please report it.

The line names the wrong value and, most often, what to do. Below are the lines that leave something to say; a part of
each is shown. `tests/test_bad_inputs.py` tries every one, and the many that need no advice. They come from
`tests/support/bad_inputs.py`; `python -m tests.support.bad_inputs` writes this page.

Secrets: tokens (`HF_TOKEN`, `WANDB_API_KEY`) belong in the environment or in the file of `hf auth login`. They are not
written anywhere. A value that is typed as a flag is not a secret: it is echoed in the error, and
`resolved_config.yaml` keeps the command line.
"""


def page() -> str:
    """Return the text of docs/errors.md: the rows that carry advice."""
    lines = [HEAD]
    for title, cases in TABLE.items():
        if rows := [case for case in cases if case.advice]:
            lines += [f"## {title}\n", "| what you did | what you see | what to do |", "| --- | --- | --- |"]
            lines += [f"| `{case.typed}` | `{case.error}` | {case.advice} |" for case in rows]
            lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
