"""How many borderline requests a model refuses while a range of its layers is scaled (arXiv 2408.17003, 3.3).

What the layers below a range make of the requests is computed once for all ranges, and where a range grows upwards,
what its scaled layers made of them is kept as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastlock.architectures.families import FAMILIES
from fastlock.evaluation.judging import Judge, Verdict, judge_all
from fastlock.evaluation.significance import mcnemar, wilson_interval
from fastlock.finetuning.decoder_layers import DecoderLayers
from fastlock.finetuning.replay import Recording, recording, replaying
from fastlock.finetuning.scaling import kept, scaled
from fastlock.inference.batching import Progress, Row, in_batches
from fastlock.inference.generation import evaluating, generate
from fastlock.locks.band_evidence import RangeCount, RangeTest

LayerRange = tuple[int, int]
"""The first and the last layer of a range, both included; UNSCALED where nothing is scaled."""

UNSCALED: LayerRange = (-1, -1)


@dataclass
class OverRefusal:
    """How a model is asked, and what it refused.

    Attributes:
        model, tokenizer: what is asked.
        found: the decoder's layers.
        prompts: borderline requests.
        rows: their tokens.
        judge: tells refusals.
        new_tokens: how many tokens an answer may have.
        batch_size: how many requests go together; halved as often as memory runs out.
        progress: what shows how far it is.
    """

    model: Any
    tokenizer: Any
    found: DecoderLayers
    prompts: Sequence[str]
    rows: Sequence[Row]
    judge: Judge
    new_tokens: int
    batch_size: int
    progress: Progress

    def unscaled(self) -> dict[LayerRange, tuple[Verdict, ...]]:
        """The verdicts on the answers of the model itself."""
        return self._judged([UNSCALED], lambda batch: [self._answers(batch)], "Baseline")

    def growing(self, first: int, scale: float) -> dict[LayerRange, tuple[Verdict, ...]]:
        """The verdicts for every range that begins with a layer, scaled by α."""
        ranges = [(first, last) for last in range(first, len(self.found))]

        def work(batch: Sequence[Row]) -> list[list[str]]:
            below, answers = self._recorded(batch, first), []
            with contextlib.ExitStack() as scaling:
                for _, last in ranges:
                    scaling.enter_context(scaled(self.found.layers[last], scale))
                    with recording([(last, self.found.layers[last])]) as new:
                        answers.append(self._answers(batch, below))
                    below.append(new[last])
            return answers

        return self._judged(ranges, work, f"Layers {first} to …, scaled by {scale:g}")

    def shrinking(self, last: int, scale: float) -> dict[LayerRange, tuple[Verdict, ...]]:
        """The verdicts for every range that ends with a layer, scaled by α."""
        ranges = [(first, last) for first in reversed(range(last + 1))]

        def work(batch: Sequence[Row]) -> list[list[str]]:
            below, answers = self._recorded(batch, last), []
            with contextlib.ExitStack() as scaling:
                for first, _ in ranges:
                    scaling.enter_context(scaled(self.found.layers[first], scale))
                    answers.append(self._answers(batch, below[:first]))
            return answers

        return self._judged(ranges, work, f"Layers … to {last}, scaled by {scale:g}")

    def each(self, ranges: Sequence[LayerRange], scale: float) -> dict[LayerRange, tuple[Verdict, ...]]:
        """The verdicts for some ranges, scaled by α."""

        def work(batch: Sequence[Row]) -> list[list[str]]:
            below, answers = self._recorded(batch, max((first for first, _ in ranges), default=0)), []
            for first, last in ranges:
                with contextlib.ExitStack() as scaling:
                    for layer in self.found.layers[first : last + 1]:
                        scaling.enter_context(scaled(layer, scale))
                    answers.append(self._answers(batch, below[:first]))
            return answers

        return self._judged(ranges, work, f"Ranges elsewhere, scaled by {scale:g}") if ranges else {}

    def _judged(
        self, ranges: Sequence[LayerRange], work: Callable[[Sequence[Row]], list[list[str]]], description: str
    ) -> dict[LayerRange, tuple[Verdict, ...]]:
        def by_row(batch: Sequence[Row]) -> list[tuple[str, ...]]:
            return list(zip(*work(batch), strict=True))

        with evaluating(self.model), kept(self.found.layers):
            answers = in_batches(self.rows, by_row, self.batch_size, self.progress, description)
        verdicts = {}
        for number, one in enumerate(ranges):
            exchanges = [(prompt, texts[number]) for prompt, texts in zip(self.prompts, answers, strict=True)]
            judged = judge_all(self.judge, exchanges, self.batch_size, self.progress, f"{description}: judging")
            verdicts[one] = tuple(judged)
        return verdicts

    def _recorded(self, batch: Sequence[Row], count: int) -> list[Recording]:
        """What the first layers make of a batch, unscaled; nothing in families where replaying was not checked."""
        if count == 0 or self.found.model_type not in FAMILIES:
            return []
        with recording(list(enumerate(self.found.layers[:count]))) as recorded:
            generate(self.model, self.tokenizer, batch, 1)
        return [recorded[number] for number in range(count)]

    def _answers(self, batch: Sequence[Row], below: Sequence[Recording] = ()) -> list[str]:
        with replaying(self.found.layers, below if self.found.model_type in FAMILIES else ()):
            return generate(self.model, self.tokenizer, batch, self.new_tokens)


def count_of(of: LayerRange, scale: float, verdicts: Sequence[Verdict]) -> RangeCount:
    """The count of a range, with its interval."""
    told = [verdict for verdict in verdicts if verdict is not None]
    low, high = wilson_interval(sum(told), len(told)) if told else (0.0, 1.0)
    return RangeCount(*of, scale, sum(told), len(told), low, high)


def paired_test(best: Sequence[Verdict], other: Sequence[Verdict], of: LayerRange, elsewhere: bool) -> RangeTest:
    """The best range against another one; what the judge could not tell for one of them does not count."""
    pairs = [(a, b) for a, b in zip(best, other, strict=True) if a is not None and b is not None]
    only_best, only_other = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    return RangeTest(*of, elsewhere, only_best, only_other, mcnemar(only_best, only_other))


def apart(band: LayerRange, num_layers: int) -> list[LayerRange]:
    """The ranges as wide as a band that lie apart from it, side by side below and above; else what is there."""
    width = band[1] - band[0] + 1
    below = [(first, first + width - 1) for first in range(band[0] - width, -1, -width)]
    above = [(first, first + width - 1) for first in range(band[1] + 1, num_layers - width + 1, width)]
    if not below and band[0] > 0:
        below = [(0, band[0] - 1)]
    if not above and band[1] < num_layers - 1:
        above = [(band[1] + 1, num_layers - 1)]
    return [*reversed(below), *above]
