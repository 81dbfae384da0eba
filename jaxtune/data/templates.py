"""Chat templates by name: `get_chat_template` gives a tokenizer one, and the token that ends its turns.

Each template is written once, with `{% generation %}` around what the assistant writes, so that masks are exact. The
tokenizer gets it *without* these tags, because it is saved and travels: minijinja and llama-cpp-python (and what is
built on them) reject a tag they do not know. `masking_template` puts the tags back when a mask is wanted.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtune.data.encoding import marks_generation, prefix_ids
from jaxtune.data.example_template import example_of
from jaxtune.errors import ChatTemplateError, OptionError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

DEFAULT_MAPPING = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class ChatTemplate:
    """One published conversation format."""

    name: str
    aliases: tuple[str, ...]
    marked_jinja: str  # with {% generation %} markers
    stop_token: str  # ends every turn; what generation stops at
    instruction_part: str  # what opens a user's turn
    response_part: str  # what opens the assistant's turn

    @property
    def jinja(self) -> str:
        return self.marked_jinja.replace("{% generation %}", "").replace("{% endgeneration %}", "")


# `+ ''` makes a message without content an error instead of an empty turn.
_CHATML = r"""
{%- if tools %}{{ raise_exception('chatml has no form for tools') }}{% endif %}
{%- for message in messages %}
    {%- if message['tool_calls'] %}{{ raise_exception('chatml has no form for tool calls') }}{% endif %}
    {%- set content = message['content'] + '' %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}{% generation %}{{ content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{ content + '<|im_end|>' }}{% endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

_LLAMA_3 = r"""
{%- if tools %}{{ raise_exception('llama-3 has no form for tools; llama-3.1 has') }}{% endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['tool_calls'] %}{{ raise_exception('llama-3 has no form for tool calls') }}{% endif %}
    {%- set content = (message['content'] + '') | trim %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if message['role'] == 'assistant' %}{% generation %}{{ content + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}{{ content + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

# Options of the published format, all optional: date_string, custom_tools (instead of tools), builtin_tools,
# tools_in_user_message. There is always a system turn, for the dates.
_LLAMA_3_1 = r"""
{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if tools is not defined %}{% set tools = none %}{% endif %}
{%- set in_user_turn = tools_in_user_message | default(true) %}
{%- set how_to_call %}
    {{- 'Respond in the format {"name": function name, ' }}
    {{- '"parameters": dictionary of argument name and its value}.Do not use variables.\n\n' }}
    {%- for tool in tools or [] %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}
{%- endset %}
{%- set system_text = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_text = (messages[0]['content'] + '') | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools is not none or builtin_tools is defined %}{{ 'Environment: ipython\n' }}{% endif %}
{%- if builtin_tools is defined %}
    {{- 'Tools: ' + builtin_tools | reject('equalto', 'code_interpreter') | join(', ') + '\n\n' }}
{%- endif %}
{{- 'Cutting Knowledge Date: December 2023\n' }}
{{- 'Today Date: ' + date_string | default('26 Jul 2024') + '\n\n' }}
{%- if tools is not none and not in_user_turn %}
    {{- 'You have access to the following functions. ' }}
    {{- 'To call a function, please respond with JSON for a function call.' + how_to_call }}
{%- endif %}
{{- system_text + '<|eot_id|>' }}
{%- if tools is not none and in_user_turn %}
    {%- if not messages %}{{ raise_exception('tools go into the first user turn, and there is none') }}{% endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' }}
    {{- 'Given the following functions, please respond with a JSON for a function call ' }}
    {{- 'with its proper arguments that best answers the given prompt.\n\n' + how_to_call }}
    {{- (messages[0]['content'] + '') | trim + '<|eot_id|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message['tool_calls'] | length != 1 %}
            {{- raise_exception('llama-3.1 makes one tool call in a turn') }}
        {%- endif %}
        {%- set call = message['tool_calls'][0]['function'] %}
        {%- if builtin_tools is defined and call['name'] in builtin_tools %}
            {%- set text %}<|python_tag|>{{ call['name'] }}.call({% for name, value in call['arguments'] | items %}
                {{- name + '="' + value + '"' }}{% if not loop.last %}, {% endif %}{% endfor %}){% endset %}
        {%- else %}
            {%- set text = '{"name": "' + call['name'] + '", "parameters": ' + call['arguments'] | tojson + '}' %}
        {%- endif %}
        {%- set text = text + ('<|eom_id|>' if builtin_tools is defined else '<|eot_id|>') %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% generation %}{{ text }}{% endgeneration %}
    {%- elif message['role'] in ('tool', 'ipython') %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + message['content'] | tojson + '<|eot_id|>' }}
    {%- else %}
        {%- set content = (message['content'] + '') | trim %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {%- if message['role'] == 'assistant' %}{% generation %}{{ content + '<|eot_id|>' }}{% endgeneration %}
        {%- else %}{{ content + '<|eot_id|>' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

_LLAMA_PARTS = (
    "<|eot_id|>",
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)
_LLAMA_3_1_NAMES = ("llama-31", "llama-3.2", "llama-3.3", "llama-32", "llama-33")

TEMPLATES: tuple[ChatTemplate, ...] = (
    ChatTemplate("chatml", (), _CHATML, "<|im_end|>", "<|im_start|>user\n", "<|im_start|>assistant\n"),
    ChatTemplate("llama-3", ("llama3",), _LLAMA_3, *_LLAMA_PARTS),
    ChatTemplate("llama-3.1", _LLAMA_3_1_NAMES, _LLAMA_3_1, *_LLAMA_PARTS),
)
_BY_NAME = {name: template for template in TEMPLATES for name in (template.name, *template.aliases)}


def get_chat_template(
    tokenizer: "Tokenizer",
    chat_template: str | tuple[str, str] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> "Tokenizer":
    """Gives `tokenizer` a chat template and returns that same tokenizer.

    Args:
        tokenizer: changed in place: its `chat_template`, with `map_eos_token` its `eos_token`; its vocabulary never.
        chat_template: a name (`TEMPLATES`), or `(jinja, stop_word)` for your own; the stop word "eos_token" means the
            tokenizer's own.
        mapping: what your dataset calls these: for ShareGPT
            `{"role": "from", "content": "value", "user": "human", "assistant": "gpt"}`.
        map_eos_token: makes the template's stop token the tokenizer's eos token, so that generation stops at it.
        system_message: used for conversations that do not begin with a system message of their own.
    """
    if isinstance(chat_template, str):
        template = named_template(chat_template)
        jinja, stop_token = template.jinja, template.stop_token
        # A tokenizer that starts every text with bos trains and generates better from one: the template writes it, so
        # that it is there exactly once on every path, ours and other people's.
        adds_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in prefix_ids(tokenizer)
        bos = "{{- bos_token }}" if adds_bos and "bos_token" not in jinja else ""
    else:
        (jinja, stop_token), bos = chat_template, ""

    if map_eos_token and stop_token != "eos_token":
        end_turns_with(tokenizer, stop_token)
    tokenizer.chat_template = _renaming(mapping) + _default_system(system_message) + bos + jinja
    return tokenizer


def named_template(name: str) -> ChatTemplate:
    if name not in _BY_NAME:
        raise ChatTemplateError(
            f"there is no chat template named {name!r}.",
            expected=f"one of {', '.join(sorted(_BY_NAME))}, or a pair (jinja, stop_word).",
            fix="Use one of these names, or pass your own template." + nearest(name, _BY_NAME),
        )
    return _BY_NAME[name]


def template_of(tokenizer: "Tokenizer") -> ChatTemplate | None:
    """Our named template that the tokenizer carries, also after it was saved and loaded again."""
    jinja = tokenizer.chat_template
    return next((t for t in TEMPLATES if isinstance(jinja, str) and jinja.endswith(t.jinja)), None)


def masking_template(tokenizer: "Tokenizer") -> str | None:
    """The tokenizer's chat template with generation markers, or None where nobody marked what the assistant writes."""
    jinja, template = tokenizer.chat_template, template_of(tokenizer)
    if template is not None:
        return jinja.removesuffix(template.jinja) + template.marked_jinja
    if (example := example_of(tokenizer)) is not None:
        return example.marked_jinja
    return jinja if isinstance(jinja, str) and marks_generation(jinja) else None


def end_turns_with(tokenizer: "Tokenizer", stop_token: str) -> None:
    if tokenizer.convert_tokens_to_ids(stop_token) in (None, tokenizer.unk_token_id):
        raise ChatTemplateError(
            f"the template's stop token {stop_token!r} is not in the tokenizer's vocabulary.",
            expected="a template whose stop token the model has: a new one would change the vocabulary's size, and its "
            "embedding would be untrained.",
            fix="Choose a template of the model's own family; or pass map_eos_token=False to keep the eos token "
            f"{tokenizer.eos_token!r} ({stop_token!r} is then several ordinary tokens); or add the token to tokenizer "
            "and model before calling this.",
        )
    tokenizer.eos_token = stop_token


def _renaming(mapping: Mapping[str, str] | None) -> str:
    """Jinja that turns messages with the dataset's own key and role names into the standard ones."""
    names = {**DEFAULT_MAPPING, **(mapping or {})}
    if unknown := set(names) - set(DEFAULT_MAPPING):
        raise OptionError(
            f"mapping has the keys {sorted(unknown)}.",
            expected=f"the keys {sorted(DEFAULT_MAPPING)}, each with the dataset's name for it.",
            fix='For ShareGPT: {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}.',
        )
    if names == DEFAULT_MAPPING:
        return ""
    role, content, user, assistant = (json.dumps(names[key], ensure_ascii=False) for key in DEFAULT_MAPPING)
    return (
        "{%- set renamed = namespace(messages=[]) %}{%- for message in messages %}"
        f"{{%- set role = message[{role}] if {role} in message else message['role'] %}}"
        f"{{%- set content = message[{content}] if {content} in message else message['content'] %}}"
        f"{{%- set role = 'user' if role == {user} else 'assistant' if role == {assistant} else role %}}"
        "{%- set renamed.messages = renamed.messages + [{'role': role, 'content': content}] %}"
        "{%- endfor %}{%- set messages = renamed.messages %}"
    )


def _default_system(message: str | None) -> str:
    if message is None:
        return ""
    # JSON's escapes are also Jinja's, so any text survives.
    turn = f"[{{'role': 'system', 'content': {json.dumps(message, ensure_ascii=False)}}}]"
    return (
        f"{{%- if messages[0]['role'] != 'system' %}}{{%- set messages = {turn} + messages %}}{{%- endif %}}"
    )
