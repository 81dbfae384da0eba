"""gpt-oss. Its stop string is that of a whole answer: `<|end|>` also ends a thought, after which the answer comes."""

from jaxtune.export.ollama.formats.parts import Format, turns

_HEAD = """<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: {{ currentDate }}

Reasoning: {{ if .ThinkLevel }}{{ .ThinkLevel }}{{ else }}medium{{ end }}

# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"""

# What was thought before an answer stays only while the answer is open.
_THOUGHT = "{{ if and $last .Thinking }}<|channel|>analysis<|message|>{{ .Thinking }}<|end|><|start|>assistant{{ end }}"

_GPT_OSS = _HEAD + turns(
    system=(
        "{{ if .Content }}<|start|>developer<|message|># Instructions\n\n{{ .Content }}\n\n<|end|>{{ end }}"
    ),
    user="<|start|>user<|message|>{{ .Content }}<|end|>",
    opening="<|start|>assistant",
    answer=_THOUGHT + "<|channel|>final<|message|>{{ .Content }}",
    ending="<|end|>",
)

FORMATS = {"gpt-oss": Format(_GPT_OSS, ("<|return|>",), {"temperature": 1.0, "top_p": 1.0})}
