"""Prompts to tokens: chat templates, and rows of tokens that a model can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastlock.errors import FastlockError
from fastlock.models.sites import text_config

# For templates that tell the model today's date: a lock must not depend on the day on which it was made. It is the date
# that Llama 3.2's template falls back on where it has no clock.
DATE = "26 Jul 2024"


def prompt_tokens(tokenizer: Any, question: str) -> tuple[list[int], str]:
    """Put a question as the model is used to: in its chat template, or as "Question: … Answer:" where it has none.

    Args:
        tokenizer: the model's.
        question: what the user asks.

    Returns:
        The tokens before the answer, and the white space between them and the answer's text.
    """
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, date_string=DATE)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"]), _space_after(tokenizer, messages, text)
    # The space belongs to the answer's first word, as in any text: tokenizers join them.
    tokens = list(tokenizer(f"Question: {question}\nAnswer:")["input_ids"])
    return tokens[:-1] if tokens[-1:] == [getattr(tokenizer, "eos_token_id", None)] else tokens, " "


def _space_after(tokenizer: Any, messages: list[dict[str, str]], prompt: str) -> str:
    """The white space that a chat template puts between its prompt and an answer, if any."""
    try:
        answered = [*messages, {"role": "assistant", "content": "answer"}]
        text: str = tokenizer.apply_chat_template(answered, tokenize=False, date_string=DATE)
    except Exception:  # templates raise whatever they like, and some take no answers
        return ""
    between = text.removeprefix(prompt).partition("answer")[0] if text.startswith(prompt) else ""
    return between if between.isspace() else ""


def vocabulary(model: nn.Module) -> int:
    """How many tokens a model knows."""
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return rows


def positions(model: nn.Module) -> int | None:
    """How many tokens a model reads at most; None where its config does not say."""
    limit: int | None = getattr(text_config(model), "max_position_embeddings", None)
    return limit or None


def check_row(model: nn.Module, row: Sequence[int], name: str, new_tokens: int = 0) -> None:
    """Refuse tokens that the model cannot read.

    Args:
        model: a transformers model.
        row: the tokens of one text.
        name: what the text is called in the message.
        new_tokens: how long the answer to it may be.

    Raises:
        FastlockError: the row has no tokens or one that the model does not know, or leaves no room for an answer.
    """
    if not row:
        raise FastlockError(f"{name}: the tokenizer makes no tokens of it. Remove it.")
    if not 0 <= min(row) <= max(row) < vocabulary(model):
        raise FastlockError(
            f"{name}: the tokenizer gives token {max(row)}, but {type(model).__name__} has {vocabulary(model)}. Give "
            "the tokenizer that belongs to this model."
        )
    limit = positions(model)
    if limit is not None and len(row) + new_tokens > limit:
        answer = f", and its answer may take {new_tokens} more" if new_tokens else ""
        shorter = ", or ask for shorter answers (--new-tokens)" if new_tokens else ""
        raise FastlockError(
            f"{name}: it makes {len(row)} tokens{answer}, but {type(model).__name__} reads at most {limit}. Shorten or "
            f"remove it{shorter}."
        )
