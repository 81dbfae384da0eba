"""Qwen 2.5 and 3: ChatML with tools, and with thoughts, which Ollama keeps apart from what was said. Go can neither
take out thoughts that stand within it, nor the line breaks at its beginning that follow a thought."""

from jaxtune.data.chat_templates.template import filled
from jaxtune.export.ollama.formats.parts import EACH, Format

_TOOLS = """{{ define "tools" }}# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>{{ range . }}
{{ json . }}{{ end }}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>{{ end }}"""

_SYSTEM = """<|im_start|>system
{{ .Content }}{{ if and $.Tools (eq $i 0) }}

{{ template "tools" $.Tools }}{{ end }}<|im_end|>
"""

_NO_SYSTEM = """{{ if and $.Tools (eq $i 0) (ne .Role "system") }}<|im_start|>system
{{ template "tools" $.Tools }}<|im_end|>
{{ end }}"""

# Ollama looks for the words that open a call: the first text in the first `if .ToolCalls`.
_CALLS = """{{ $calls := .ToolCalls }}{{ if and .Content $calls }}
{{ end }}{{ if .ToolCalls }}{{ range $n, $_ := $calls }}<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ json .Function.Arguments }}}
</tool_call>{{ if ne (len (slice $calls $n)) 1 }}
{{ end }}{{ end }}{{ end }}"""

# Results of neighbouring calls are one turn of the user's.
_RESULT = """{{ if ne $before "tool" }}<|im_start|>user{{ end }}
<tool_response>
{{ .Content }}
</tool_response>{{ if or $last (ne (index (slice $.Messages $i) 1).Role "tool") }}<|im_end|>
{{ end }}"""

_TURNS = """{{ $before := "" }}@each@@no_system@{{ if eq .Role "system" }}@system@{{ else if eq .Role "tool" }}@result@\
{{ else if eq .Role "assistant" }}<|im_start|>assistant
@thought@{{ .Content }}@calls@{{ if not $last }}<|im_end|>
{{ end }}{{ else }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ end }}{{ if and $last (ne .Role "assistant") }}<|im_start|>assistant
@prompt@{{ end }}{{ $before = .Role }}{{ end }}"""

_LAST_QUESTION = (
    "{{ $question := len .Messages }}"
    '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}{{ $question = $i }}{{ end }}{{ end }}'
)

# Of thoughts, those stay that came after the last question.
_THOUGHT = """{{ if and (gt $i $question) (or $last .Thinking) }}<think>
{{ .Thinking }}
</think>

{{ end }}"""

_NO_THINKING = """{{ if and $.IsThinkSet (not $.Think) }}<think>

</think>

{{ end }}"""


def _qwen(*, thinks: bool, prompt: str = "") -> str:
    turns = filled(
        _TURNS,
        each=EACH,
        no_system=_NO_SYSTEM,
        system=_SYSTEM,
        result=_RESULT,
        thought=_THOUGHT if thinks else "",
        calls=_CALLS,
        prompt=prompt,
    )
    return _TOOLS + (_LAST_QUESTION if thinks else "") + turns


_STOPS = ("<|im_start|>", "<|im_end|>")
_TO_ANSWER = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
_TO_THINK = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}

FORMATS = {
    "qwen-2.5": Format(_qwen(thinks=False), _STOPS, _TO_ANSWER),
    "qwen-3": Format(_qwen(thinks=True, prompt=_NO_THINKING), _STOPS, _TO_THINK),
    "qwen3-instruct": Format(_qwen(thinks=False), _STOPS, _TO_ANSWER),
    "qwen3-thinking": Format(_qwen(thinks=True, prompt="<think>\n"), _STOPS, _TO_THINK),
}
