"""report.html: a run on one page, with nothing outside it. Readable in light and in dark, and without the pictures."""

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.reporting import curves, svg


class Answered(NamedTuple):
    """A sample of the dataset, and what the model made of its prompt."""

    prompt: str
    expected: str | None
    """None where the dataset has no answer."""
    before: str
    after: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    title: str
    outcome: str
    """How the run ended, in a sentence."""
    facts: Mapping[str, str]
    """What is worth knowing at once."""
    history: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    changed: Mapping[str, Any]
    """Those of the settings that are not the defaults, with what these are."""
    machine: Mapping[str, str]
    checkpoints: Sequence[str] = ()
    samples: Sequence[Answered] = ()


def write(report: Report, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page(report), encoding="utf-8")
    partial.replace(path)


def page(report: Report) -> str:
    figures = [
        f"<figure><figcaption>{escape(panel.title)}{_legend(list(panel.lines))}</figcaption>{drawn}</figure>"
        for panel in curves.panels(report.history)
        if (drawn := svg.chart(panel))
    ]
    changed = [
        (name, _text(report.settings[name]), _text(default)) for name, default in report.changed.items()
    ]
    parts = [
        _table(report.facts.items()),
        _section("Curves", f'<div class="curves">{"".join(figures)}</div>' if figures else ""),
        _section("Before and after", _samples(report.samples) if report.samples else ""),
        _section(
            "Settings that differ from the defaults",
            _table(changed, ("setting", "here", "default")) if changed else "<p>None.</p>",
        ),
        _folded("All settings", _table((name, _text(value)) for name, value in report.settings.items())),
        _section(
            "Checkpoints", "".join(f"<p><code>{escape(name)}</code></p>" for name in report.checkpoints)
        ),
        _folded("Machine and versions", _table(report.machine.items())),
        _folded("Last numbers", _table(_last_numbers(report.history))),
    ]
    title = escape(report.title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n<p>{escape(report.outcome)}</p>\n"
        + "\n".join(filter(None, parts))
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


def _table(rows: Any, heads: Sequence[str] = ()) -> str:
    """The first cell of a row is its name."""
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>' if body else ""


def _samples(samples: Sequence[Answered]) -> str:
    def told(name: str, text: str | None) -> str:
        return "" if text is None else f"<dt>{name}</dt><dd>{escape(text)}</dd>"

    return "".join(
        f"<dl>{told('prompt', each.prompt)}{told('in the dataset', each.expected)}"
        f"{told('before', each.before)}{told('after', each.after)}</dl>"
        for each in samples
    )


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    keys = "".join(
        f'<span class="key"><svg viewBox="0 0 20 10" aria-hidden="true">'
        f'<path class="line{number % svg.COLOURS}" d="M0 5H20"/></svg>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<span class="keys">{keys}</span>'


def _last_numbers(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Of every name, the newest."""
    newest: dict[str, Any] = {}
    for record in history:
        newest |= record
    return [(name, _text(value)) for name, value in newest.items()]


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --dim: #5c5c5c; --edge: #d8d8d8; --ground: #fff; --soft: #f5f5f5;
  --line0: #1f63b5; --line1: #b8500a; --line2: #1d7a3e; --line3: #8a3fa0; --line4: #a8324a; --line5: #5f6b00; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --dim: #a6a6a6; --edge: #444; --ground: #161616;
  --soft: #222; --line0: #79b0f2; --line1: #f0a468; --line2: #74cf93; --line3: #d09be3; --line4: #f08ea0;
  --line5: #c3cc63; } }
body { margin: 0; background: var(--ground); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; } figure > svg { width: 100%; height: auto; }
.keys { font-weight: 400; color: var(--dim); } .key { margin-left: .8rem; white-space: nowrap; }
.key svg { width: 1.2rem; height: .6rem; margin-right: .3rem; }
.grid { stroke: var(--edge); } .axis { fill: var(--dim); font-size: 11px; }
[class^=line] { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.line0 { stroke: var(--line0); } .line1 { stroke: var(--line1); } .line2 { stroke: var(--line2); }
.line3 { stroke: var(--line3); } .line4 { stroke: var(--line4); } .line5 { stroke: var(--line5); }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .15rem 1.2rem .15rem 0; border-bottom: 1px solid var(--edge); }
th { font-weight: 500; color: var(--dim); } td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
details { margin-top: 1.5rem; } summary { cursor: pointer; font-size: 1.15rem; font-weight: 600; }
dl { background: var(--soft); border-radius: .4rem; padding: .7rem 1rem; margin: .7rem 0; }
dt { color: var(--dim); font-size: .85rem; }
dd { margin: 0 0 .4rem; white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; }
"""
