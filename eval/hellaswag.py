"""Evaluate a model on HellaSwag, as `eval.run --tasks hellaswag` does.

python -m eval.hellaswag --model DIR [--data FILE.jsonl] [--limit N] [--output FILE.json]
"""

from functools import partial

from eval import run

main = partial(run.main, task="hellaswag", description=__doc__)

if __name__ == "__main__":
    main()
