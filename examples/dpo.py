"""Align a model with preferences: TRL's DPOTrainer on pairs of a better and a worse answer.

python examples/dpo.py --model out/sft --preference_file preferences.jsonl --output_dir out/dpo
Each line of the file is {"prompt": "...", "chosen": "...", "rejected": "..."}.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import DPOConfig, DPOTrainer


@dataclass
class Arguments:
    model: str = field(metadata={"help": "model folder, or name on the Hub"})
    preference_file: str = field(metadata={"help": "JSON lines with prompt, chosen and rejected"})


arguments, training = HfArgumentParser((Arguments, DPOConfig)).parse_args_into_dataclasses()
pairs = load_dataset("json", data_files=arguments.preference_file, split="train")
tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(arguments.model, trust_remote_code=True)
reference = AutoModelForCausalLM.from_pretrained(arguments.model, trust_remote_code=True)
trainer = DPOTrainer(model, reference, training, train_dataset=pairs, processing_class=tokenizer)
trainer.train()
trainer.save_model()
