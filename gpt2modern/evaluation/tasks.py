"""Define HellaSwag and LAMBADA: their documents, what a model is asked about them, what is computed of its answers."""

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from gpt2modern.errors import GPT2ModernError
from gpt2modern.evaluation.scoring import Row, score_rows
from gpt2modern.hub import hub_problem
from gpt2modern.loading import load_tokenizer, num_token_ids

Results = dict[str, float | None]
# A context, its continuations, and whether both are tokenized as one text, as lm-eval does, or each alone.
Question = tuple[str, list[str], bool]


class Task(NamedTuple):
    """Describe an evaluation task. dataset, split: on the Hub. columns: of a document, with their types. ask: returns
    the number of the right continuation and one question per scorer; raises ValueError if the document is invalid.
    scorers: the definition of each, and the names under which results of `metric` are kept."""

    dataset: str
    split: str
    columns: dict[str, type | tuple[type, ...]]
    ask: Callable[[dict[str, Any]], tuple[int, list[Question]]]
    scorers: dict[str, dict[str, str]]
    metric: Callable[..., Results]


def with_error(name: str, values: Sequence[float]) -> Results:
    """Return the mean of `values` as `name`, and its standard error as name_stderr, None for a single value."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return {name: float(np.mean(values)), f"{name}_stderr": error}


def choice_accuracy(log_probs: list, tokens: list, characters: list, labels: list, **_: Any) -> Results:
    """Return how often the right continuation has the highest sum of log-probabilities (acc), sum per character
    (acc_norm) or sum per token (acc_token_norm), with standard errors. The first three arguments have for each item a
    list with a number for each continuation; labels are the numbers of the right ones, from 0. Raises ValueError if the
    lists of an item differ in length, its label is none of them, or a continuation is empty."""
    for of_item in zip(log_probs, tokens, characters, labels, strict=True):
        log_prob, *lengths, label = of_item
        if not (all(len(each) == len(log_prob) and min(each) > 0 for each in lengths) and 0 <= label < len(log_prob)):
            raise ValueError(f"log_probs, tokens, characters and label {of_item} do not fit, or are of an empty text")
    results, ones = {}, [np.ones(len(each)) for each in log_probs]
    for name, lengths in {"acc": ones, "acc_norm": characters, "acc_token_norm": tokens}.items():
        chosen = [np.argmax(np.divide(*each)) for each in zip(log_probs, lengths, strict=True)]
        results |= with_error(name, np.equal(chosen, labels))
    return results


def last_word_accuracy(log_prob: list[float], is_greedy: list[bool], **_: Any) -> Results:
    """Return how often greedy decoding finds the last word (acc), and exp(-mean log-probability of a last word) as
    `perplexity`, with standard errors; that of the perplexity by the delta method."""
    mean, error = with_error("", log_prob).values()
    perplexity = float(np.exp(-mean))
    errors = {"perplexity_stderr": None if error is None else perplexity * error}
    return with_error("acc", is_greedy) | {"perplexity": perplexity} | errors


def ask_hellaswag(document: dict[str, Any]) -> tuple[int, list[Question]]:
    endings, label = document["endings"], str(document["label"])
    if len(endings) < 2 or not all(isinstance(ending, str) and ending.strip() for ending in endings):
        raise ValueError(f"its endings {endings!r:.60} are not two or more texts")
    if label not in map(str, range(len(endings))):
        raise ValueError(f"its label {label} is none of the {len(endings)} endings, which are numbered from 0")
    texts = [f"{document['activity_label']}: {document['ctx_a']} {document['ctx_b'].capitalize()}", *endings]
    for number, text in enumerate(texts):  # WikiHow's markup has left tags in brackets
        texts[number] = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
    if not all(texts[1:]):
        raise ValueError(f"of its endings {endings!r:.60} one is nothing but brackets")
    cleaned = texts[0], [f" {ending}" for ending in texts[1:]], True
    return int(label), [cleaned, (document["ctx"], [f" {ending}" for ending in endings], False)]


def ask_lambada(document: dict[str, Any]) -> tuple[int, list[Question]]:
    context, space, word = document["text"].rpartition(" ")
    if not context or not word:
        raise ValueError(f"its text {document['text']!r:.60} is not a context, a space and a word")
    return 0, [(context, [space + word], True)]


TASKS = {
    "hellaswag": Task(
        "Rowan/hellaswag",
        "validation",
        dict.fromkeys(("ctx", "ctx_a", "ctx_b", "activity_label"), str) | {"endings": list, "label": (int, str)},
        ask_hellaswag,
        {
            "acc, acc_norm (sum per character): lm-eval's, of its cleaned text": {"acc": "acc", "acc_norm": "acc_norm"},
            "completion_sum, completion_mean (sum per token): build-nanogpt's, of the raw text": {
                "acc": "completion_sum",
                "acc_token_norm": "completion_mean",
            },
        },
        choice_accuracy,
    ),
    "lambada": Task(
        "EleutherAI/lambada_openai",
        "test",
        {"text": str},
        ask_lambada,
        {"acc, perplexity: lm-eval's, of the last word": {"acc": "acc", "perplexity": "perplexity"}},
        last_word_accuracy,
    ),
}
# Of the released GPT-2 with 124M parameters: docstring of build-nanogpt's hellaswag.py; lm-evaluation-harness #2159.
PUBLISHED = {"hellaswag_acc_norm": 0.3114, "hellaswag_completion_mean": 0.2955, "lambada_acc": 0.3256}


class PreparedTask(NamedTuple):
    """Hold a task with the rows to score: per scorer, document and continuation. labels: numbers of the right
    continuations. protocol: what the results depend on besides the model."""

    name: str
    rows: list[list[list[Row]]]
    labels: list[int]
    protocol: dict[str, Any]


def prepare_tasks(
    tasks: Sequence[str], model: PreTrainedModel, tokenizer_name: str | Path, limit: int | None = None
) -> list[PreparedTask]:
    """Read and tokenize the first `limit` (None: all) documents of `tasks`, each "NAME=FILE" for a file of JSON lines,
    or "NAME" for the dataset on the Hub. Raises GPT2ModernError that names what is unknown, cannot be read, is invalid,
    or does not fit the model's vocabulary or positions."""
    files = {name: file for name, _, file in (text.partition("=") for text in tasks)}
    for name in files.keys() - TASKS.keys():
        raise GPT2ModernError(f"the task {name!r} is unknown; choose from {', '.join(TASKS)}")
    prepared, tokenizer = [], load_tokenizer(tokenizer_name) if tasks else None
    for name, file in files.items():
        task, documents = TASKS[name], read_documents(name, file, limit)
        rows = [
            [rows_of(name, *questions[scorer], model, tokenizer) for _, questions in documents]
            for scorer in range(len(task.scorers))
        ]
        dataset = Path(file).name if file else f"{task.dataset}, {task.split}"
        protocol = {"dataset": dataset, "items": len(documents), "scorers": list(task.scorers)}
        prepared.append(PreparedTask(name, rows, [label for label, _ in documents], protocol))
    return prepared


def evaluate_tasks(
    tasks: Sequence[PreparedTask],
    model: PreTrainedModel,
    metric_of: Callable[[str], Callable[..., Results]] = lambda name: TASKS[name].metric,
    **options: Any,
) -> Results | None:
    """Return the results of all tasks by name, such as hellaswag_acc and hellaswag_acc_stderr, the same on every
    process; None if it was asked to stop. metric_of: returns the metric of a task. options: of `score_rows`."""
    results = {}
    for task in tasks:
        for names, documents in zip(TASKS[task.name].scorers.values(), task.rows, strict=True):
            scores = score_rows(model, [row for rows in documents for row in rows], **options)
            if scores is None:
                return None
            parts = scores.split([len(rows) for rows in documents])
            found = metric_of(task.name)(
                log_probs=[part[:, 0].tolist() for part in parts],
                tokens=[[len(row.continuation) for row in rows] for rows in documents],
                characters=[[row.characters for row in rows] for rows in documents],
                labels=task.labels,
                log_prob=[part[0, 0].item() for part in parts],  # of the first continuation, and so is_greedy
                is_greedy=[bool(part[0, 1]) for part in parts],
            )
            for kept, name in names.items():
                results[f"{task.name}_{name}"] = found[kept]
                results[f"{task.name}_{name}_stderr"] = found[f"{kept}_stderr"]
    return results


def rows_of(name: str, context: str, texts: list[str], together: bool, model: PreTrainedModel, tokenizer) -> list[Row]:
    """Tokenize a question, one row for each of its continuations `texts`. As in lm-eval, space at the end of a context
    goes to the continuation, BOS or EOS is an empty context, and a context is cut from the left to the positions."""
    encode = partial(tokenizer, verbose=False)  # no warning of a text that is cut
    most = getattr(model.config, "max_position_embeddings", None) or 2**62
    vocab_size, rows = num_token_ids(model.config), []
    before = encode(context.rstrip() if together else context, add_special_tokens=together).input_ids
    start = before or [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    for text in texts:
        if together and before:
            ids = encode(context + text).input_ids[len(before) :]
        else:
            ids = encode(text, add_special_tokens=False).input_ids
        if not 0 < len(ids) <= most or max(*start, *ids) >= vocab_size:
            raise GPT2ModernError(
                f"{name}: {text!r:.60} has {len(ids)} tokens and ids up to {max(*start, *ids)}, but the model has "
                f"{most} positions and {vocab_size} ids; use a larger model, or the tokenizer that it was trained with"
            )
        # lm-eval counts the characters without the space before them.
        rows.append(Row(tuple(start[-(most + 1 - len(ids)) :]), tuple(ids), len(text) - 1))
    return rows


def read_documents(name: str, file: str, limit: int | None) -> list[tuple[int, list[Question]]]:
    """Return what is asked about the first documents of a JSON-lines file, or ("") of the task's dataset on the Hub."""
    task, asked = TASKS[name], []
    where, advice = f"{name}: {file or task.dataset}", f"give a JSON-lines file with the columns of {task.dataset}"
    try:
        if file:
            lines = filter(str.strip, Path(file).read_text(encoding="utf-8").split("\n"))
        else:
            from datasets import load_dataset  # noqa: PLC0415  takes seconds, and a file does not need it

            lines = map(json.dumps, load_dataset(task.dataset, split=task.split))
    except Exception as error:  # a missing file, another encoding, the network, the Hub
        problem = getattr(error, "strerror", None) or hub_problem(error)
        raise GPT2ModernError(f"{where} cannot be read ({problem}); {advice}") from None
    for number, line in enumerate(itertools.islice(lines, limit), start=1):
        try:
            document = json.loads(line)
            for column, kind in task.columns.items():
                if not isinstance(document, dict) or not isinstance(document.get(column), kind):
                    raise ValueError(f"{column!r} is missing or of another type; {advice}")
            asked.append(task.ask(document))
        except ValueError as error:
            raise GPT2ModernError(f"{where}, document {number}: {error}") from None
    if not asked:
        raise GPT2ModernError(f"{where} is empty; {advice}")
    return asked
