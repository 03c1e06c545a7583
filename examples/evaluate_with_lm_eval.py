"""Evaluate a model folder with lm-eval as a library, and print its table.

python examples/evaluate_with_lm_eval.py --model out/mine --tasks lambada_openai hellaswag --limit 100
"""

import argparse
import json
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True, help="model folder, or name on the Hub")
parser.add_argument("--tasks", nargs="+", default=["lambada_openai"], help="names of lm-eval's tasks, or of your own")
parser.add_argument("--include_path", help="folder with YAML files of your own tasks")
parser.add_argument("--limit", type=int, help="documents of each task; default: all")
parser.add_argument("--device", help="cpu, cuda:0, ...; default: a GPU if there is one")
parser.add_argument("--output", help="JSON file for the results")
arguments = parser.parse_args()

results = simple_evaluate(
    model="hf",
    model_args={"pretrained": arguments.model, "trust_remote_code": True, "dtype": "float32"},
    tasks=arguments.tasks,
    task_manager=TaskManager(include_path=arguments.include_path),
    limit=arguments.limit,
    device=arguments.device,
)
print(make_table(results))
if arguments.output:
    Path(arguments.output).write_text(json.dumps(results["results"], indent=2))
