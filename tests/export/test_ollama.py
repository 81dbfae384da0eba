"""A Modelfile prompts as the tokenizer that the model was trained with, and stops where its turns end."""

import pytest

from jaxtune import apply_chat_template, construct_chat_template, get_chat_template
from jaxtune.export.ollama import GO_TEMPLATES, modelfile
from tests.export.byte_level import byte_level
from tests.export.go_template import render
from tests.kit import models

NAMES = list(GO_TEMPLATES)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


CONVERSATIONS = {
    "one turn": [user("Hi")],
    "system": [system("Be brief."), user("Hi")],
    "three turns": [system("Be."), user("1"), assistant("2"), user("3"), assistant("4"), user("5")],
    "the assistant last": [user("Hi"), assistant("Well,")],
    "system, then the assistant": [system("s"), assistant("open")],
    "empty": [user("")],
    "markup": [user('<b>&"x"\'s {{ .Role }} {% x %}')],
    "unicode": [user("héllo 🙂\n\nnext")],
    "only a system message": [system("x")],
    "a later system message": [user("a"), system("b"), user("c")],
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_go_template_prints_what_the_tokenizer_does(name, messages):
    tokenizer = get_chat_template(byte_level("llama-bpe"), name)
    goes_on = messages[-1]["role"] == "assistant"
    expected = tokenizer.apply_chat_template(
        messages, tokenize=False, continue_final_message=goes_on, add_generation_prompt=not goes_on
    )
    assert render(GO_TEMPLATES[name], messages) == expected.removeprefix(tokenizer.bos_token)


def test_chatml():
    tokenizer = get_chat_template(models.fresh_tokenizer(), "chatml", system_message='Be "brief",\nplease.')
    assert (
        modelfile("Tiny.Q8_0.gguf", tokenizer)
        == f'''FROM ./Tiny.Q8_0.gguf
TEMPLATE """{GO_TEMPLATES["chatml"]}"""
SYSTEM """Be "brief",
please."""
PARAMETER stop "<|im_start|>"
PARAMETER stop "<|im_end|>"
'''
    )


@pytest.mark.parametrize("name", ["llama-3", "llama-3.1"])
def test_llama_stops_at_the_end_of_turns_and_of_texts(name):
    tokenizer = get_chat_template(byte_level("llama-bpe"), name, map_eos_token=False)
    lines = modelfile("x.gguf", tokenizer).splitlines()
    stops = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
    assert [line for line in lines if line.startswith("PARAMETER")] == [
        f'PARAMETER stop "{stop}"' for stop in stops
    ]
    assert not any(line.startswith("SYSTEM") for line in lines)


def test_a_template_made_of_an_example():
    example = "{SYSTEM}\nQ: {INPUT}\nA: {OUTPUT}\nQ: {INPUT}\nA: {OUTPUT}"
    tokenizer = models.fresh_tokenizer()
    apply_chat_template([{"messages": [user("Hi")]}], tokenizer, example, default_system_message="Be brief.")
    template = construct_chat_template(tokenizer, example)
    assert (
        modelfile("x.gguf", tokenizer)
        == f'''FROM ./x.gguf
TEMPLATE """{template.go}"""
SYSTEM """Be brief."""
PARAMETER stop "{tokenizer.eos_token}"
'''
    )
    assert render(template.go, [system("s"), user("Hi")]) == "s\nQ: Hi\nA: "


def test_a_system_message_survives_other_names_for_roles():
    mapping = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    tokenizer = get_chat_template(byte_level("llama-bpe"), "chatml", mapping, system_message="Be brief.")
    assert 'SYSTEM """Be brief."""\n' in modelfile("x.gguf", tokenizer)


def test_a_system_message_that_a_modelfile_cannot_hold(caplog):
    tokenizer = get_chat_template(models.fresh_tokenizer(), "chatml", system_message='Use """ often.')
    assert "SYSTEM" not in modelfile("x.gguf", tokenizer)
    assert "goes without it" in caplog.text


def test_without_a_named_template_it_says_so(caplog):
    tokenizer = models.fresh_tokenizer()
    lines = modelfile("x.gguf", tokenizer).splitlines()
    assert [line.split()[0] for line in lines] == ["FROM", "#", "PARAMETER"]
    assert "has no TEMPLATE" in caplog.text
