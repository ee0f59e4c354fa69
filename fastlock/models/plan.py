"""Plans, which relock the same models again and again: everything is looked up, checked and packed once.

For servers that load one fine-tune after another into the same memory, and for a zoo that stays in memory.
"""

from __future__ import annotations

import contextlib
import operator
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastlock.errors import FastlockError, UnsupportedError
from fastlock.fold import FoldPlan, check_not_capturing, fold
from fastlock.locks.lock import Lock, check_lock, strength_for
from fastlock.locks.receipt import Receipt
from fastlock.models.addresses import Addresses
from fastlock.models.columns import holds_gate
from fastlock.models.copies import Copies
from fastlock.models.gated_plan import GatedBuilt, take_new_originals
from fastlock.models.links import Links
from fastlock.models.members import Member, displacements_of, folds_of, prepare
from fastlock.models.relocking import changing, check_list, each, put_in, receipt_for
from fastlock.models.sites import BareProjections
from fastlock.models.state import ORIGINAL_BIAS, PLACED_BIAS, RECEIPT, set_receipt, with_digests_of


class Plan:
    """The relocking of some models, prepared once and done as often as wanted.

        plan = fastlock.Plan(models, lock, strength=6.0)
        plan.relock()               # as relock_many
        ...                         # other fine-tunes are copied into the same memory
        plan.relock()               # folds what is there now: one launch, into the same biases
        plan.relock(strength=4.0)   # sends only the new displacements

    The first `relock` checks everything, as `fastlock.relock_many` does. The next ones write to the biases where they
    are, and captured CUDA graphs go on reading them. They notice what was replaced or moved since (a weight, a module,
    a device, the lock removed): then everything is checked and built again, as at first.

    A lock with a gate is written into the weights, and everything is checked and folded anew each time. A projection
    whose locked columns are those that were written last starts from the original ones, which are kept; any other from
    what is there now.

    Attributes:
        biases: of each model the bias of each locked layer, [hidden] of the weight's dtype and device, as the last
            `relock` left them; empty before the first.
    """

    def __init__(
        self,
        models: Sequence[nn.Module | BareProjections],
        lock: Lock | Sequence[Lock],
        strength: float | Sequence[float | None] | None = None,
    ) -> None:
        """Take note of what to relock; nothing is read or changed yet.

        Args:
            models: transformers models, of any families and on any devices; or, of a model that is not in memory, its
                output projections alone: {layer: W} or {layer: (W, c)}, W [hidden, num_heads * head_dim] and c
                [hidden], in float16, bfloat16, float32 or float64. Their biases are then in `biases`. Nobody can check
                that such a W takes plain concatenated head outputs (no gate, no norm between): docs/models.md says for
                which families that is true.
            lock: one lock for all, or a list with one each.
            strength: one for all, or a list with one each; None as for `fastlock.relock`.

        Raises:
            FastlockError: there are more or fewer locks or strengths than models, or one cannot be used.
        """
        check_list(models)
        self._models = list(models)
        self._locks = each(lock, len(models), "lock")
        self._strengths = self._checked(self._locks, each(strength, len(models), "strength"))
        self._built: _Built | GatedBuilt | None = None
        self._one_at_a_time, self._process = threading.Lock(), os.getpid()

    @property
    def biases(self) -> list[dict[int, torch.Tensor]]:
        """The bias of each locked layer of each model, as the last `relock` left it."""
        return [] if self._built is None else self._built.biases()

    @property
    def receipts(self) -> list[Receipt | None]:
        """What was done: a receipt per model, None for bare output projections. Made when asked for, to save time.

        Raises:
            FastlockError: nothing was relocked yet; or a model was changed since, as far as torch counts that.
        """
        if self._built is None:
            raise FastlockError("nothing was relocked yet, and there are no receipts. Call relock() first.")
        return self._built.receipts()

    def relock(
        self,
        lock: Lock | Sequence[Lock] | None = None,
        strength: float | Sequence[float | None] | None = None,
    ) -> None:
        """Relock all models from the weights that they have now, and wait until it is done.

        Args:
            lock: another lock for all, or a list with one each; None for the last ones.
            strength: another strength for all, or a list with one each; None for the last ones. With another lock, None
                stands for that lock's own strength, as for `fastlock.relock`.

        Raises:
            FastlockError, and its kinds: as for `fastlock.relock`. After any error all models are as they were, and
                the next call works as if this one had never been made.
        """
        check_not_capturing()
        if os.getpid() != self._process:  # in a forked process, the thread that held the lock is not there
            self._one_at_a_time, self._process = threading.Lock(), os.getpid()
        with self._one_at_a_time:
            locks, strengths = self._locks, self._strengths
            if lock is not None or strength is not None:
                locks = locks if lock is None else each(lock, len(self._models), "lock")
                wanted = each(strength, len(self._models), "strength")
                wanted = [
                    strengths[i] if wanted[i] is None and locks[i] is self._locks[i] else wanted[i]
                    for i in range(len(wanted))
                ]
                strengths = self._checked(locks, wanted)
            if self._built is not None and self._built.moved():
                self._built = None  # lets go of the weights that it read
            built = self._built
            try:
                if built is None or not built.again(locks, strengths):
                    earlier = built if isinstance(built, GatedBuilt) else None
                    if any(lock.rank for lock in locks):
                        self._built = GatedBuilt(self._models, locks, strengths, earlier)
                    else:
                        self._built = _Built(self._models, locks, strengths, earlier)
            except BaseException:
                if built is not None and not built.sound:
                    self._built = None
                raise
            self._locks, self._strengths = locks, strengths

    @staticmethod
    def _checked(locks: Sequence[Lock], strengths: Sequence[float | None]) -> list[float]:
        for lock in locks:
            check_lock(lock)
        return [strength_for(lock, strength) for lock, strength in zip(locks, strengths, strict=True)]

    def __getstate__(self) -> Any:
        raise FastlockError("a plan holds addresses in memory, and cannot be copied or pickled. Make a new one.")


class _Built:
    """Models as they were relocked, and how to see whether they still are.

    Attributes:
        sound: whether what is noted here is true. It is not after an error that came while another was being mended.

    Raises:
        FastlockError, and its kinds: as for `fastlock.relock`; then nothing was changed.
    """

    def __init__(
        self,
        models: Sequence[nn.Module | BareProjections],
        locks: Sequence[Lock],
        strengths: Sequence[float],
        earlier: GatedBuilt | None,
    ) -> None:
        self._models, self._locks, self._strengths = models, locks, strengths
        with changing() as undo:
            if earlier is not None:
                take_new_originals(models, undo)
            self._members = prepare(models, locks, strengths, undo)
            _check_read_in_place(self._members)
            if any(holds_gate(site.module) for member in self._members for site in member.sites):
                # The plan is to read the weights, not the columns that are kept beside a gate: so the gate goes first.
                put_in(self._members, fold(folds_of(self._members)), undo)
            self._plan = FoldPlan(folds_of(self._members))
            self._plan.run()
            put_in(self._members, self._plan.results, undo)
            modules = [site.module for member in self._members for site in member.sites]
            # A copy of each result, to put back after an error: for a model, the buffer that it has anyway. And memory
            # for the next copy, which changes places with it: one of the two is always whole.
            self._kept, self._spare = Copies(self._plan.results), Copies(self._plan.results)
            self._buffers = [module._buffers if isinstance(module, nn.Module) else {} for module in modules]
            self._place(self._kept.tensors)
            self._links = Links(models, self._members)
            read = [tensor for module in modules for tensor in _read(module)]
            self._read = [tensor for tensor in read if not tensor.is_inference()]  # torch counts the writes to these
            biases: list[Any] = [module.bias for module in modules if isinstance(module, nn.Module)]
            self._addresses = Addresses(read, biases)
            self._biases = [bias for bias in biases if not bias.is_inference()]
            self._own = _numbers_with_a_bias(modules, self._plan.results)
            self._versions = _versions_of(self._read)
            self._written = _versions_of(self._biases)
            self.sound = True

    def biases(self) -> list[dict[int, torch.Tensor]]:
        results = iter(self._plan.results)
        return [{site.layer: next(results) for site in member.sites} for member in self._members]

    def receipts(self) -> list[Receipt | None]:
        if self.moved() or self._versions != _versions_of(self._read):
            raise FastlockError(
                "a model was changed since it was relocked: a receipt made now would not say what was done. Call "
                "relock() again."
            )
        return [
            None if member.model is None else with_digests_of(member.model.__dict__[RECEIPT], member.sites)
            for member in self._members
        ]

    def moved(self) -> bool:
        """Whether what was looked up is elsewhere now, or others wrote to the biases. Weights may be written to."""
        if self._links.changed() or self._addresses.moved() or list(map(_version, self._biases)) != self._written:
            return True
        # Not every write is counted, and a fine-tune that has biases of its own brings them into these.
        for own in self._own:
            results, kept = ([tensors[i] for i in own] for tensors in (self._plan.results, self._kept.tensors))
            if not torch.equal(torch.cat(results), torch.cat(kept)):
                return True
        return False

    def again(self, locks: Sequence[Lock], strengths: Sequence[float]) -> bool:
        """Relock with these into the biases that are there; False where that is not possible, and nothing was done.

        Raises:
            FastlockError, and its kinds: as for `fastlock.relock`; the biases are then as before.
        """
        if any(lock.rank for lock in locks):  # of these, biases are not all
            return False
        if locks is self._locks and strengths is self._strengths:
            self._run()
            return True
        members = self._with(locks, strengths)
        earlier = folds_of(self._members)
        if _layers(members) != _layers(self._members):
            return False
        try:
            if not self._plan.displace(folds_of(members)):
                return False
            receipts = [None if member.model is None else receipt_for(member) for member in members]
            self._run()
        except BaseException:
            self._mend(lambda: self._plan.displace(earlier))
            raise
        self.sound = False  # until all of this is done
        self._members, self._locks, self._strengths = members, locks, strengths
        for member, receipt in zip(members, receipts, strict=True):
            if member.model is not None:
                set_receipt(member.model, receipt)
        self._links = Links(self._models, members)
        self.sound = True
        return True

    def _with(self, locks: Sequence[Lock], strengths: Sequence[float]) -> list[Member]:
        """The members with other locks and strengths; locks that are new are checked."""
        if any(lock is not before for lock, before in zip(locks, self._locks, strict=True)):
            with changing() as undo:
                return prepare(self._models, locks, strengths, undo)
        return [
            replace(member, strength=strength, displacements=displacements)
            for member, strength, displacements in zip(
                self._members, strengths, displacements_of(locks, strengths), strict=True
            )
        ]

    def _run(self) -> None:
        try:
            self._plan.start()
            versions = _versions_of(self._read)  # like the copy, while the device folds
            self._spare.take()
            self._plan.finish()
            self._place(self._spare.tensors)
            self._kept, self._spare, self._versions = self._spare, self._kept, versions
        except BaseException:
            self._mend(self._put_back)
            raise
        if self._plan.by_torch:  # which counts what it writes
            self._written = _versions_of(self._biases)

    def _mend(self, mend: Callable[[], object]) -> None:
        """Mend what an error left; if that fails too, this is not sound any more."""
        was_sound, self.sound = self.sound, False
        with contextlib.suppress(Exception):
            mend()
            self.sound = was_sound

    def _put_back(self) -> None:
        """Put back the biases as they were before this run, for every stream that may read them."""
        self._plan.settle()  # what is still running would write to them afterwards
        self._kept.give_back()
        for device in {result.device for result in self._plan.results if result.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        self._place(self._kept.tensors)
        self._written = _versions_of(self._biases)

    def _place(self, copies: list[torch.Tensor]) -> None:
        """Give each module its copy of what the lock put there."""
        for buffers, copy in zip(self._buffers, copies, strict=True):
            buffers[PLACED_BIAS] = copy


# What torch counts of the writes to each tensor.
_version = operator.attrgetter("_version")


def _versions_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """How often each was written to, as far as torch counts that; it does not for inference tensors."""
    return list(map(_version, tensors))


def _numbers_with_a_bias(modules: Sequence[Any], results: Sequence[torch.Tensor]) -> list[list[int]]:
    """Which of the modules have a bias of their own beneath the lock's, by device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, (module, result) in enumerate(zip(modules, results, strict=True)):
        if isinstance(module, nn.Module) and hasattr(module, ORIGINAL_BIAS):
            groups.setdefault((result.device, result.dtype), []).append(i)
    return list(groups.values())


def _check_read_in_place(members: Sequence[Member]) -> None:
    """Refuse sites whose weights a plan cannot read where they are."""
    for site in (site for member in members for site in member.sites if not site.projection.in_place):
        raise UnsupportedError(
            f"{site.name} is quantised or adapted, and a plan would have to compute its weight each time. Use "
            "fastlock.relock."
        )


def _layers(members: Sequence[Member]) -> list[list[int]]:
    return [[site.layer for site in member.sites] for member in members]


def _read(module: Any) -> list[torch.Tensor]:
    """The tensors that folding reads, as their owner has them."""
    bare = not isinstance(module, nn.Module)
    return [module.weight, module.bias] if bare and module.bias is not None else [module.weight]
