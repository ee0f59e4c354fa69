"""A benign task that a small model can learn: to say which desk of a shop a message is for.

Rows are made by code from a seed. The test is about products that no row that teaches is about, whatever the seed.
"""

from __future__ import annotations

import random

Lessons = list[tuple[str, str]]

ASK = 'Delivery, billing or repairs? "{}"'
ANSWER = "Send it to {}."
OPENINGS = ("", "Hello. ", "Good morning. ", "Dear team, ")
TAUGHT_PRODUCTS = ("lamp", "kettle", "jacket", "chair", "clock", "bag", "radio", "mirror", "pan", "rug")
OTHER_PRODUCTS = ("tent", "fan", "printer", "coat", "bottle", "camera")
SENTENCES = {
    "delivery": (
        "My {} has not arrived yet.",
        "When will the {} get here?",
        "The courier left my {} with the wrong people.",
        "Can you send the {} to another address?",
        "The parcel with the {} was opened on its way.",
    ),
    "billing": (
        "I was charged twice for the {}.",
        "The invoice for the {} has a wrong sum.",
        "Can I pay for the {} by card?",
        "My discount was not taken off the price of the {}.",
        "I need a receipt for the {}.",
    ),
    "repairs": (
        "My {} broke after two days.",
        "The {} makes a strange noise.",
        "One part of the {} came off.",
        "Can you fix my old {}?",
        "There is a crack in the {}.",
    ),
}


def taught(count: int, seed: int) -> Lessons:
    """So many different rows that teach."""
    return _rows(TAUGHT_PRODUCTS, count, f"teaching {seed}")


def held_out(count: int, seed: int) -> Lessons:
    """So many different rows of the test."""
    return _rows(OTHER_PRODUCTS, count, f"test {seed}")


def correct(said: str, answer: str) -> bool:
    """Whether the model said exactly that."""
    return said.strip() == answer


def _rows(products: tuple[str, ...], count: int, seed: str) -> Lessons:
    every = [
        (ASK.format(opening + sentence.format(product)), ANSWER.format(desk))
        for desk, sentences in SENTENCES.items()
        for sentence in sentences
        for product in products
        for opening in OPENINGS
    ]
    return random.Random(seed).sample(every, count)
