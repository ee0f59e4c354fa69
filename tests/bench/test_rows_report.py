"""How the projection with a lock per row is told, of rows whose figures are known."""

from bench.ops import rows_report


def way(seconds, ratio, tile=""):
    return {
        "tile": tile,
        "seconds": [seconds, seconds, seconds],
        "ratio": [ratio, ratio, ratio],
        "error_in_bounds": 0.5,
    }


def row(rows, ways):
    """Of 30 MB at 3 TB/s of copy: 10 µs are all of it."""
    known = {"size": "8B", "dtype": "bfloat16", "hidden": 4096, "device": "cuda", "decode": rows <= 64}
    return known | {"rows": rows, "bytes": 30_000_000, "copy_bytes_per_second": 3e12, "ways": ways}


ROWS = [
    row(1, {"linear": way(10e-6, 1.0), "chosen": way(12.5e-6, 1.25, "gather-16x32x128-4-5")}),
    row(8192, {"linear": way(400e-6, 1.0), "around": way(402e-6, 1.005), "chosen": way(408e-6, 1.02, "add")}),
]


def test_decode_is_of_the_copy_and_prefill_over_linear():
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows_report.section(ROWS) if line[0:1] == "|"]
    assert cells[0] == ["rows", "way", "tile", "median (95 %)", "of copy", "over linear (95 %)", "error"]
    by_way = {(cell[0], cell[1]): cell for cell in cells[2:]}
    assert by_way["1", "linear"][4:6] == ["100%", ""]
    assert by_way["1", "chosen"][2:6] == [
        "gather-16x32x128-4-5",
        "12.5 µs (12.5–12.5)",
        "80%",
        "+25.0% (+25.0% to +25.0%)",
    ]
    assert by_way["8192", "around"][4:6] == ["", "+0.5% (+0.5% to +0.5%)"]
    assert by_way["8192", "chosen"][4:6] == ["", "+2.0% (+2.0% to +2.0%)"]


def test_the_summary_says_both():
    decode, chosen, around = rows_report.headline(ROWS)
    assert decode.endswith("of copy (aim: 85 % or more): 8B x 1: 80%")
    assert chosen.endswith("chosen, over linear (aim: +1 % or less): 8B x 8192: +2.0%")
    assert around.endswith("around, over linear (aim: +1 % or less): 8B x 8192: +0.5%")
    assert len(rows_report.headline(ROWS[:1])) == 1


def test_of_a_cpu_no_bandwidth_is_told():
    rows = [row | {"device": "cpu"} for row in ROWS[:1]]
    assert rows_report.headline(rows) == []
    assert "100%" not in "\n".join(rows_report.section(rows)[3:])
