"""What the model writes after fixed prompts at each evaluation: samples.jsonl, and one line of each on the screen."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import AutoTokenizer, PreTrainedModel

from gpt2modern.errors import GPT2ModernError, warn
from gpt2modern.training.run import Run, hash_seed


def check_sample_prompts(
    prompts: Sequence[str] | None, max_new_tokens: int, *, tokenizer_path: Path, model: PreTrainedModel
) -> None:
    """Raise GPT2ModernError for a prompt that leaves a model with learned positions no room for `max_new_tokens`."""
    if prompts and model.config.position_embedding_type == "learned":
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
        longest = model.config.max_position_embeddings
        for prompt in prompts:
            length = max(1, len(tokenizer(prompt).input_ids))
            if length + max_new_tokens > longest:
                raise GPT2ModernError(
                    f"--sample_prompts {prompt[:30]!r}: its {length} tokens and --sample_max_new_tokens "
                    f"{max_new_tokens} are more than the {longest} positions that the model has learned"
                )


def sample(run: Run, generate_text: Callable[..., str]) -> None:
    """Continue the fixed prompts with the model as it is, append them to samples.jsonl and keep them in `run.samples`.

    generate_text: that of eval.generate. The draws follow from (seed, step, prompt) and leave the generators of
    training as they were. Other processes go on and meet the main one at the next reduction; a sharded model is
    asked on all of them, since each holds a part. A failure is a warning.
    """
    prompts = run.config.sample_prompts
    sharded = run.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if not prompts or not (run.accelerator.is_main_process or sharded):
        return
    device = run.accelerator.device
    tokenizer = AutoTokenizer.from_pretrained(run.train_blocks.tokenizer_path)
    run.unwrapped_model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            texts = [
                generate_text(
                    run.unwrapped_model,
                    tokenizer,
                    prompt,
                    max_new_tokens=run.config.sample_max_new_tokens,
                    seed=hash_seed(run.config.seed, run.step, number) % 2**63,
                )
                for number, prompt in enumerate(prompts)
            ]
    except Exception as error:
        warn(f"no samples at step {run.step}: {type(error).__name__}: {error}")
        return
    if run.accelerator.is_main_process:
        run.samples = [
            {"step": run.step, "prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)
        ]
        with_this_step = {row["step"] for row in run.sample_log.rows}
        for row in run.samples if run.step not in with_this_step else ():
            run.sample_log.append(row)


def on_one_line(sample: dict[str, Any], width: int = 100) -> str:
    """Prompt and text as Python would write them, cut to `width` characters."""
    shown = repr(sample["prompt"] + sample["text"])
    return shown if len(shown) <= width else shown[: width - 3] + "..."
