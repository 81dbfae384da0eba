"""Llama 2 to 3.3, and Mistral's format. Mistral's chat template refuses system messages: here they open the user's next
turn, as its error advises. Of Llama 3.1's options only tools are here: its dates are those of the chat template, and
calls that were made in one turn, which it refuses, stand in a row."""

from jaxtune.data.chat_templates.template import filled
from jaxtune.export.ollama.formats.parts import TRIMMED, TRIMMED_CONTENT, Format, turns

_HELD_SYSTEM = '{{ $system := "" }}'

# Every exchange begins with a bos token; the first one is the runtime's.
_LLAMA = (
    TRIMMED
    + _HELD_SYSTEM
    + turns(
        system=r'{{ $system = printf "<<SYS>>\n%s\n<</SYS>>\n\n" .Content }}',
        user='[INST] {{ template "trimmed" (printf "%s%s" $system .Content) }}{{ $system = "" }} [/INST]',
        opening="",
        answer=" " + TRIMMED_CONTENT,
        ending=" {{ $eos }}{{ $bos }}",
    )
)

_MISTRAL = _HELD_SYSTEM + turns(
    system=r'{{ $system = printf "%s\n\n" .Content }}',
    user='[INST] {{ $system }}{{ .Content }}{{ $system = "" }} [/INST]',
    opening="",
    ending="{{ $eos }}",
)

_OPENING = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_TURN = "<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n" + TRIMMED_CONTENT + "<|eot_id|>"

_LLAMA_3 = TRIMMED + turns(user=_TURN, opening=_OPENING, answer=TRIMMED_CONTENT, ending="<|eot_id|>")

# There is always a system turn, for the dates; the first message goes into it if it is a system message.
_HEAD = (
    """<|start_header_id|>system<|end_header_id|>

{{ if .Tools }}Environment: ipython
{{ end }}Cutting Knowledge Date: December 2023
Today Date: 26 Jul 2024

{{ range $i, $_ := .Messages }}{{ if and (eq $i 0) (eq .Role "system") }}"""
    + TRIMMED_CONTENT
    + "{{ end }}{{ end }}<|eot_id|>"
)

# Tools are told in the first turn of the user.
_USER = """<|start_header_id|>user<|end_header_id|>

{{ if $tools }}Given the following functions, please respond with a JSON for a function call \
with its proper arguments that best answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.\
Do not use variables.

{{ range $tools }}{{ json . }}

{{ end }}{{ $tools = "" }}{{ end }}@content@<|eot_id|>"""

_CALLS = '{{ range .ToolCalls }}{"name": "{{ .Function.Name }}", "parameters": {{ json .Function.Arguments }}}{{ end }}'

_LLAMA_3_1 = (
    TRIMMED
    + _HEAD
    + "{{ $tools := .Tools }}"
    + turns(
        system="{{ if $i }}" + _TURN + "{{ end }}",
        user='{{ if eq .Role "tool" }}<|start_header_id|>ipython<|end_header_id|>\n\n{{ json .Content }}<|eot_id|>'
        "{{ else }}" + filled(_USER, content=TRIMMED_CONTENT) + "{{ end }}",
        opening=_OPENING,
        answer="{{ if .ToolCalls }}" + _CALLS + "{{ else }}" + TRIMMED_CONTENT + "{{ end }}",
        ending="<|eot_id|>",
    )
)

_LLAMA_STOPS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_METAS = {"temperature": 0.6, "top_p": 0.9}

FORMATS = {
    "llama": Format(_LLAMA, ("[INST]", "[/INST]"), _METAS),
    "llama-3": Format(_LLAMA_3, _LLAMA_STOPS, _METAS),
    "llama-3.1": Format(_LLAMA_3_1, _LLAMA_STOPS, _METAS),
    "mistral": Format(_MISTRAL, ("[INST]", "[/INST]")),
}
