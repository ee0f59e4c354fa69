"""`fastlock inspect`: what a lock holds, or what was done to a checkpoint, an adapter or a GGUF."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlock.cli.commands import Command, option
from fastlock.cli.options import JSON
from fastlock.cli.output import print_facts, print_json, print_table, say

if TYPE_CHECKING:
    from fastlock.locks.adapter_receipt import AdapterReceipt
    from fastlock.locks.lock import Lock
    from fastlock.locks.receipt import Receipt
    from fastlock.storage.places import Place

# What is said of a lock beside its rows.
_FACTS = "base_model num_layers num_heads head_dim hidden_size recipe extraction_digest strength".split()


def _inspect(path: str, as_json: bool) -> None:
    from fastlock.checkpoints.adapters.relocked import adapter_receipt_in
    from fastlock.checkpoints.gguf import is_gguf
    from fastlock.checkpoints.relocked import read_receipt
    from fastlock.locks.lock import Lock
    from fastlock.storage.places import as_place

    place = as_place(path)
    if is_gguf(place):
        _show_gguf(path, _receipt_of_gguf(place), as_json)
    elif not isinstance(place, str) and not place.is_dir():
        _show_lock(path, Lock.load(place), as_json)
    elif (files := _files_of_adapter(place)) is not None:
        _show_adapter(path, adapter_receipt_in(files, str(place)), as_json)
    else:
        _show_receipt(path, read_receipt(place), as_json)


def _files_of_adapter(place: Place) -> dict[str, Any] | None:
    """The files of a directory that holds an adapter and no model, None for any other."""
    from fastlock.checkpoints.adapters.adapter import ADAPTER_CONFIG
    from fastlock.checkpoints.adapters.adapter_files import holds_adapter_only
    from fastlock.storage.places import below, file_at, files_in

    if file_at(below(place, ADAPTER_CONFIG)) is None:
        return None
    files = dict(files_in(place, any_directory=True))
    return files if holds_adapter_only(files) else None


def _receipt_of_gguf(place: Place) -> Receipt | None:
    """The receipt in the metadata of a GGUF, None where it has none."""
    from fastlock.checkpoints.gguf import local_path, open_parts, receipt_of_parts

    found = receipt_of_parts(open_parts(local_path(place)), str(place))
    return None if found is None else found.saved.receipt


def _show_lock(path: str, lock: Lock, as_json: bool) -> None:
    rows = [
        {"layer": int(layer), "head": int(head), "scale": float(scale)}
        for layer, head, scale in zip(lock.layers, lock.heads, lock.scales, strict=True)
    ]
    facts = {"digest": lock.digest} | {name: getattr(lock, name) for name in _FACTS}
    if lock.rank:
        rewritten = len(lock) * (lock.head_dim or 0)
        facts |= {"gate_rank": lock.rank, "rewritten_columns": rewritten, "constant": lock.has_constant}
    if as_json:
        print_json({"path": path, **facts, "rows": rows})
        return
    print_facts(path, {name: value for name, value in facts.items() if value is not None})
    layers = []
    for layer in sorted({row["layer"] for row in rows}):
        heads = sorted((row for row in rows if row["layer"] == layer), key=lambda row: row["head"])
        names = ", ".join(str(row["head"]) for row in heads)
        layers.append((str(layer), names, ", ".join(f"{row['scale']:.3f}" for row in heads)))
    print_table(("layer", "heads", "scales"), layers)


def _show_receipt(path: str, receipt: Receipt | None, as_json: bool) -> None:
    if as_json:
        print_json({"path": path, "receipt": receipt.to_dict() if receipt else None})
        return
    if receipt is None:
        say(f"{path}: not relocked by fastlock (config.json holds no receipt)")
        return
    _print_receipt(path, receipt)


def _show_gguf(path: str, receipt: Receipt | None, as_json: bool) -> None:
    if as_json:
        print_json({"path": path, "kind": "GGUF", "receipt": receipt.to_dict() if receipt else None})
    elif receipt is None:
        say(f"{path}: a GGUF that is not relocked by fastlock (its metadata holds no receipt)")
    else:
        _print_receipt(f"{path}: a relocked GGUF", receipt)


def _print_receipt(title: str, receipt: Receipt) -> None:
    facts = receipt.to_dict()
    sites = facts.pop("sites")
    print_facts(title, facts)
    rows = [
        (str(site["layer"]), ", ".join(map(str, site["heads"])), site["name"], "yes" if site["had_bias"] else "no")
        for site in sites
    ]
    print_table(("layer", "heads", "output projection", "had a bias"), rows)


def _show_adapter(path: str, receipt: AdapterReceipt | None, as_json: bool) -> None:
    if as_json:
        print_json({"path": path, "kind": "adapter", "receipt": receipt.to_dict() if receipt else None})
        return
    if receipt is None:
        say(f"{path}: an adapter that is not relocked by fastlock (it holds no receipt)")
        return
    facts = receipt.to_dict()
    _, _, base = (facts.pop(name) for name in ("sites", "original_biases", "base"))
    facts["stacks"] = ", ".join(facts["stacks"])
    facts |= {"base": base.pop("name")} | {f"base_{name}": value for name, value in base.items()}
    for kind in ("written", "original"):
        facts |= {f"{kind}: {name}": digest for name, digest in facts.pop(kind).items()}
    print_facts(f"{path}: a relocked adapter", facts)
    rows = [
        (str(site.layer), ", ".join(map(str, site.heads)), site.name, "yes" if site.touched else "no")
        for site in receipt.sites
    ]
    print_table(("layer", "heads", "output projection", "touched by the adapter"), rows)


COMMAND = Command(
    "inspect",
    "Show what a lock holds, or what was done to a checkpoint, an adapter or a GGUF. Loads no weights.",
    (
        option(
            "path", metavar="PATH", help="A lock or a GGUF file; or a checkpoint's or an adapter's directory or URL."
        ),
        JSON,
    ),
    _inspect,
)
