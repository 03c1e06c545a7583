"""Evaluate a model on LAMBADA (openai), as `eval.run --tasks lambada` does.

python -m eval.lambada --model DIR [--data FILE.jsonl] [--limit N] [--output FILE.json]
"""

from functools import partial

from eval import run

main = partial(run.main, task="lambada", description=__doc__)

if __name__ == "__main__":
    main()
