"""Which lock each request of a batch has, and how strong: in memory that all layers of a model read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

# Assignments to fewer requests than these share their memory.
FEWEST_HELD = 256


class Assignment:
    """The lock and the strength of each request, which all layers of a model read.

    On each device, every number of requests has its place in memory, the same one each time: a CUDA graph that was
    captured with that many sees what is assigned later.

    Attributes:
        packed: whether each row has an entry of its own, rather than each request.
    """

    def __init__(self) -> None:
        self.packed = False
        self._entries = _numbers([], [])
        self._memory: dict[tuple[torch.device, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def assign(
        self, locks: Sequence[int], strengths: Sequence[float], packed: bool, devices: Iterable[torch.device]
    ) -> None:
        """Another assignment: the lock of each entry, -1 for none, and its strength.

        Nothing is changed where memory runs out on one of the devices.
        """
        for device in devices:
            self._reserve(device, len(locks))
        self._entries, self.packed = _numbers(locks, strengths), packed

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`lock_of_row`, [entries] int32, and `strength_of_row`, [entries] float32, on a device, written anew."""
        locks, strengths = self._entries
        count = len(locks)
        self._reserve(device, count)
        memory = self._memory[device, _size(count)]
        with torch.inference_mode(False), torch.no_grad():
            return memory[0][:count].copy_(locks), memory[1][:count].copy_(strengths)

    def _reserve(self, device: torch.device, count: int) -> None:
        """Have memory for so many entries on a device."""
        size = _size(count)
        if (device, size) not in self._memory:
            with torch.inference_mode(False):
                locks = torch.full((size,), -1, dtype=torch.int32, device=device)
                self._memory[device, size] = locks, torch.zeros(size, dtype=torch.float32, device=device)


def _size(count: int) -> int:
    """How many entries the memory for so many has: there are few sizes, for it not to grow with every new count."""
    return max(FEWEST_HELD, 1 << (count - 1).bit_length())


def _numbers(locks: Sequence[int], strengths: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """`lock_of_row` and `strength_of_row`, on the CPU."""
    return (
        torch.tensor(locks, dtype=torch.int32, device="cpu"),
        torch.tensor(strengths, dtype=torch.float32, device="cpu"),
    )
