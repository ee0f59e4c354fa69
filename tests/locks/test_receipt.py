"""The receipt in JSON: what is written comes back, always in the same bytes, and nothing else is read."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fastlock.errors import DamagedError, UnsupportedError
from fastlock.locks.receipt import CarrierNote, KnownDigests, LockedSite, Receipt, SavedReceipt

DOCS = Path(__file__).parents[2] / "docs" / "receipt-format.md"
DIGESTS = [f"{digit:x}" * 64 for digit in range(10)]

RECEIPT = Receipt(
    lock_digest=DIGESTS[1],
    strength=2.5,
    model_type="qwen2",
    dtype="bfloat16",
    sites=(
        LockedSite(0, "model.layers.0.self_attn.o_proj", (1, 3), True, "float16", ("float32", "bfloat16")),
        LockedSite(11, "model.layers.11.self_attn.o_proj", (2,), False, "float32", ("float16",)),
    ),
    fastlock_version="0.0.1",
    digests=KnownDigests(DIGESTS[2], DIGESTS[3]),
)
CARRIER = CarrierNote(
    form="llama",
    flag="attention_bias",
    was=True,
    original_biases={0: b"\x00\x01\xfe\xff\x80", 11: b""},
    stacks=("transformers", "llama.cpp"),
    original_config={"model_type": "qwen2", "é": ["\ud800", 1, None]},
    config_digest=DIGESTS[4],
    index_digest=DIGESTS[5],
    set_aside={"config.json": DIGESTS[6], "x/y.bin": DIGESTS[7]},
)
SAVED = SavedReceipt(RECEIPT, CARRIER)
GATED = SavedReceipt(replace(RECEIPT, rank=4, digests=KnownDigests(DIGESTS[2], DIGESTS[3], DIGESTS[8])), CARRIER)
GATE_ALONE = SavedReceipt(
    replace(GATED.receipt, constant=False),
    replace(CARRIER, form="weights", flag="", was=True, original_biases={}, original_config=None),
)


def written(saved: SavedReceipt) -> str:
    return json.dumps(saved.to_dict())


def read(data: object) -> SavedReceipt:
    return SavedReceipt.from_dict(data, "tuned/config.json")


def test_every_field_comes_back() -> None:
    back = read(json.loads(written(SAVED)))
    assert back == SAVED
    assert back.receipt.digests == RECEIPT.digests  # which takes no part in comparisons
    for record in (*RECEIPT.sites, CARRIER):
        assert all(value is not None for value in vars(record).values())  # nothing was left out above
    assert RECEIPT.to_dict() == Receipt.from_dict(RECEIPT.to_dict(), "here").to_dict()


@pytest.mark.parametrize("key", ["stacks", "original_config", "config_digest", "index_digest", "set_aside"])
def test_what_only_some_writers_know_is_left_out(key: str) -> None:
    saved = SavedReceipt(RECEIPT, replace(CARRIER, **{key: None}))
    assert key not in saved.to_dict()["carrier"]
    assert read(json.loads(written(saved))) == saved


def test_a_conversion_is_noted_at_the_sites_that_it_changed() -> None:
    plain = tuple(replace(site, dtype=None, earlier_dtypes=()) for site in RECEIPT.sites)
    receipt = replace(RECEIPT, sites=(plain[0], replace(plain[1], dtype="float32")))
    once = receipt.converted(["float32", "float32"])
    assert [site.to_dict().get("earlier_dtypes") for site in once.sites] == [["bfloat16"], None]
    again = once.converted(["float16", "float16"])
    assert [site.earlier_dtypes for site in again.sites] == [("bfloat16", "float32"), ("float32",)]
    assert (again.dtypes, again.converted(again.dtypes)) == (("float16", "float16"), again)


def test_the_same_receipt_gives_the_same_bytes() -> None:
    biases = dict(reversed(CARRIER.original_biases.items()))
    set_aside = dict(reversed(CARRIER.set_aside.items()))
    other = SavedReceipt(RECEIPT, replace(CARRIER, original_biases=biases, set_aside=set_aside))
    assert written(other) == written(SAVED)
    assert written(read(json.loads(written(SAVED)))) == written(SAVED)


def test_the_example_of_the_documentation_is_as_it_is_written() -> None:
    example = re.search(r"```json\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]
    assert written(read(json.loads(example))) == json.dumps(json.loads(example))


def test_the_documentation_lists_every_key() -> None:
    of_checkpoints = DOCS.read_text().partition("## The receipt of an adapter")[0]
    keys = re.findall(r"^\| `(\w+)` \|", of_checkpoints, re.MULTILINE)
    data = GATED.to_dict()
    assert keys == [*(key for key in data if key != "carrier"), *data["sites"][0], *data["carrier"]]


def changed(path: str, value: object) -> dict:
    """The receipt with another value at a path such as "sites.0.layer"; without the key where it is `...`."""
    data = copy.deepcopy(SAVED.to_dict())
    *way, last = [int(part) if part.isdigit() and not path.startswith("carrier") else part for part in path.split(".")]
    place = data
    for part in way:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


DIGEST_KEYS = "lock_digest weights_digest biases_digest carrier.config_digest carrier.index_digest".split()
TEXT_KEYS = "fastlock_version model_type sites.0.name carrier.flag".split()
REQUIRED = (
    "format_version fastlock_version lock_digest strength model_type dtype sites weights_digest biases_digest carrier "
    "sites.0.layer sites.0.name sites.0.heads sites.0.had_bias "
    "carrier.form carrier.flag carrier.was carrier.original_biases"
).split()

WRONG = [
    *((key, ...) for key in REQUIRED),
    *((key, None) for key in (*REQUIRED, *DIGEST_KEYS, "carrier.stacks", "carrier.original_config")),
    *((key, value) for key in TEXT_KEYS for value in (7, ["a"], "é")),
    *(
        (key, value)
        for key in DIGEST_KEYS
        for value in (7, "", "a" * 63, "A" * 64, "a" * 65, "a" * 64 + "\n", "é" * 64)
    ),
    *((key, 1) for key in ("more", "sites.0.more", "carrier.more", "original_config", "layers")),
    *(("format_version", value) for value in (True, 1.0, "1", [1])),
    *(("strength", value) for value in (True, "6", -1.0, -1, float("nan"), float("inf"), 10**400, [6.0])),
    *(("dtype", value) for value in ("", "int8", "torch.bfloat16", "BF16", ["bfloat16"])),
    *(("sites", value) for value in ([], {}, "x", [7], [[]], [*SAVED.to_dict()["sites"]] * 2)),
    *(("sites.0.layer", value) for value in (11, 12, -1, True, 0.0, "0")),
    *(("sites.0.heads", value) for value in ([], {}, {"1": 3}, "13", [1, 1], [3, 1], [-1], [True], ["1"], [1.0])),
    *(("sites.0.earlier_dtypes", value) for value in ([], "float32", ["int8"], [None], {"float32": 1}, None)),
    *(("sites.0.had_bias", value) for value in (0, 1, "true")),
    *(("carrier", value) for value in ([], "x", 7)),
    *(("carrier.form", value) for value in ("", "Llama", 7, ["llama"], {})),
    *(("carrier.was", value) for value in (0, 1, "true")),
    *(("carrier.stacks", value) for value in ([], "vllm", {}, [7], ["é"], [["vllm"]])),
    *(("carrier.original_config", value) for value in ([], "x", 7)),
    *(("carrier.original_biases", value) for value in ([], "x", 7)),
    *(
        ("carrier.original_biases", {key: "AAAA"})
        for key in ("", "-1", "01", "+1", "1.0", " 1", "1\n", "x", "1" * 10, "²")
    ),
    *(
        ("carrier.original_biases.0", value)
        for value in (7, None, "A", "AAA", "AAA=A", "AA=A", "AB==", "AA\n==", "é===")
    ),
    *(("carrier.set_aside", value) for value in (None, [], "x", {"config.json": None}, {"config.json": "a"})),
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_missing_unknown_or_wrong_is_refused(path: str, value: object) -> None:
    with pytest.raises(DamagedError, match=r"^tuned/config\.json: the receipt is damaged .*Download the checkpoint"):
        read(changed(path, value))


def test_what_is_refused_is_refused_for_what_is_wrong() -> None:
    """The receipt itself, changed in nothing, is read."""
    assert read(changed("strength", SAVED.receipt.strength)) == SAVED
    assert read(changed("strength", 3)).receipt.strength == 3.0
    for path, value, said in [
        ("sites.0.layer", 11, "its layers are not in ascending order, each once"),
        ("sites.0.heads", [3, 1], "its heads are not in ascending order, each once"),
        ("carrier.more", 1, "it has the key 'more', which no receipt has"),
        ("carrier.was", ..., "it lacks the key 'was'"),
        ("carrier.original_biases.0", "AB==", "the original bias of layer 0 is not as base64 is written"),
        ("format_version", True, "'True' where the format's version should be"),
    ]:
        with pytest.raises(DamagedError, match=re.escape(said)):
            read(changed(path, value))


@pytest.mark.parametrize("data", [None, [], 7, "x", {}, True])
def test_what_is_no_receipt_at_all(data: object) -> None:
    with pytest.raises(DamagedError, match="the receipt is damaged"):
        read(data)


@pytest.mark.parametrize("version", [0, 3, 10**6, -1])
def test_other_versions(version: int) -> None:
    """Whatever else they say."""
    said = rf"receipt format {version}; this fastlock reads 1 and 2\. Upgrade fastlock"
    with pytest.raises(UnsupportedError, match=said):
        read({"format_version": version, "anything": None})


@pytest.mark.parametrize("saved", [GATED, GATE_ALONE], ids=["both parts", "a gate alone"])
def test_a_gate_comes_back_in_version_2(saved: SavedReceipt) -> None:
    data = json.loads(written(saved))
    back = read(data)
    assert back == saved
    assert back.receipt.written_digest == DIGESTS[8]
    assert (data["format_version"], data["rank"], data["constant"]) == (2, 4, saved.receipt.constant)


def test_without_a_gate_there_is_no_word_of_one() -> None:
    assert SAVED.to_dict()["format_version"] == 1
    assert not {"rank", "constant", "written_digest"} & SAVED.to_dict().keys()
    assert SAVED.receipt.written_digest is None


WRONG_GATES = [
    (SAVED, {"rank": 4}),
    (SAVED, {"format_version": 2}),
    (GATED, {"format_version": 1}),
    *((GATED, {key: ...}) for key in ("rank", "constant", "written_digest")),
    *((GATED, {"rank": value}) for value in (0, 257, -1, True, 1.0, "4", None)),
    *((GATED, {"constant": value}) for value in (0, 1, "true", None)),
    *((GATED, {"written_digest": value}) for value in ("a" * 63, 7, None)),
    (GATED, {"constant": False}),
    (GATE_ALONE, {"constant": True}),
]


@pytest.mark.parametrize(("saved", "change"), WRONG_GATES, ids=lambda value: str(value)[:40])
def test_a_gate_that_cannot_be_one_is_refused(saved: SavedReceipt, change: dict) -> None:
    data = {key: value for key, value in (saved.to_dict() | change).items() if value is not ...}
    with pytest.raises(DamagedError, match=r"^tuned/config\.json: the receipt is damaged"):
        read(data)


@pytest.mark.parametrize(
    "change",
    [{"flag": "attention_bias"}, {"was": False}, {"original_biases": {"0": "AAAA"}}, {"original_config": {}}],
    ids=lambda change: next(iter(change)),
)
def test_weights_alone_carry_no_bias(change: dict) -> None:
    data = GATE_ALONE.to_dict()
    with pytest.raises(DamagedError, match="'weights' is not how such a lock is carried"):
        read(data | {"carrier": data["carrier"] | change})
