"""What a trainer's settings change of the tokenizer: its eos and pad tokens and its chat template, in place, so that
what is saved with the model has them."""

from pathlib import Path
from typing import Any

from jaxtune.errors import ChatTemplateError, OptionError, nearest

JINJA = (".jinja", ".j2")


def change_tokenizer(
    tokenizer: Any, eos_token: str | None, pad_token: str | None, chat_template_path: str | Path | None
) -> None:
    """None leaves each as it is."""
    options = {"chat_template_path": chat_template_path, "eos_token": eos_token, "pad_token": pad_token}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if tokenizer is None and given:
        raise OptionError(
            f"{' and '.join(given)} without a tokenizer.",
            expected="a tokenizer to change.",
            fix="Pass processing_class=tokenizer.",
        )
    path = given.pop("chat_template_path", None)
    for name, token in given.items():
        if token not in tokenizer.get_vocab():
            raise OptionError(
                f"{name}={token!r} is not in the tokenizer's vocabulary.",
                expected="a token of the vocabulary: the model has no embedding of another.",
                fix="Correct it, or add the token to tokenizer and model with add_new_tokens."
                f"{nearest(token, tokenizer.all_special_tokens)}",
            )
    if path is not None:
        _take_template(tokenizer, Path(path))
    for name, token in given.items():
        setattr(tokenizer, name, token)


def _take_template(tokenizer: Any, path: Path) -> None:
    if path.suffix in JINJA:
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(path, error) from error
        return
    from transformers import AutoTokenizer  # a second, which only those pay who need it

    try:
        source = AutoTokenizer.from_pretrained(str(path))
        template = source.get_chat_template()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    used = [str(token) for token in source.added_tokens_decoder.values() if str(token) in template]
    ends = [source.eos_token] if source.eos_token is not None else []
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in dict.fromkeys([*ends, *used]) if token not in vocabulary]:
        raise ChatTemplateError(
            f"the chat template of {path} needs the tokens {missing}, which the tokenizer does not have.",
            expected="a template whose tokens the model knows.",
            fix=f"Call add_new_tokens(model, tokenizer, {missing}) before get_peft_model, or choose a template of the "
            "model's own family.",
        )
    tokenizer.chat_template = template
    if ends:
        tokenizer.eos_token = source.eos_token


def _unreadable(path: Path, error: Exception) -> OptionError:
    return OptionError(
        f"chat_template_path={str(path)!r} cannot be read: {str(error).splitlines()[0]}",
        expected=f"a Jinja file ({' or '.join(JINJA)}), or a folder or hub id with a tokenizer that has a template.",
        fix="Correct the path; get_chat_template knows the usual templates by name.",
    )
