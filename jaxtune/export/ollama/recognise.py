"""Which named chat template a tokenizer prompts in, and what its template says as the system where nobody else does.

A template that is none of ours is known by what it prints: published ones differ in text, from model to model and from
one release to the next, where they mean the same.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxtune.data.chat_templates import TEMPLATES, ChatTemplate
from jaxtune.data.templates import named_template, template_of
from jaxtune.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

log = get_logger(__name__)

Messages = Sequence[dict[str, Any]]

_MODELS = {
    r"llama-?3\.[123].*instruct": "llama-3.1",
    r"llama-?3-.*instruct": "llama-3",
    r"llama-?2-.*chat": "llama",
    r"mistral-7b-instruct-v0\.2": "mistral",
    r"qwen2\.5-.*instruct": "qwen-2.5",
    r"qwen3-.*instruct": "qwen3-instruct",
    r"qwen3-.*thinking": "qwen3-thinking",
    r"qwen3-[\d.]+b(-a[\d.]+b)?(?!.*base)": "qwen-3",
    r"gemma-3n?-.*it\b": "gemma-3",
    r"(?<![a-z])(code)?gemma-(1\.1-|2-)?\d+b-it": "gemma",
    r"phi-4(?!-mini|-reasoning|-multimodal)": "phi-4",
    r"phi-3(\.5)?-mini.*instruct": "phi-3",
    r"gpt-oss": "gpt-oss",
    r"lfm2\.5-.*instruct": "lfm-2.5",
    r"lfm2-[\d.]+[bm]\b": "lfm-2",
    r"tinyllama.*chat-v1|zephyr": "zephyr",
    r"starling-lm": "starling",
    r"vicuna": "vicuna",
    r"yi-.*chat": "chatml",
}
"""What occurs in the names of models, and the chat template they were published with. The first that occurs counts."""


def named_template_of(tokenizer: "Tokenizer", model_name: str) -> ChatTemplate | None:
    """The template that was attached, or the one that prints the same as the tokenizer's own. Only a tokenizer without
    any goes by the model's name: a template that we do not know may not be taken for one that we do."""
    if tokenizer.chat_template:
        return template_of(tokenizer) or _printing_the_same(tokenizer)
    found = (name for pattern, name in _MODELS.items() if re.search(pattern, model_name.lower()))
    if (name := next(found, None)) is None:
        return None
    log.info("The tokenizer has no chat template: by the name of the model, it is %s", name)
    return named_template(name)


def default_system(tokenizer: "Tokenizer", template: ChatTemplate) -> str | None:
    """The system message of conversations that have none, which the tokenizer's template or `get_chat_template` puts
    there: what stands at its place, in what is printed. None if nothing does."""
    place = "\ufdd2"  # a character that no text has
    marked = _prompt(tokenizer, [_system(place), _user("Hi")], template.jinja)
    plain = _prompt(tokenizer, [_user("Hi")], None if tokenizer.chat_template else template.jinja)
    if plain is None or marked is None:
        return None
    before, after = marked.split(place)
    if not plain.startswith(before) or not plain.removeprefix(before).endswith(after):
        return None
    return plain.removeprefix(before).removesuffix(after)


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def _assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


_Chat = tuple[Messages, dict[str, Any]]  # and what it is rendered with
_CHATS: tuple[_Chat, ...] = (
    ([_user(" Hi?\n")], {}),
    ([_system(" Be brief. \n"), _user("Hi?"), _assistant("\n Hello. "), _user("And?")], {}),
    ([_user("Hi?"), _assistant("<think>\nhm\n</think>\n\nHello."), _user("And?"), _assistant("So.")], {}),
)
_TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
}
_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
# A prompt may have none of this; but where two templates make the same prompts, these say which it is.
_MORE: tuple[_Chat, ...] = (
    ([_user("1 + 2?")], {"tools": [_TOOL]}),
    (
        [_user("1 + 2?"), _assistant("", tool_calls=[_CALL]), {"role": "tool", "content": "3"}],
        {"tools": [_TOOL]},
    ),
    ([_user("Hi?"), _assistant("Hello.")], {"add_generation_prompt": False}),
)


def _printing_the_same(tokenizer: "Tokenizer") -> ChatTemplate | None:
    """Of those that print the same prompts, the one that also prints the most else of the same."""
    own = [_prompt(tokenizer, chat, **options) for chat, options in _CHATS]
    own_more = [_prompt(tokenizer, chat, **options) for chat, options in _MORE]
    if own[0] is None:
        return None

    def prompts(template: ChatTemplate, chats: Sequence[_Chat]) -> list[str | None]:
        said = default_system(tokenizer, template)
        before = [] if said is None else [_system(said)]
        return [
            _prompt(
                tokenizer,
                chat if chat[0]["role"] == "system" else [*before, *chat],
                template.jinja,
                **options,
            )
            for chat, options in chats
        ]

    def same(template: ChatTemplate) -> int:
        return sum(a == b for a, b in zip(own_more, prompts(template, _MORE), strict=True))

    alike = [template for template in TEMPLATES if prompts(template, _CHATS) == own]
    return max(alike, key=same, default=None)


def _prompt(
    tokenizer: "Tokenizer", messages: Messages, jinja: str | None = None, **options: Any
) -> str | None:
    """By the tokenizer's own template unless `jinja` is given, without the bos token, which not every template writes;
    None where the template refuses."""
    options = {"add_generation_prompt": True, "date_string": "26 Jul 2024", **options}
    try:
        text = tokenizer.apply_chat_template(list(messages), chat_template=jinja, tokenize=False, **options)
    except Exception:  # a template may fail in any way
        return None
    return text.removeprefix(tokenizer.bos_token or "")
