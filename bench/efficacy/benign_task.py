"""A benign task that a small model can learn: to say which desk of a shop a message is for.

Rows are made by code from a seed. The sentences of the test are none of those that teach, whatever the seed.
"""

from __future__ import annotations

import random

Lessons = list[tuple[str, str]]

ASK = 'Which desk is this for? "{}"'
ANSWER = "Send it to the {} desk."
OPENINGS = ("", "Hello. ", "Good morning. ", "Dear team, ")
PRODUCTS = ("lamp", "kettle", "jacket", "chair", "clock", "bag", "radio", "mirror", "pan", "rug")
# Of each desk the first TEACHING sentences teach, and the others are the test.
TEACHING = 8
SENTENCES = {
    "delivery": (
        "My {} has not arrived yet.",
        "When will the {} get here?",
        "The courier left my {} with the wrong people.",
        "Can you send the {} to another address?",
        "The parcel with the {} was opened on its way.",
        "How long does it take to ship a {}?",
        "The driver could not find my house, and took the {} back.",
        "Where is the parcel with my {}?",
        "I am still waiting for the {} that I ordered.",
        "Could the {} come by courier on Friday?",
        "The tracking page does not know where my {} is.",
    ),
    "billing": (
        "I was charged twice for the {}.",
        "The invoice for the {} has a wrong sum.",
        "Can I pay for the {} by card?",
        "My discount was not taken off the price of the {}.",
        "I need a receipt for the {}.",
        "Why did the {} cost more than the price on your page?",
        "My bank says that the payment for the {} failed.",
        "Can I pay for the {} in three parts?",
        "Please send me the bill for the {} once more.",
        "You took too much money from my card for the {}.",
        "Is the tax in the price of the {}?",
    ),
    "repairs": (
        "My {} broke after two days.",
        "The {} makes a strange noise.",
        "One part of the {} came off.",
        "Can you fix my old {}?",
        "There is a crack in the {}.",
        "The {} stopped working this morning.",
        "Do you have a spare part for the {}?",
        "The handle of the {} is loose.",
        "Something in the {} is bent, can you mend it?",
        "The {} is damaged and does not work any more.",
        "How much do you ask to repair a {}?",
    ),
    "returns": (
        "I do not like the {} and want to give it back.",
        "How do I send the {} back to you?",
        "Can I exchange the {} for a bigger one?",
        "The {} is the wrong colour, please take it back.",
        "How many days do I have to return a {}?",
        "I changed my mind about the {}.",
        "I ordered two, and want to return one {}.",
        "May I bring the {} back to the shop?",
        "The {} does not suit me, and I would like to swap it.",
        "I want to return the {} that I bought last week.",
        "Will you take the {} back without the box?",
    ),
}


def taught(count: int, seed: int) -> Lessons:
    """So many different rows, from the sentences that teach."""
    return _rows(slice(0, TEACHING), count, f"teaching {seed}")


def held_out(count: int, seed: int) -> Lessons:
    """So many different rows of the test."""
    return _rows(slice(TEACHING, None), count, f"test {seed}")


def correct(said: str, answer: str) -> bool:
    """Whether the model said exactly that."""
    return said.strip() == answer


def _rows(which: slice, count: int, seed: str) -> Lessons:
    every = [
        (ASK.format(opening + sentence.format(product)), ANSWER.format(desk))
        for desk, sentences in SENTENCES.items()
        for sentence in sentences[which]
        for product in PRODUCTS
        for opening in OPENINGS
    ]
    return random.Random(seed).sample(every, count)
