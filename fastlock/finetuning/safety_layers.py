"""Finding the band of layers that tells malicious requests from normal ones (Safety Layers, arXiv 2408.17003)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from fastlock.errors import FastlockError, UnsupportedError, check_number
from fastlock.evaluation.judges import judge_name
from fastlock.evaluation.judging import Judge, Verdict
from fastlock.evaluation.keyword_judge import refuses
from fastlock.evaluation.significance import holm
from fastlock.finetuning.angles import angle_curve, last_states, rising_range
from fastlock.finetuning.band_prompts import BandPrompts, shipped_band_prompts
from fastlock.finetuning.decoder_layers import DecoderLayers, decoder_layers, plain_model
from fastlock.finetuning.over_refusal import UNSCALED, LayerRange, OverRefusal, apart, count_of, paired_test
from fastlock.finetuning.scaling import check_scalable
from fastlock.inference.batching import Progress, Row, no_progress
from fastlock.inference.chat import check_row, prompt_tokens
from fastlock.locks.band import MAX_LETTERS, Band
from fastlock.locks.band_evidence import AngleCurve, BandEvidence, RangeCount, RangeTest
from fastlock.models.names import base_name
from fastlock.version import __version__

# The paper's rule: the first α, in steps of 0.05, whose counts have a standard deviation of 15 among 721 prompts.
_SCALES = tuple(round(1 + 0.05 * step, 2) for step in range(1, 11))
_SPREAD = 15 / 721
MOST_SCALE = 10.0
_CHANCE = 0.05

_Verdicts = dict[LayerRange, tuple[Verdict, ...]]


@dataclass(frozen=True)
class Located:
    """What `locate` found; true exactly if there is a band.

    Attributes:
        band: the layers, with the evidence; None where no band stands out.
        evidence: what was measured.
        base_model: the model's name; "" where it has none.
        num_layers: how many decoder layers it has.
    """

    band: Band | None
    evidence: BandEvidence
    base_model: str
    num_layers: int

    def __bool__(self) -> bool:
        return self.band is not None

    @property
    def reason(self) -> str:
        """The finding, in a sentence."""
        return self.evidence.reason

    def to_dict(self) -> dict[str, Any]:
        """The finding as data that JSON can hold."""
        band = None if self.band is None else [self.band.first, self.band.last]
        model = {"base_model": self.base_model, "num_layers": self.num_layers}
        return {"band": band, **model, "fastlock": __version__, "evidence": asdict(self.evidence)}


@dataclass(frozen=True)
class _Counted:
    """The over-refusals of a search. Attributes: the scale, every range's verdicts, and the range that is best."""

    scale: float
    verdicts: _Verdicts
    best: LayerRange


def locate(
    model: nn.Module,
    tokenizer: Any,
    prompts: BandPrompts | None = None,
    *,
    scale: float | None = None,
    first_range: tuple[int, int] | None = None,
    judge: Judge = refuses,
    new_tokens: int = 8,
    batch_size: int = 16,
    seed: int = 42,
    progress: Progress | None = None,
) -> Located:
    """Find the band of a model: where malicious and normal requests part, and where scaling raises over-refusal most.

    1. Angles (section 3.2): from one forward pass a request, all pairs of requests, after every layer. Where mixed
       pairs become wider than those of one kind is the first range. It must exceed what shuffled kinds give. (The
       paper compares with normal pairs alone; the evidence has that curve as well, `curve.gap`.)
    2. Over-refusals (section 3.3): the borderline requests refused while the attention and MLP weights of a range are
       multiplied by α. From the first layer of that range, the last one is sought that gives most refusals (fewest if α
       is below 1); then the first one. Of equal ranges, the narrowest.
    3. The band stands out if it is at most half of the layers, and refuses more than the model itself and than every
       range of its width apart from it, by McNemar's exact test at 5 %, corrected for all ranges that were tried
       (Bonferroni, then Holm). If not, there is no band, and the evidence says why.

    The weights are afterwards what they were, bit for bit, however it ends.

    Args:
        model: an aligned transformers model that generates.
        tokenizer: its tokenizer; its chat template is used if it has one.
        prompts: what to ask; by default `shipped_band_prompts()`.
        scale: α, other than 1; by default the first of 1.05, 1.10, … 1.50 at which the counts of ranges have a
            standard deviation of 2.1 % of the prompts (the paper's 15 of 721).
        first_range: the first and last layer to start from, instead of what the angles say.
        judge: tells refusals, as in `fastlock.evaluate`.
        new_tokens: how many tokens an answer may have.
        batch_size: how many requests go together; halved as often as memory runs out.
        seed: of the shuffles.
        progress: wraps the long loops as `progress(items, description)`.

    Raises:
        UnsupportedError: the model is wrapped, its layers are not one plain list, or its weights cannot be scaled.
        FastlockError: a prompt, a number, the chat template or the judge cannot be used.
    """
    asked = shipped_band_prompts() if prompts is None else prompts
    if not isinstance(asked, BandPrompts):
        raise FastlockError(f"the prompts are {type(asked).__name__}; give BandPrompts: normal, malicious, borderline.")
    check_number("new_tokens", new_tokens, 1, 2**31)
    check_number("batch_size", batch_size, 1, 2**31)
    _check_scale(scale)
    plain = plain_model(model, "searched for a band")
    found = decoder_layers(plain)
    _check_model(plain, found, first_range)
    rows = {kind: _rows(plain, tokenizer, kind, getattr(asked, kind), new_tokens) for kind in vars(asked)}
    shown = progress or no_progress

    kinds = [number for number, kind in enumerate(vars(asked)) for _ in rows[kind]]
    every = [row for kind in vars(asked) for row in rows[kind]]
    curve = angle_curve(last_states(plain, found.layers, every, batch_size, shown), kinds, seed)
    start = rising_range(curve) if first_range is None else (first_range[0], first_range[1])
    asking = OverRefusal(
        *(plain, tokenizer, found, asked.borderline, rows["borderline"], judge, new_tokens, batch_size, shown)
    )
    counted = None if start is None else _counted(asking, start, scale)
    return _finding(plain, found, asked, curve, start, counted, judge, new_tokens)


def _counted(asking: OverRefusal, start: tuple[int, int], scale: float | None) -> _Counted | None:
    """Steps 2 and 3's counts; None where no scale moves them."""
    verdicts: _Verdicts = asking.unscaled()
    growing: _Verdicts = {}
    chosen = scale
    for tried in _SCALES if scale is None else (scale,):
        growing = asking.growing(start[0], tried)
        if scale is not None or _spread(growing) >= _SPREAD * len(asking.prompts):
            chosen = tried
            break
    if chosen is None:
        return None
    _, last = _best(growing, chosen)
    shrinking = asking.shrinking(last, chosen)
    best = _best(shrinking, chosen)
    verdicts |= growing | shrinking
    elsewhere = [one for one in apart(best, len(asking.found)) if one not in verdicts]
    verdicts |= asking.each(elsewhere, chosen)
    return _Counted(chosen, verdicts, best)


def _best(verdicts: _Verdicts, scale: float) -> LayerRange:
    """The range with most refusals, or fewest where the weights are scaled down; of equal ones, the narrowest."""
    sign = 1 if scale > 1 else -1
    return max(verdicts, key=lambda of: (sign * _refused(verdicts[of]), of[0] - of[1]))


def _refused(verdicts: Sequence[Verdict]) -> int:
    return sum(verdict is True for verdict in verdicts)


def _spread(verdicts: _Verdicts) -> float:
    """The standard deviation of the counts of ranges."""
    counts = [_refused(one) for one in verdicts.values()]
    return statistics.stdev(counts) if len(counts) > 1 else 0.0


def _finding(
    model: Any,
    found: DecoderLayers,
    prompts: BandPrompts,
    curve: AngleCurve,
    start: tuple[int, int] | None,
    counted: _Counted | None,
    judge: Judge,
    new_tokens: int,
) -> Located:
    stands_out, reason, tests = _outcome(start, counted, len(found))
    counts: tuple[RangeCount, ...] = ()
    if counted is not None:
        scales = {of: 1.0 if of == UNSCALED else counted.scale for of in counted.verdicts}
        counts = tuple(count_of(of, scales[of], one) for of, one in counted.verdicts.items())
    evidence = BandEvidence(
        reason,
        judge_name(judge),
        prompts.digest,
        len(prompts.normal),
        len(prompts.malicious),
        len(prompts.borderline),
        new_tokens,
        curve,
        start,
        counts,
        tests,
    )
    name = (base_name(model) or "")[:MAX_LETTERS]
    band = None
    if stands_out and counted is not None:
        source = f"located by fastlock {__version__}, α = {counted.scale:g}"
        band = Band(*counted.best, len(found), found.model_type, name or None, source, evidence)
    return Located(band, evidence, name, len(found))


def _outcome(
    start: tuple[int, int] | None, counted: _Counted | None, num_layers: int
) -> tuple[bool, str, tuple[RangeTest, ...]]:
    """Whether a band stands out, the finding in a sentence, and the tests of the best range."""
    if start is None:
        further = "after no layer do malicious and normal lie further apart than in 99 of 100 shuffles of the kinds"
        return False, f"no band stands out: {further}", ()
    if counted is None:
        return False, f"no band stands out: no scale up to {_SCALES[-1]} tells ranges apart by what they refuse", ()
    tests = _tests(counted, num_layers)
    return *_judgement(counted, tests, num_layers), tests


def _tests(counted: _Counted, num_layers: int) -> tuple[RangeTest, ...]:
    """The best range against every other."""
    elsewhere = set(apart(counted.best, num_layers))
    best = counted.verdicts[counted.best]
    return tuple(
        paired_test(best, other, of, of in elsewhere) for of, other in counted.verdicts.items() if of != counted.best
    )


def _judgement(counted: _Counted, tests: Sequence[RangeTest], num_layers: int) -> tuple[bool, str]:
    """Whether the best range stands out, and the finding in a sentence."""
    first, last = counted.best
    if 2 * (last - first + 1) > num_layers:
        return False, (
            f"no band stands out: the best range, [{first}, {last}], is more than half of the {num_layers} layers"
        )
    decisive = [test for test in tests if test.elsewhere or (test.first, test.last) == UNSCALED]
    tried = len(counted.verdicts) - 1
    chances = holm([min(1.0, test.p * tried) for test in decisive])
    more = [test.only_best > test.only_other for test in decisive]
    wanted = [is_more == (counted.scale > 1) for is_more in more]
    word = "more" if counted.scale > 1 else "fewer"
    for test, chance, is_wanted in zip(decisive, chances, wanted, strict=True):
        if not is_wanted or chance >= _CHANCE:
            other = "the model itself" if (test.first, test.last) == UNSCALED else f"[{test.first}, {test.last}]"
            return False, (
                f"no band stands out: [{first}, {last}], the best of {tried} ranges, does not refuse significantly "
                f"{word} than {other} (it alone refuses {test.only_best} prompts, the other alone {test.only_other}; "
                f"corrected p = {chance:.2g})"
            )
    apart_from = len(decisive) - 1
    others = f"{apart_from} other range{'s' * (apart_from != 1)}"
    return True, (
        f"[{first}, {last}] stands out: scaled by {counted.scale:g}, it refuses significantly {word} than the model "
        f"itself and than {others} elsewhere, corrected for {tried} ranges"
    )


def _rows(model: Any, tokenizer: Any, kind: str, prompts: Sequence[str], new_tokens: int) -> list[Row]:
    rows = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            row = prompt_tokens(tokenizer, prompt)[0]
        except Exception as error:  # templates and tokenizers raise whatever they like
            raise FastlockError(
                f"{kind} prompt {number} ({prompt[:40]!r}): the tokenizer or its chat template fails "
                f"({type(error).__name__}: {str(error)[:200]}). Give the model's own tokenizer, or mend its template."
            ) from error
        check_row(model, row, f"{kind} prompt {number}", new_tokens)
        rows.append(row)
    return rows


def _check_scale(scale: float | None) -> None:
    if scale is None:
        return
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not number or not 0 < scale <= MOST_SCALE or scale == 1:
        raise FastlockError(
            f"scale is {scale!r}; it must be a number above 0 and up to {MOST_SCALE:g}, other than 1. The paper's are "
            "0.8 to 1.2."
        )


def _check_model(model: Any, found: DecoderLayers, first_range: tuple[int, int] | None) -> None:
    if not (hasattr(model, "generate") and model.can_generate()):
        raise UnsupportedError(
            f"{found.name}: it does not generate, so nobody can see what it refuses. Load it with AutoModelForCausalLM."
        )
    for number, layer in enumerate(found.layers):
        check_scalable(layer, f"{found.path}.{number}")
    if first_range is not None:
        if not isinstance(first_range, tuple | list) or len(first_range) != 2:
            raise FastlockError(f"first_range is {first_range!r}; give a first and a last layer: (6, 12).")
        Band(*first_range, len(found))
