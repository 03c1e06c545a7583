"""Train LoRA adapters of a model with PEFT and Trainer; the data is prepared with the model's tokenizer.

python examples/lora.py --model out/mine --data_dir data/more --output_dir out/lora --learning_rate 2e-4
"""

from dataclasses import dataclass, field

from datasets import load_from_disk
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments
from transformers import default_data_collator as collator


@dataclass
class Arguments:
    model: str = field(metadata={"help": "model folder, or name on the Hub"})
    data_dir: str = field(metadata={"help": "folder that prepare_data.py --tokenizer_name MODEL has written"})
    rank: int = field(default=16, metadata={"help": "inner width of each adapter"})


arguments, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
data = load_from_disk(arguments.data_dir)
tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(arguments.model, trust_remote_code=True)
settings = LoraConfig(
    task_type="CAUSAL_LM", r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules="all-linear"
)
model = get_peft_model(model, settings)
model.print_trainable_parameters()
splits = {"train_dataset": data["train"], "eval_dataset": data["validation"]}
trainer = Trainer(model, training, data_collator=collator, processing_class=tokenizer, **splits)
trainer.train()
trainer.save_metrics("eval", trainer.evaluate())
trainer.save_model()  # the adapters alone; AutoPeftModelForCausalLM loads them with the model
