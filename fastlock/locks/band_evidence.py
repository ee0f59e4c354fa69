"""What was measured to find a band: angles, counts and tests. Plain data, as a band's file keeps it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AngleCurve:
    """Mean angles between the hidden states of two prompts' last positions, after each layer, in degrees.

    Attributes:
        normal: between two normal prompts, one number a layer.
        malicious: between two malicious ones.
        mixed: between a normal and a malicious one.
        borderline: between a normal one and a harmless one that sounds harmful.
        threshold: what the largest separation of any layer stays below in 99 of 100 shuffles of the prompts' kinds.
    """

    normal: tuple[float, ...]
    malicious: tuple[float, ...]
    mixed: tuple[float, ...]
    borderline: tuple[float, ...]
    threshold: float

    @property
    def gap(self) -> tuple[float, ...]:
        """How much wider the mixed pairs are than the normal ones, after each layer: the paper's curve."""
        return tuple(mixed - normal for mixed, normal in zip(self.mixed, self.normal, strict=True))

    @property
    def separation(self) -> tuple[float, ...]:
        """How much wider the mixed pairs are than those of one kind, after each layer: normal and malicious alike.

        The paper's gap takes the normal pairs alone, and is hidden where normal requests differ more among themselves
        than malicious ones do.
        """
        pairs = zip(self.mixed, self.normal, self.malicious, strict=True)
        return tuple(mixed - (normal + malicious) / 2 for mixed, normal, malicious in pairs)

    @property
    def borderline_gap(self) -> tuple[float, ...]:
        """The same for harmless prompts that sound harmful: what of the gap is wording alone."""
        return tuple(mixed - normal for mixed, normal in zip(self.borderline, self.normal, strict=True))


@dataclass(frozen=True)
class RangeCount:
    """How many borderline prompts were refused while the weights of a range of layers were scaled.

    Attributes:
        first, last: the range, both included; -1 and -1 where nothing was scaled.
        scale: what the weights were multiplied by (the paper's α).
        refused: how many answers were refusals.
        judged: of how many, without those that the judge could not tell.
        low, high: the 95 % interval of their share (Wilson's).
    """

    first: int
    last: int
    scale: float
    refused: int
    judged: int
    low: float
    high: float


@dataclass(frozen=True)
class RangeTest:
    """The best range against another one, over the same prompts: McNemar's exact test, two-sided.

    Attributes:
        first, last: the other range; -1 and -1 where nothing was scaled.
        elsewhere: whether it is as wide as the best one, and apart from it.
        only_best, only_other: how many prompts only one of the two refused.
        p: how often chance alone would split these so unevenly.
    """

    first: int
    last: int
    elsewhere: bool
    only_best: int
    only_other: int
    p: float


@dataclass(frozen=True)
class BandEvidence:
    """What was measured to find a band, or that none stands out.

    Attributes:
        reason: the finding, in a sentence.
        judge: what told refusals.
        prompts: SHA-256 (hex) of the prompts.
        normal, malicious, borderline: how many there were.
        new_tokens: how many tokens an answer could have.
        curve: the angles.
        first_range: where the curve rises, (first, last); None where it never does.
        counts: of every range that was tried.
        tests: the best range against others.
    """

    reason: str
    judge: str
    prompts: str
    normal: int
    malicious: int
    borderline: int
    new_tokens: int
    curve: AngleCurve
    first_range: tuple[int, int] | None
    counts: tuple[RangeCount, ...]
    tests: tuple[RangeTest, ...]
