"""Chat templates by name: `get_chat_template` gives a tokenizer one, and the token that ends its turns.

The templates (`data/chat_templates`) mark what the assistant writes with `{% generation %}`, so that masks are exact.
The tokenizer gets them *without* these tags, because it is saved and travels: minijinja and llama-cpp-python (and what
is built on them) reject a tag they do not know. `masking_template` puts the tags back when a mask is wanted.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxtune.data.chat_templates import TEMPLATES, ChatTemplate
from jaxtune.data.chat_templates.template import OWN_EOS
from jaxtune.data.encoding import marks_generation, prefix_ids
from jaxtune.data.example_template import example_of
from jaxtune.errors import ChatTemplateError, OptionError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

DEFAULT_MAPPING = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}
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
        _require_form(template, tokenizer, system_message)
        jinja, stop_token = template.jinja, template.stop_token
        # A tokenizer that starts every text with bos trains and generates better from one: the template writes it, so
        # that it is there exactly once on every path, ours and other people's.
        adds_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in prefix_ids(tokenizer)
        bos = "{{- bos_token }}" if adds_bos and "bos_token" not in jinja else ""
    else:
        (jinja, stop_token), bos = chat_template, ""

    if map_eos_token and stop_token != OWN_EOS:
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


def _require_form(template: ChatTemplate, tokenizer: "Tokenizer", system_message: str | None) -> None:
    """What would otherwise be an error of every single conversation."""
    if template.stop_token == OWN_EOS and tokenizer.eos_token is None:
        raise ChatTemplateError(
            f"the template {template.name!r} ends turns with the tokenizer's eos token, and it has none.",
            expected="a tokenizer with an eos_token.",
            fix="Set `tokenizer.eos_token` to a token of its vocabulary, or choose a template with a stop token.",
        )
    if system_message is not None and not template.has_system:
        raise ChatTemplateError(
            f"the template {template.name!r} has no place for a system message.",
            expected="system_message=None for this format, as it was published.",
            fix="Begin the first user message with these words, or choose another template.",
        )


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
