"""Train on texts that are in memory: a `datasets.Dataset` goes in, a model folder comes out.

python examples/in_memory.py --text_file shakespeare.txt --output_dir out/in_memory
"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import pipeline

from prepare_data import PrepareConfig, prepare
from train_accelerate import TrainConfig, train

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--text_file", required=True, help="any text; its paragraphs become the documents")
parser.add_argument("--output_dir", required=True)
parser.add_argument("--max_steps", type=int, default=300)
arguments = parser.parse_args()

documents = Dataset.from_dict({"text": Path(arguments.text_file).read_text(encoding="utf-8").split("\n\n")})
data_dir, model_dir = f"{arguments.output_dir}/data", f"{arguments.output_dir}/model"
prepare(PrepareConfig(train_tokenizer=1024, block_size=128, output_dir=data_dir), dataset=documents)
config = TrainConfig(
    data_dir=data_dir,
    output_dir=model_dir,
    config_overrides="hidden_size=128,num_hidden_layers=4",
    total_batch_size=1024,
    max_steps=arguments.max_steps,
    learning_rate=2e-3,
)
print("loss on the validation split:", train(config)["eval_loss"])
generate = pipeline("text-generation", model=model_dir, trust_remote_code=True)
print(generate("The ", max_new_tokens=40)[0]["generated_text"])
