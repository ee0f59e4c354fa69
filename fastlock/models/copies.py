"""Copies of many small tensors, taken by one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Copies:
    """Copies of some tensors, those of one device and dtype one after the other in memory; taken when this is made.

    Attributes:
        tensors: the copies, in the order of the originals.
    """

    def __init__(self, originals: Sequence[torch.Tensor]) -> None:
        self._originals = list(originals)
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, original in enumerate(originals):
            groups.setdefault((original.device, original.dtype), []).append(i)
        self._parts: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        copies: dict[int, torch.Tensor] = {}
        for members in groups.values():
            of_group = [originals[i] for i in members]
            copy = torch.cat([original.flatten() for original in of_group])
            self._parts.append((copy, of_group))
            sizes = [original.numel() for original in of_group]
            copies |= dict(zip(members, copy.split(sizes), strict=True))
        self.tensors = [copies[i] for i in range(len(originals))]

    def take(self) -> None:
        """Copy the originals, [n] each, as they are now."""
        for copy, originals in self._parts:
            torch.cat(originals, out=copy)

    def give_back(self) -> None:
        """Write the copies to the originals."""
        if self._originals:
            torch._foreach_copy_(self._originals, self.tensors)
