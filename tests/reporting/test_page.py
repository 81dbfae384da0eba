"""report.html: one page, well-formed, with nothing outside it and nothing of the user's in its code."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from jaxtune.reporting import page, svg
from jaxtune.reporting.curves import Panel, figure, panels

HISTORY = [
    {"step": 1, "loss": 3.0, "grad_norm": 1.0, "learning_rate": 1e-4, "tokens_per_second": 100.0},
    {"step": 2, "loss": 2.0, "grad_norm": 0.5, "learning_rate": 2e-4, "tokens_per_second": 110.0},
    {"step": 2, "eval_loss": 2.5, "eval_runtime": 1.0},
]
EVIL = "<script>alert('&')</script>"


def report(**changes):
    given = dict(
        title="A run", outcome="Finished.", facts={"loss": "2"}, history=HISTORY,
        settings={"learning_rate": 1e-4, "seed": 1}, changed={"learning_rate": 5e-5}, machine={"jax": "0.11"},
    )  # fmt: skip
    return page.Report(**{**given, **changes})


class Tags(HTMLParser):
    """Checks that what is opened is closed, in order."""

    VOID = ("meta",)

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.attributes, self.text = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_it_is_well_formed_and_needs_nothing_else():
    text = page.page(report(samples=[page.Answered("p", "e", "b", "a")], checkpoints=["checkpoint-2"]))
    tags = Tags(text)
    assert not {"script", "link", "img", "iframe"} & set(tags.seen)
    assert not [value for name, value in tags.attributes if name in ("href", "src")]
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert len(text) < 20_000


def test_what_is_said():
    text = "|".join(Tags(page.page(report(checkpoints=["checkpoint-2"]))).text)
    for said in (
        "A run",
        "Finished.",
        "learning_rate|0.0001|5e-05",
        "checkpoint-2",
        "jax|0.11",
        "eval_loss|2.5",
    ):
        assert said in text, said
    assert "Before and after" not in text
    shown = Tags(page.page(report(samples=[page.Answered("the prompt", "right", "bad", "good")]))).text
    assert "|".join(shown).count("prompt|the prompt|in the dataset|right|before|bad|after|good") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"title": EVIL}, {"outcome": EVIL}, {"facts": {EVIL: EVIL}}, {"machine": {EVIL: EVIL}},
        {"settings": {EVIL: EVIL}, "changed": {EVIL: EVIL}}, {"checkpoints": [EVIL]},
        {"samples": [page.Answered(EVIL, EVIL, EVIL, EVIL)]},
        {"history": [{"step": 1, f"eval_{EVIL}_loss": 1.0, "loss": 2.0}]},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_texts_are_texts(changes):
    text = page.page(report(**changes))
    assert "<script" not in text and "&lt;script&gt;" in text
    Tags(text)


def test_a_run_without_a_single_step_has_a_report_too():
    assert "Curves" not in page.page(report(history=[]))


def test_light_and_dark():
    assert "prefers-color-scheme: dark" in page.STYLE and "color-scheme: light dark" in page.STYLE


class TestCurves:
    def test_what_is_drawn_together(self):
        grpo = {"step": 1, "reward": 1.0, "rewards/f/mean": 1.0, "rewards/f/std": 0.1, "kl": 0.0}
        assert [(panel.title, list(panel.lines)) for panel in panels([*HISTORY, grpo])] == [
            ("loss", ["loss", "eval_loss"]),
            ("reward", ["reward", "rewards/f/mean"]),
            ("gradient norm", ["grad_norm"]),
            ("learning rate", ["learning_rate"]),
            ("tokens per second", ["tokens_per_second"]),
            ("divergence from the base", ["kl"]),
        ]
        assert panels(HISTORY)[0].lines == {"loss": [(1, 3.0), (2, 2.0)], "eval_loss": [(2, 2.5)]}

    def test_a_figure_shows_itself_in_a_notebook(self):
        drawn = figure(panels(HISTORY))
        assert [axes.get_title() for axes in drawn.axes] == [
            "loss",
            "gradient norm",
            "learning rate",
            "tokens per second",
        ]
        assert drawn._repr_png_().startswith(b"\x89PNG")

    def test_a_chart_says_in_words_what_it_shows(self):
        root = ET.fromstring(svg.chart(panels(HISTORY)[0]))
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"] == (
            "loss: loss goes from 3 at step 1 to 2 at step 2; eval_loss goes from 2.5 at step 2 to 2.5 at step 2"
        )
        kinds = [element.attrib["class"] for element in root if "line" in element.attrib["class"]]
        assert kinds == ["line0", "line1"]

    @pytest.mark.parametrize(
        "line",
        [
            [(1, 5.0)],
            [(1, 5.0), (2, 5.0)],
            [(1, 0.0), (2, 0.0)],
            [(1, 1e-8), (1000, 2e-8)],
            [(1, -3.0), (2, 1e9)],
            [(1, 1.0), (2, float("nan")), (3, float("inf")), (4, 2.0)],
        ],
        ids=str,
    )
    def test_whatever_the_numbers_lines_stay_inside(self, line):
        root = ET.fromstring(svg.chart(Panel("x", {"x": line})))
        for element in root:
            if "line" in element.attrib["class"]:
                at = element.attrib.get("d") or "M{cx} {cy}".format(**element.attrib)
                places = [tuple(map(float, place.split())) for place in re.split("[ML]", at)[1:]]
                assert all(0 <= x <= svg.WIDTH and 0 <= y <= svg.HEIGHT for x, y in places)

    def test_nothing_finite_is_nothing(self):
        assert svg.chart(Panel("x", {"x": [(1, float("nan"))]})) == ""

    def test_long_lines_are_thinned(self):
        line = [(step, float(step)) for step in range(100_000)]
        thin = svg.thinned(line)
        assert len(thin) <= svg.MOST_POINTS and thin[-1][0] == 99_999
        assert len(svg.chart(Panel("x", {"x": line}))) < 10_000

    @pytest.mark.parametrize(("low", "high"), [(0, 1), (3.1, 3.2), (-5, 5), (0, 0), (1e-5, 9e-5), (7, 7)])
    def test_ticks_are_round_and_around(self, low, high):
        found = svg.ticks(low, high)
        assert found[0] <= low <= high <= found[-1] and 2 <= len(found) <= 7
