"""The model card's section that says what was done."""

from __future__ import annotations

from fastlock.locks.receipt import Receipt

CARD = "README.md"
_BEGIN, _END = b"<!-- fastlock: begin -->\n", b"<!-- fastlock: end -->\n"


def with_section(card: bytes | None, receipt: Receipt, stacks: tuple[str, ...]) -> bytes:
    """The card with a section added, or a card of that section alone."""
    return (b"" if card is None else card + b"\n") + _BEGIN + _section(receipt, stacks).encode() + _END


def without_section(card: bytes) -> bytes | None:
    """The card as it was before: the inverse of `with_section`, whatever was written around it since.

    It is the last section that goes: a card may have had one before.
    """
    begin = card.rfind(_BEGIN)
    end = card.find(_END, begin)
    if begin < 0 or end < 0:
        return card
    before, after = card[:begin], card[end + len(_END) :]
    if not before:
        return after or None
    return before.removesuffix(b"\n") + after


def _section(receipt: Receipt, stacks: tuple[str, ...]) -> str:
    layers = ", ".join(map(str, receipt.layers))
    written = [f"- Biases (SHA-256): `{receipt.biases_digest}`"] if receipt.constant else []
    if receipt.rank:
        written += [f"- Weights (SHA-256): `{receipt.written_digest}`", f"- Rank of its gate: {receipt.rank}"]
    into = " and ".join(["biases"] * receipt.constant + ["weights"] * bool(receipt.rank))
    lines = "\n".join(written)
    return f"""## Safety lock

This checkpoint was relocked with [SafetyLock](https://arxiv.org/abs/2410.10343) by fastlock {receipt.fastlock_version}:
a safety lock, extracted from its aligned base model, is folded into {into} of the attention output projections.

- Lock (SHA-256): `{receipt.lock_digest}`
- Strength: {receipt.strength:g}
- Layers: {layers}
{lines}
- Acts in: {", ".join(stacks)}

`fastlock verify DIR --lock LOCK` checks it; `fastlock unlock DIR` takes it out again. The whole receipt is in
`config.json` under `"fastlock"`.
"""
