"""The benchmark of the kernels, in a tiny model: every op has rows, and the page takes them."""

import json

import pytest

from benchmarks import harness, kernels


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXTUNE_RESULTS", str(folder))
        patch.setattr("sys.argv", ["kernels.py", "--models", "tiny"])
        kernels.main()
    return json.loads((folder / "kernels.json").read_text())


def test_every_op_is_measured(result: dict):
    assert {row["op"] for row in result["rows"]} == set(kernels.OPS)
    assert all(row["us"] > 0 and row["floor_us"] > 0 for row in result["rows"])


def test_products_are_compared_with_the_product_alone(result: dict):
    for op in ("nf4_matmul", "scaled_matmul", "linear_cross_entropy"):
        rows = [row for row in result["rows"] if row["op"] == op]
        assert {kernels.PRODUCT, "xla"} <= {row["implementation"] for row in rows}
        assert all(row["product_us"] > 0 for row in rows)


def test_the_result_names_the_kernels(result: dict):
    assert result["kernels"] == harness.kernels()


def test_the_page_takes_the_tables():
    page = kernels.PAGE.read_text()
    write = lambda page, text: kernels.with_tables(page, "kernels", text)
    twice = write(write(page, "one | two"), "three")
    assert twice == write(page, "three")
    assert twice.count("three") == page.count("three") + 1


def test_tables_have_a_row_for_every_measurement(result: dict):
    failed = {
        "model": "tiny",
        "op": "attention",
        "what": "w",
        "implementation": "xla",
        "error": "out of memory",
    }
    text = kernels.tables({**result, "rows": [*result["rows"], failed]})
    assert text.count("| tiny |") == len(result["rows"]) + 1
    assert text.count("### ") == len(kernels.OPS)


@pytest.mark.parametrize("name", ["kernels", "kernels-attention", "kernels-attention-128"])
def test_the_page_shows_what_is_recorded(name: str):
    recorded = kernels.tables(json.loads((harness.RESULTS / f"{name}.json").read_text()))
    page = kernels.PAGE.read_text()
    assert page == kernels.with_tables(page, name, recorded)
