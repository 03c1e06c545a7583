"""Fine-tune a model on conversations with TRL's SFTTrainer, with the loss on the assistant's turns only.

python examples/sft.py --model out/mine --chat_file chats.jsonl --output_dir out/sft
Each line of the file is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

# Between `generation` and `endgeneration` stands what the model learns to write: its answer, and to end it with EOS.
CHAT_TEMPLATE = """{% for message in messages %}{{ message.role }}:
{% if message.role == "assistant" %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{% else %}{{ message.content }}
{% endif %}{% endfor %}{{ "assistant:\n" if add_generation_prompt }}"""


@dataclass
class Arguments:
    model: str = field(metadata={"help": "model folder, or name on the Hub"})
    chat_file: str = field(metadata={"help": "JSON lines with the column messages"})


parser = HfArgumentParser((Arguments, SFTConfig))
parser.set_defaults(assistant_only_loss=True)
arguments, training = parser.parse_args_into_dataclasses()
chats = load_dataset("json", data_files=arguments.chat_file, split="train")
tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=True)
tokenizer.chat_template = CHAT_TEMPLATE
model = AutoModelForCausalLM.from_pretrained(arguments.model, trust_remote_code=True)
trainer = SFTTrainer(model, training, train_dataset=chats, processing_class=tokenizer)
trainer.train()
trainer.save_model()
