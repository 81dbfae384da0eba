"""`read_dataset`: the rows of files, and for what is wrong with them the file and the line."""

import json
import sys

import datasets
import pytest

from jaxtune.data.files import read_dataset
from jaxtune.errors import DatasetError

ROWS = [{"text": 'one\nline, "quoted"', "n": "1"}, {"text": "zwölf 🙂\u2028", "n": ""}]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def written(tmp_path):
    """The same rows in every format."""
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "rows.parquet")
    table.to_csv(tmp_path / "rows.csv")
    table.to_csv(tmp_path / "rows.tsv", sep="\t")
    write(tmp_path / "rows.jsonl", as_json_lines(ROWS))
    write(tmp_path / "ROWS.NDJSON", as_json_lines(ROWS))
    write(tmp_path / "rows.json", json.dumps(ROWS))
    return tmp_path


def error_of(path):
    with pytest.raises(DatasetError) as error:
        list(read_dataset(path))
    assert path.name in error.value.found
    return error.value


class TestFormats:
    @pytest.mark.parametrize(
        "name", ["rows.parquet", "rows.csv", "rows.tsv", "rows.jsonl", "ROWS.NDJSON", "rows.json"]
    )
    def test_each_has_the_rows(self, written, name):
        rows = read_dataset(written / name)
        assert list(rows) == list(rows) == ROWS  # as often as one likes
        assert list(read_dataset(str(written / name))) == ROWS

    def test_several_files_of_any_kinds(self, written):
        assert list(read_dataset([written / "rows.csv", str(written / "rows.parquet")])) == ROWS * 2

    def test_values_of_other_types(self, tmp_path):
        rows = [{"messages": [{"role": "user", "content": "a"}], "n": 3, "x": 0.5, "none": None}]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
        write(tmp_path / "rows.jsonl", as_json_lines(rows))
        assert list(read_dataset([tmp_path / "rows.parquet", tmp_path / "rows.jsonl"])) == rows * 2

    def test_a_mark_at_the_beginning_and_empty_lines(self, tmp_path):
        mark = b"\xef\xbb\xbf"
        assert list(read_dataset(write(tmp_path / "a.jsonl", mark + b'\n{"a": "b"}\n \n'))) == [{"a": "b"}]
        assert list(read_dataset(write(tmp_path / "a.json", mark + b'[{"a": "b"}]'))) == [{"a": "b"}]
        assert list(read_dataset(write(tmp_path / "a.csv", mark + b"a\r\n\r\nb\r\n"))) == [{"a": "b"}]

    @pytest.mark.parametrize(("name", "header"), [("rows.jsonl", ""), ("rows.csv", '"{""n"": 0}"\n')])
    def test_rows_come_one_by_one(self, tmp_path, name, header):
        good = as_json_lines([{"n": 1}]) if not header else '"{""n"": 1}"\n'
        rows = iter(read_dataset(write(tmp_path / name, header.encode() + good.encode() + b"\xff\n")))
        assert next(rows)  # although the next line cannot be read
        with pytest.raises(DatasetError, match=f"line {3 if header else 2} of"):
            next(rows)


class TestLinesThatCannotBeRead:
    @pytest.mark.parametrize(
        ("line", "found"),
        [
            (b'{"text": "a"', r"is not JSON \(Expecting ',' delimiter at column 13\): '\{.text.: .a.'"),
            (b"\xff\xfe", r"is not JSON \(not UTF-8 at byte 0\)"),
            (b'["a"]', "is a JSON list, not an object"),
            (b'"a"', "is a JSON text, not an object"),
            (b"3", "is a JSON number, not an object"),
            (b"null", "is a JSON null, not an object"),
            (b"x" * 5000, r"'x{60}\.\.\.'"),
        ],
    )
    def test_json_lines(self, tmp_path, line, found):
        path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
        with pytest.raises(DatasetError, match=rf"line 3 of \S+a\.jsonl .*{found}"):
            list(read_dataset(path))

    def test_json(self, tmp_path):
        error = error_of(write(tmp_path / "a.json", '[{"text": "a"},\n {"text": }]'))
        assert "line 2 of" in error.found and "Expecting value at column 11" in error.found
        assert "line 2 of" in error_of(write(tmp_path / "a.json", "[1,\n")).found
        error = error_of(write(tmp_path / "a.json", b'[\n\n"\xff"]'))
        assert "line 3 of" in error.found and "not UTF-8" in error.found
        assert "item 1 of the list" in error_of(write(tmp_path / "a.json", '[{"a": 1}, 2]')).found

    def test_json_that_is_not_a_list(self, tmp_path):
        error = error_of(write(tmp_path / "a.json", '{\n"data": [{"text": "a"}]}'))
        assert "a JSON object with the keys ['data']" in error.found and "[key]" in error.fix

    @pytest.mark.parametrize(
        ("content", "found"),
        [
            (b"a,b\n1,2\n1,2,3\n", "line 3 of"),
            (b"a,b\n1\n", "a row of 1 fields, and the header has 2: ['a', 'b']"),
            (b'a,b\n1,"2"3\n', "line 2 of"),
            (b'a,b\n1,"2\n', "is not CSV (unexpected end of data)"),
            (b"a,b\n1,\xff\n", "line 2 of"),
            (b"a,b\n1," + b"x" * 200_000 + b"\n", "field larger than field limit"),
            (b",a\n0,1\n", "the columns ['', 'a']"),
            (b"a,a\n0,1\n", "the columns ['a', 'a']"),
        ],
    )
    def test_csv(self, tmp_path, content, found):
        assert found in error_of(write(tmp_path / "a.csv", content)).found

    def test_parquet(self, tmp_path, written):
        whole = (written / "rows.parquet").read_bytes()
        assert "cannot be read as parquet" in error_of(write(tmp_path / "cut.parquet", whole[:-100])).found


class TestFilesThatAreNotMeant:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
    def test_an_empty_one(self, tmp_path, name):
        error = error_of(write(tmp_path / name, b""))
        assert "has no rows" in error.found or "cannot be read as parquet" in error.found

    def test_without_a_row(self, tmp_path):
        for name, content in [("a.json", "[]"), ("a.csv", "a,b\n"), ("a.jsonl", "\n")]:
            assert "has no rows" in error_of(write(tmp_path / name, content)).found

    @pytest.mark.parametrize(
        ("name", "content", "rather"),
        [
            ("a.jsonl", b'[{"text": "a"},\n{"text": "b"}]', ".json"),
            ("a.json", b'{"text": "a"}\n{"text": "b"}\n', ".jsonl"),
            ("a.txt", b'{"text": "a"}\n', ".jsonl"),
            ("a", b'[{"text": "a"}]', ".json"),
            ("a.jsonl", b'{\n"text": "a"}', ".json"),
            ("a.json", b"PAR1\xff", ".parquet"),
        ],
    )
    def test_another_ending_is_suggested(self, tmp_path, name, content, rather):
        assert f"By its content it is rather a {rather} file" in error_of(write(tmp_path / name, content)).fix

    def test_an_unknown_ending(self, tmp_path):
        error = error_of(write(tmp_path / "a.xlsx", b"PK"))
        assert "has the ending '.xlsx'" in error.found and ".parquet" in error.expected
        assert "rather" not in error.fix

    def test_one_that_is_not_there(self, written):
        error = error_of(written / "row.jsonl")
        assert "there is no file" in error.found and "Did you mean 'rows.jsonl'" in error.fix
        assert "load_dataset" in error.fix

    def test_a_text_that_is_no_path_at_all(self):
        with pytest.raises(DatasetError, match=r"there is no file 'hello hello .{900,1000}\.\.\.'"):
            read_dataset("hello " * 1000)

    def test_the_last_of_several_is_looked_at_first(self, written):
        with pytest.raises(DatasetError, match="there is no file"):
            read_dataset([written / "rows.jsonl", written / "gone.jsonl"])

    def test_a_folder(self, written):
        error = error_of(written)
        assert "is a folder" in error.found and "rows.parquet" in error.fix

    def test_parquet_without_pyarrow(self, written, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        error = error_of(written / "rows.parquet")
        assert "needs pyarrow" in error.found and "pip install pyarrow" in error.fix
