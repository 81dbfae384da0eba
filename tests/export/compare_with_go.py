"""Has Go itself render what test_ollama.py renders with go_template.py, and compares the two. Run by hand, where there
is a Go (1.18 or later), after a change to either: `PYTHONPATH=. python tests/export/compare_with_go.py`."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.export.go_template import data_of, render
from tests.export.test_ollama import CASES, TOOL_CASES, model_of, tokenizer_for

PROGRAM = """
package main

import ("encoding/json"; "os"; "strings"; "text/template"; "time")

// The fields that Ollama's data have: a name that is none of them is an error.
type Function struct { Name string; Arguments map[string]any }
type Call struct { Function Function }
type Message struct { Role, Content, Thinking, ToolName string; ToolCalls []Call }
type Tool = json.RawMessage
type Data struct {
	Messages []Message; Tools []Tool; System, Response, ThinkLevel string; Think, IsThinkSet bool
}
type Case struct { Template string; Data Data }

func main() {
	functions := template.FuncMap{
		"json": func(value any) string { text, _ := json.Marshal(value); return string(text) },
		"currentDate": func() string { return time.Now().Format("2006-01-02") },
	}
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	printed := []string{}
	for _, each := range cases {
		var text strings.Builder
		parsed := template.Must(template.New("").Option("missingkey=zero").Funcs(functions).Parse(each.Template))
		if err := parsed.Execute(&text, each.Data); err != nil { panic(err) }
		printed = append(printed, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(printed)
}
"""


def cases() -> Iterator[tuple[str, str, list[dict[str, Any]], dict[str, Any]]]:
    for title, case in {**CASES, **TOOL_CASES}.items():
        yield title, model_of(tokenizer_for(case.name)).template, case.messages, case.asked


def main() -> None:
    titles, templates, chats, asked = zip(*cases(), strict=True)
    given = [
        {"Template": template, "Data": data_of(chat, **each)}
        for template, chat, each in zip(templates, chats, asked, strict=True)
    ]
    ours = [
        render(template, chat, **each) for template, chat, each in zip(templates, chats, asked, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        (program := Path(folder) / "render.go").write_text(PROGRAM)
        done = subprocess.run(
            ["go", "run", str(program)], input=json.dumps(given), capture_output=True, text=True, check=False
        )
    if done.returncode:
        sys.exit(done.stderr)
    different = [title for title, a, b in zip(titles, ours, json.loads(done.stdout), strict=True) if a != b]
    print(f"{len(titles)} cases, {len(different)} different", *different, sep="\n")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
