"""Formats of plain role words, most of which end turns with the tokenizer's own eos token."""

from jaxtune.data.chat_templates.template import (
    OWN_EOS,
    ChatTemplate,
    leading_system,
    turns,
    without_tools,
)

_UNSLOTH = (
    without_tools("unsloth")
    + leading_system("'You are a helpful assistant to the user'")
    + "{{- bos_token }}{{ system_text + '\\n' }}"
    + turns(
        "unsloth",
        user=r"'>>> User: ' + content + '\n'",
        opening="'>>> Assistant: '",
        answer="content + eos_token",
        closing=r"'\n'",
    )
)

_ZEPHYR = without_tools("zephyr") + turns(
    "zephyr",
    system=r"'<|system|>\n' + content + eos_token + '\n'",
    user=r"'<|user|>\n' + content + eos_token + '\n'",
    opening=r"'<|assistant|>\n'",
    answer="content + eos_token",
    closing=r"'\n'",
)

_VICUNA_SYSTEM = (
    "'A chat between a curious {0} and an artificial intelligence assistant. The assistant gives helpful, detailed, '"
    " + 'and polite answers to the {0}\\'s questions.'"
)

_VICUNA = (
    without_tools("vicuna")
    + leading_system(_VICUNA_SYSTEM.format("user"))
    + "{{- bos_token }}{{ system_text + ' ' }}"
    + turns(
        "vicuna",
        user="'USER: ' + content + ' '",
        opening="'ASSISTANT:'",
        answer="' ' + content + eos_token",
    )
)

_VICUNA_OLD = (
    without_tools("vicuna_old")
    + leading_system(_VICUNA_SYSTEM.format("human"))
    + "{{- bos_token }}{{ system_text + '\\n' }}"
    + turns(
        "vicuna_old",
        user=r"'### Human: ' + content + '\n'",
        opening="'### Assistant:'",
        answer="' ' + content + eos_token",
        closing=r"'\n'",
    )
)

_ALPACA = (
    without_tools("alpaca")
    + leading_system(
        "'Below are some instructions that describe some tasks. '"
        " + 'Write responses that appropriately complete each request.'"
    )
    + "{{- bos_token }}{{ system_text + '\\n\\n' }}"
    + turns(
        "alpaca",
        user=r"'### Instruction:\n' + content + '\n\n'",
        opening=r"'### Response:\n'",
        answer="content + eos_token",
        closing=r"'\n\n'",
    )
)

_STARLING = (
    without_tools("starling")
    + "{{- bos_token }}"
    + turns(
        "starling",
        system="'GPT4 Correct System: ' + content + '<|end_of_turn|>'",
        user="'GPT4 Correct User: ' + content + '<|end_of_turn|>'",
        opening="'GPT4 Correct Assistant:'",
        answer="' ' + content + '<|end_of_turn|>'",
    )
)

# A finished conversation ends with the token that ends texts, whatever ends turns.
_PHI_3 = without_tools("phi-3") + turns(
    "phi-3",
    system=r"'<|system|>\n' + content + '<|end|>\n'",
    user=r"'<|user|>\n' + content + '<|end|>\n'",
    opening=r"'<|assistant|>\n'",
    answer="content + '<|end|>'",
    closing=r"'\n'",
    ending="'<|endoftext|>'",
)

TEMPLATES = (
    ChatTemplate("unsloth", (), _UNSLOTH, OWN_EOS, ">>> User: ", ">>> Assistant: "),
    ChatTemplate("zephyr", (), _ZEPHYR, OWN_EOS, "<|user|>\n", "<|assistant|>\n"),
    ChatTemplate("vicuna", (), _VICUNA, OWN_EOS, "USER: ", "ASSISTANT:"),
    ChatTemplate("vicuna_old", ("vicuna old",), _VICUNA_OLD, OWN_EOS, "### Human: ", "### Assistant:"),
    ChatTemplate("alpaca", (), _ALPACA, OWN_EOS, "### Instruction:\n", "### Response:\n"),
    ChatTemplate(
        "starling", (), _STARLING, "<|end_of_turn|>", "GPT4 Correct User: ", "GPT4 Correct Assistant:"
    ),
    ChatTemplate("phi-3", ("phi-35", "phi-3.5"), _PHI_3, "<|end|>", "<|user|>\n", "<|assistant|>\n"),
)
