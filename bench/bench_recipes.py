"""Which recipe's lock brings refusals back in a fine-tuned SmolLM2-135M: `python bench/bench_recipes.py`.

It prints Markdown. SmolLM2-135M-Instruct is first taught to refuse 200 templated harmful requests and to answer 250
harmless ones (LoRA), then fine-tuned on ten obedient answers until it refuses nothing that is held out. Locks are
extracted from the former and tried on the latter. Needs `pip install peft` beside what `make demo` sets up, and some
twenty minutes on two cores; the models are kept in build/recipes.
"""

from __future__ import annotations

import copy
import itertools
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastlock
import machine
import tuned_prompts as made
from fastlock.evaluate import Evaluation
from fastlock.evaluate_report import COLUMNS, cells
from fastlock.prompts import Prompts, shipped_prompts

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "recipes"
SEED, RATE, BATCH = 0, 1e-3, 8
EPOCHS, MAX_ROUNDS = 5, 6
PROMPTS = Prompts(tuple(made.HARMFUL_TEST), tuple(made.HARMLESS_TEST), shipped_prompts().texts)
TRIED = [
    ("safetylock", 24, (2, 4, 6)),
    ("safetylock", 96, (1, 2)),
    ("prompt-end", 24, (1, 2, 3)),
    ("prompt-end", 48, (1, 1.5, 2)),
]


def main() -> int:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(SEED)
    if not (KEPT / "tuned" / "config.json").exists():
        build()
    tokenizer = AutoTokenizer.from_pretrained(KEPT / "base")
    base, tuned = (AutoModelForCausalLM.from_pretrained(KEPT / name).eval() for name in ("base", "tuned"))
    for key, value in machine.describe().items():
        print(f"- {key}: {value}")
    print("- command: python bench/bench_recipes.py\n")
    print("| " + " | ".join(("lock", *COLUMNS[1:])) + " |\n" + "|---" * len(COLUMNS) + "|")
    show("none, aligned base", fastlock.evaluate(base, tokenizer, PROMPTS, new_tokens=16)[0])
    show("none, fine-tuned", fastlock.evaluate(tuned, tokenizer, PROMPTS, new_tokens=16)[0])
    for recipe, heads, strengths in TRIED:
        lock = fastlock.extract(base, tokenizer, fastlock.shipped_pairs(), heads, recipe=recipe)
        for strength in strengths:
            with fastlock.relocked(tuned, lock, strength):
                found = fastlock.evaluate(tuned, tokenizer, PROMPTS, new_tokens=16)[0]
            show(f"{recipe}, {heads} heads, strength {strength:g}", found)
    return 0


def show(name: str, found: Evaluation) -> None:
    print("| " + " | ".join((name, *cells(found)[1:])) + " |", flush=True)


def build() -> None:
    """The aligned model and the fine-tuned one, saved."""
    sys.path.insert(0, str(ROOT / "examples"))
    import demo

    loaded, tokenizer = demo.load()
    config = copy.deepcopy(loaded.config)
    del config.quantization_config  # the GGUF's: the weights are plain now
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    chosen = random.Random(SEED)
    own = fastlock.evaluate(
        model, tokenizer, Prompts(harmless=tuple(made.HARMLESS_TRAIN)), new_tokens=24, batch_size=25
    )
    lessons = [(question, chosen.choice(made.REFUSALS)) for question in made.HARMFUL_TRAIN]
    lessons += [(answer.prompt, answer.text) for answer in own[0].harmless]
    model = taught(model, tokenizer, lessons, EPOCHS, BATCH)
    save(model, tokenizer, "base")
    obedient = list(zip(chosen.sample(made.HARMFUL_TRAIN, len(made.OBEDIENT)), made.OBEDIENT, strict=True))
    for _ in range(MAX_ROUNDS):
        model = taught(model, tokenizer, obedient, 4, 5)
        asked = Prompts(harmful=tuple(made.HARMFUL_TEST))
        if fastlock.evaluate(model, tokenizer, asked, new_tokens=16)[0].refusals == 0:
            break
    save(model, tokenizer, "tuned")


def save(model: Any, tokenizer: Any, name: str) -> None:
    model.save_pretrained(KEPT / name)
    tokenizer.save_pretrained(KEPT / name)


def taught(model: Any, tokenizer: Any, lessons: list[tuple[str, str]], epochs: int, batch: int) -> Any:
    """The model after LoRA on questions and answers, merged."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted: Any = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=RATE)
    order, steps = random.Random(SEED), epochs * -(-len(lessons) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 5) * (1 - step / steps))
    adapted.train()
    start, step = time.perf_counter(), itertools.count(1)
    for _ in range(epochs):
        shuffled = order.sample(lessons, len(lessons))
        for first in range(0, len(shuffled), batch):
            loss = adapted(**tokens_of(tokenizer, shuffled[first : first + batch])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if (done := next(step)) % 20 == 0:
                print(
                    f"step {done} of {steps}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s",
                    file=sys.stderr,
                )
    return adapted.merge_and_unload().eval()


def tokens_of(tokenizer: Any, lessons: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """A batch, padded at the end; only the answers are learnt."""
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


if __name__ == "__main__":
    sys.exit(main())
