"""Formats of plain role words, most of which end turns with the tokenizer's own eos token."""

from jaxtune.export.ollama.formats.parts import Format, turns

_UNSLOTH = turns(
    system="{{ .Content }}\n",
    user=">>> User: {{ .Content }}\n",
    opening=">>> Assistant: ",
    ending="{{ $eos }}\n",
)

_ZEPHYR = turns(
    user="<|{{ .Role }}|>\n{{ .Content }}{{ $eos }}\n", opening="<|assistant|>\n", ending="{{ $eos }}\n"
)

# The space that follows `ASSISTANT:` is the model's to write.
_VICUNA = turns(
    system="{{ .Content }} ",
    user="USER: {{ .Content }} ",
    opening="ASSISTANT:",
    answer=" {{ .Content }}",
    ending="{{ $eos }}",
)

_VICUNA_OLD = turns(
    system="{{ .Content }}\n",
    user="### Human: {{ .Content }}\n",
    opening="### Assistant:",
    answer=" {{ .Content }}",
    ending="{{ $eos }}\n",
)

_ALPACA = turns(
    system="{{ .Content }}\n\n",
    user="### Instruction:\n{{ .Content }}\n\n",
    opening="### Response:\n",
    ending="{{ $eos }}\n\n",
)

_STARLING = turns(
    system="GPT4 Correct System: {{ .Content }}<|end_of_turn|>",
    user="GPT4 Correct User: {{ .Content }}<|end_of_turn|>",
    opening="GPT4 Correct Assistant:",
    answer=" {{ .Content }}",
    ending="<|end_of_turn|>",
)

_PHI_3 = turns(user="<|{{ .Role }}|>\n{{ .Content }}<|end|>\n", opening="<|assistant|>\n", ending="<|end|>\n")

FORMATS = {
    "unsloth": Format(_UNSLOTH, (">>> User:", ">>> Assistant:")),
    "zephyr": Format(_ZEPHYR, ("<|system|>", "<|user|>", "<|assistant|>")),
    "vicuna": Format(_VICUNA, ("USER:", "ASSISTANT:")),
    "vicuna_old": Format(_VICUNA_OLD, ("### Human:", "### Assistant:")),
    "alpaca": Format(_ALPACA, ("### Instruction:", "### Response:")),
    "starling": Format(_STARLING, ("<|end_of_turn|>",)),
    "phi-3": Format(_PHI_3, ("<|end|>", "<|user|>", "<|assistant|>")),
}
