"""Train a new model with transformers' Trainer on a folder that prepare_data.py has written.

python examples/trainer.py --data_dir data/mine --output_dir out/trainer --max_steps 500 --learning_rate 1e-3
"""

from dataclasses import dataclass, field

from datasets import load_from_disk
from transformers import AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers import default_data_collator as collator

from modeling_gpt2modern import GPT2ModernConfig, GPT2ModernForCausalLM


@dataclass
class Arguments:
    data_dir: str = field(metadata={"help": "folder that prepare_data.py has written"})
    model_preset: str = field(default="modern", metadata={"help": "gpt2, modern, speedrun, ..."})
    hidden_size: int = field(default=256, metadata={"help": "width; 768 in the preset"})
    num_hidden_layers: int = field(default=4, metadata={"help": "layers; 12 in the preset"})


arguments, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
set_seed(training.seed)  # of the initial weights
data = load_from_disk(arguments.data_dir)
tokenizer = AutoTokenizer.from_pretrained(f"{arguments.data_dir}/tokenizer")
sizes = {"hidden_size": arguments.hidden_size, "num_hidden_layers": arguments.num_hidden_layers}
config = GPT2ModernConfig.from_preset(arguments.model_preset, vocab_size=len(tokenizer), **sizes)
model = GPT2ModernForCausalLM(config)
splits = {"train_dataset": data["train"], "eval_dataset": data["validation"]}  # rows with input_ids and labels
trainer = Trainer(model, training, data_collator=collator, processing_class=tokenizer, **splits)
trainer.train()
trainer.save_metrics("eval", trainer.evaluate())
trainer.save_model()
