"""A Modelfile prompts as the tokenizer that the model was trained with, and stops where its turns end."""

import json
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest

from jaxtune import apply_chat_template, construct_chat_template, get_chat_template
from jaxtune.data.templates import TEMPLATES, named_template
from jaxtune.export.ollama import modelfile, sampling_of
from jaxtune.export.ollama.formats import FORMATS as GO
from tests.data.named_formats import FORMATS, WITHOUT_SYSTEM
from tests.data.test_published_templates import ALL as PUBLISHED
from tests.data.test_published_templates import NOTHING
from tests.data.tiny_tokenizer import CHATML, chatml_tokenizer, tiny_tokenizer
from tests.export.go_template import go_json
from tests.export.ollama_model import Model, read
from tests.kit import published


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def tool(text):
    return {"role": "tool", "content": text}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tokenizer_for(name, **options):
    return get_chat_template(FORMATS[named_template(name).name].tokenizer(), name, **options)


def expected_prompt(tokenizer, messages, **options) -> str:
    goes_on = messages[-1]["role"] == "assistant"
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, continue_final_message=goes_on, add_generation_prompt=not goes_on, **options
    )
    return text.removeprefix(tokenizer.bos_token or "")


def model_of(tokenizer, file="x.gguf") -> Model:
    return read(modelfile(file, tokenizer))


class Case(NamedTuple):
    """A conversation, and what a request asks for besides, in Ollama's names and in the chat template's."""

    name: str
    messages: list[dict]
    asked: Mapping[str, Any] = NOTHING
    options: Mapping[str, Any] = NOTHING


SPACES = [user("\n Hi?\n"), assistant(" Yes. \n\n"), user("\tAnd?\n"), assistant("\nSo. "), user(" Go ")]
CONVERSATIONS = {
    "one turn": [user("Hi")],
    "three turns": [user("1"), assistant("2"), user("3"), assistant("4"), user("5")],
    "the assistant last": [user("Hi"), assistant("Well,")],
    "the assistant last of three turns": [user("1"), assistant("2"), user("3"), assistant(" 4")],
    "empty": [user(""), assistant(""), user("")],
    "markup": [user('<b>&"x"\'s {{ .Role }} {% x %} \\n"""')],
    "unicode": [user("héllo 🙂\n\n你好"), assistant("naïve\u00a0👩‍👩‍👧"), user("नमस्ते")],
    "line breaks at both ends": SPACES,
    "nothing but white space": [user(" \n\r\t\v\f "), assistant("\n"), user(" ")],
}
WITH_SYSTEM = {
    "system": [system("Be brief."), user("Hi")],
    "system and three turns": [system("Be."), *CONVERSATIONS["three turns"]],
    "system, then the assistant last": [system("s"), user("u"), assistant("open")],
    "an empty system message": [system(""), user("Hi")],
    "system with line breaks at both ends": [system("\n Be <b>&\"'. \n"), *SPACES],
    "system and white space": [system(" Be. "), user(" \n")],
}
# Others have a place for it only before the conversation.
SYSTEM_ANYWHERE = (
    *("chatml", "phi-4", "lfm-2", "lfm-2.5", "llama-3", "llama-3.1", "qwen-2.5", "qwen-3", "qwen3-instruct"),
    *("qwen3-thinking", "gemma-4", "gemma-4-thinking", "zephyr", "starling", "phi-3"),
)
LATER_SYSTEM = {
    "a later system message": [user("a"), system("b"), user("c")],
    "two system messages": [system("a"), user("b"), system(""), user("c")],
    "a system message last": [user("a"), assistant("b"), system("c")],
}

# transformers sees a space after an answer of Llama 2's, which ends it, and takes the answer for one left as it was.
OPEN_SPACES = {"an open answer ends in white space": [user("Hi"), assistant("Well, \n")]}

CASES = {
    f"{name}: {title}": Case(name, messages)
    for name in GO
    for title, messages in {
        **CONVERSATIONS,
        **({} if name in WITHOUT_SYSTEM else WITH_SYSTEM),
        **(LATER_SYSTEM if name in SYSTEM_ANYWHERE else {}),
        **({} if name == "llama" else OPEN_SPACES),
    }.items()
}

SAID_TWICE = [user("1"), assistant("2"), user("3")]
THOUGHT = [user("1"), assistant("2", thinking="hm", reasoning_content="hm"), user("3")]
CASES |= {
    "qwen-3: past thoughts": Case("qwen-3", THOUGHT),
    "qwen3-thinking: past thoughts": Case("qwen3-thinking", THOUGHT),
    "qwen-3: an open thought": Case("qwen-3", [*THOUGHT, assistant("4", thinking="so", reasoning_content="so")]),
    "qwen-3: not to think": Case("qwen-3", SAID_TWICE, {"IsThinkSet": True}, {"enable_thinking": False}),
    "qwen-3: to think": Case("qwen-3", SAID_TWICE, {"IsThinkSet": True, "Think": True}, {"enable_thinking": True}),
    "gpt-oss: past thoughts": Case("gpt-oss", THOUGHT),
    "gpt-oss: an open thought": Case("gpt-oss", [*THOUGHT, assistant("4", thinking="so")]),
    "gpt-oss: effort": Case("gpt-oss", SAID_TWICE, {"ThinkLevel": "high"}, {"reasoning_effort": "high"}),
    **{
        f"{name}: to think, {title}": Case(name, messages, {"Think": True}, {"enable_thinking": True})
        for name in ("gemma-4", "gemma-4-thinking")
        for title, messages in {
            "no system": SAID_TWICE, "system": [system("Be."), *SAID_TWICE], "a later system": [user("a"), system("b")],
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_prompts_as_the_tokenizer_does(case):
    tokenizer = tokenizer_for(case.name)
    prompt = model_of(tokenizer).prompt(case.messages, **case.asked)
    assert prompt == expected_prompt(tokenizer, case.messages, **case.options)


def test_every_named_template_is_there():
    assert set(GO) == {template.name for template in TEMPLATES}


@pytest.mark.parametrize("name", [alias for template in TEMPLATES for alias in template.aliases])
def test_another_name_for_a_template(name):
    assert (
        model_of(tokenizer_for(name)).template == model_of(tokenizer_for(named_template(name).name)).template
    )


# Ollama keeps these keys of a tool, in this order.
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Does {name!r}.",
            "parameters": {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}},
        },
    }
    for name in ("add", "subtract")
]
ARGUMENTS = [{"a": 1, "b": "x y"}, {"c": [1.5, None, {"d": True}]}]
ONE, TWO = call("add", **ARGUMENTS[0]), call("subtract", **ARGUMENTS[1])
TOOL_CHATS = {
    "tools": [user(" 1 + 2? ")],
    "tools and system": [system("Be brief."), user("1 + 2?")],
    "a call": [user("1 + 2?"), assistant("", tool_calls=[ONE]), tool("3")],
    "an answer": [user("1?"), assistant("", tool_calls=[ONE]), tool('{"x": 3}'), assistant("It is 3."), user("So")],
    "calls in turn": [
        user("1?"), assistant("", tool_calls=[ONE]), tool("3"), assistant("", tool_calls=[TWO]), tool("4"),
    ],
}  # fmt: skip
QWEN_TOOL_CHATS = {
    **TOOL_CHATS,
    "two calls and words": [
        user("1?"), assistant("See:", tool_calls=[ONE, TWO]), tool("3"), tool("4"), assistant("3."), user("And?"),
    ],
    "thoughts between": [
        user("1?"), assistant("", thinking="hm", reasoning_content="hm", tool_calls=[ONE]), tool("3"),
    ],
}  # fmt: skip
QWENS = ("qwen-2.5", "qwen-3", "qwen3-instruct", "qwen3-thinking")
TOOL_CASES = {
    f"{name}: {title}": Case(name, messages, {"Tools": TOOLS}, {"tools": TOOLS})
    for name in (*QWENS, "llama-3.1")
    for title, messages in (QWEN_TOOL_CHATS if name in QWENS else TOOL_CHATS).items()
}


class TestTools:
    """JSON is the one difference: Go's has no spaces, and the keys of arguments in order."""

    @pytest.mark.parametrize("case", TOOL_CASES.values(), ids=TOOL_CASES)
    def test_prompts_as_the_tokenizer_does(self, case):
        tokenizer = tokenizer_for(case.name)
        expected = expected_prompt(tokenizer, case.messages, **case.options)
        for value in (*TOOLS, *ARGUMENTS):
            for indent in (None, 4):
                expected = expected.replace(json.dumps(value, indent=indent), go_json(value))
        assert model_of(tokenizer).prompt(case.messages, **case.asked) == expected

    def test_markup_is_escaped_as_go_does(self):
        messages = [user("?"), assistant("", tool_calls=[call("add", b="<&>", a=1)]), tool("<3>")]
        prompt = model_of(tokenizer_for("qwen-2.5")).prompt(messages)
        assert '{"name": "add", "arguments": {"a":1,"b":"\\u003c\\u0026\\u003e"}}' in prompt
        assert "<tool_response>\n<3>\n</tool_response>" in prompt
        assert '"\\u003c3\\u003e"' in model_of(tokenizer_for("llama-3.1")).prompt(messages)

    @pytest.mark.parametrize("name", [name for name in GO if name not in (*QWENS, "llama-3.1")])
    def test_other_formats_do_not_say_that_they_have_tools(self, name):
        """Ollama looks for the word, and refuses a request with tools where it is not found."""
        assert "Tools" not in GO[name].go


class TestDifferences:
    """Where jinja would refuse, or has a function that Go lacks."""

    @pytest.mark.parametrize(
        ("name", "prompt"),
        [
            ("mistral", "[INST] Be.\n\nHi [/INST]"),
            ("gemma", "<start_of_turn>user\nBe.\n\nHi<end_of_turn>\n<start_of_turn>model\n"),
        ],
    )
    def test_a_system_message_without_a_place_opens_the_user_s_turn(self, name, prompt):
        assert model_of(tokenizer_for(name)).prompt([system("Be."), user("Hi")]) == prompt

    @pytest.mark.parametrize("name", ["llama", "llama-3", "llama-3.1", "gemma", "gemma-3", "gemma-4"])
    def test_white_space_of_other_scripts_stays_at_the_ends(self, name):
        tokenizer, messages = tokenizer_for(name), [user("\u3000Hi\u00a0")]
        found, expected = model_of(tokenizer).prompt(messages), expected_prompt(tokenizer, messages)
        assert found == expected.replace("Hi", "\u3000Hi\u00a0")

    def test_an_open_answer_of_llama_2_is_trimmed_as_closed_ones_are(self):
        prompt = model_of(tokenizer_for("llama")).prompt([user("Hi"), assistant(" Well, \n")])
        assert prompt == "[INST] Hi [/INST] Well,"

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("qwen-3", "<think>\nhm\n</think>\n\n2"),
            ("lfm-2.5", "<think>hm</think>2"),
            ("gemma-4", "<|channel>hm<channel|>2"),
        ],
    )
    def test_thoughts_within_an_answer_stay(self, name, said):
        tokenizer, messages = (
            tokenizer_for(name),
            [user("1"), assistant(said), user("3"), assistant("4"), user("5")],
        )
        found, expected = model_of(tokenizer).prompt(messages), expected_prompt(tokenizer, messages)
        assert said not in expected
        assert found.replace(said, "2") == expected


class TestTheFile:
    def test_chatml(self):
        tokenizer = get_chat_template(chatml_tokenizer(), "chatml", system_message='Be "brief",\nplease.')
        assert modelfile("Tiny.Q8_0.gguf", tokenizer) == (
            f'FROM ./Tiny.Q8_0.gguf\nTEMPLATE """{GO["chatml"].go}"""\n'
            'SYSTEM """Be "brief",\nplease."""\n'
            'PARAMETER stop "<|im_start|>"\nPARAMETER stop "<|im_end|>"\n'
        )

    def test_sampling_as_the_models_makers_recommend(self):
        lines = modelfile("x.gguf", tokenizer_for("gemma-3")).splitlines()
        assert lines[-4:] == [
            'PARAMETER stop "<end_of_turn>"',
            "PARAMETER temperature 1",
            "PARAMETER top_p 0.95",
            "PARAMETER top_k 64",
        ]

    @pytest.mark.parametrize(
        "one",
        [one for one in PUBLISHED if (published.FOLDER / one.folder / "generation_config.json").exists()],
        ids=lambda one: one.folder,
    )
    def test_sampling_as_it_was_published(self, one):
        """Where a temperature is not named, transformers has 1."""
        config = json.loads((published.FOLDER / one.folder / "generation_config.json").read_text())
        named = {name: config[name] for name in ("temperature", "top_p", "top_k") if name in config}
        expected = {"temperature": 1.0, **named} if config.get("do_sample") else {}
        assert GO[named_template(one.name).name].sampling == expected

    def test_what_the_base_recommends_goes_first(self, tmp_path):
        tokenizer = tokenizer_for("gemma-3")
        sampled = {"do_sample": True, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1, "top_p": None}
        (tmp_path / "generation_config.json").write_text(json.dumps(sampled))
        assert modelfile("x.gguf", tokenizer, sampling_of(tmp_path)).splitlines()[-4:] == [
            "PARAMETER temperature 1", "PARAMETER top_k 20", "PARAMETER min_p 0.05", "PARAMETER repeat_penalty 1.1",
        ]  # fmt: skip
        (tmp_path / "generation_config.json").write_text(json.dumps({**sampled, "do_sample": False}))
        assert sampling_of(tmp_path) == sampling_of(tmp_path / "nowhere") == {}

    @pytest.mark.parametrize("name", GO)
    def test_stops_at_the_end_of_turns_and_of_texts(self, name):
        tokenizer = tokenizer_for(name, map_eos_token=False)
        stops = model_of(tokenizer).stops()
        assert {named_template(name).stop_token_of(tokenizer), tokenizer.eos_token} <= set(stops)
        assert len(set(stops)) == len(stops)

    @pytest.mark.parametrize("name", GO)
    def test_no_answer_is_cut_by_a_stop(self, name):
        """What the model has to write holds none but at its end."""
        written = FORMATS[name].written("A text.\n\n- with a list").removeprefix("<think>\n\n</think>\n\n")
        stops = model_of(tokenizer_for(name, map_eos_token=False)).stops()
        if name == "gpt-oss":  # within a conversation, its answers end otherwise than a generation does
            written = FORMATS[name].written_last("A text.")
        at = min(written.find(stop) for stop in stops if stop in written)
        assert written[at:] == named_template(name).stop_token_of(tokenizer_for(name))

    def test_no_eos_token(self):
        tokenizer = get_chat_template(tiny_tokenizer(CHATML, eos=None), "chatml", map_eos_token=False)
        assert model_of(tokenizer).stops() == ["<|im_start|>", "<|im_end|>"]

    @pytest.mark.parametrize("eos", ['"', 'a"b', '"""', "a\nb", '"a"\n', '"\n"', "{{ end }}", "\\n"])
    def test_any_eos_token(self, eos):
        tokenizer = get_chat_template(tiny_tokenizer((eos,), eos=eos, bos="<s>"), "zephyr")
        model = model_of(tokenizer)
        assert model.stops()[-1] == eos
        assert model.prompt(SAID_TWICE) == expected_prompt(tokenizer, SAID_TWICE)

    def test_a_stop_that_a_modelfile_cannot_hold(self, caplog):
        tokenizer = get_chat_template(tiny_tokenizer(('"""\n.',), eos='"""\n.'), "phi-3", map_eos_token=False)
        assert model_of(tokenizer).stops() == list(GO["phi-3"].stops)
        assert 'The stop string has a line that ends with """' in caplog.text


class TestSystem:
    @pytest.mark.parametrize(
        "text",
        ["Be brief.", 'Use """ often.', '"quoted"', '"""', 'x"', "a\n\n b\n", "\\n {{ .Role }}", "é 🙂 你好"],
    )
    @pytest.mark.parametrize("name", ["chatml", "gemma-3", "llama", "qwen-2.5", "alpaca"])
    def test_what_get_chat_template_was_given(self, name, text):
        tokenizer = tokenizer_for(name, system_message=text)
        model = model_of(tokenizer)
        assert model.system == text
        assert model.prompt([user("Hi")]) == expected_prompt(tokenizer, [user("Hi")])

    def test_with_other_names_for_roles(self):
        mapping = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
        assert model_of(tokenizer_for("chatml", mapping=mapping, system_message="Be.")).system == "Be."

    @pytest.mark.parametrize("name", [*GO])
    def test_there_is_none_where_the_tokenizer_says_nothing(self, name):
        says = name in ("unsloth", "vicuna", "vicuna_old", "alpaca", "qwen-2.5")
        assert (model_of(tokenizer_for(name)).system is not None) is says

    @pytest.mark.parametrize("text", ['End with """\nalways.', '"""  \n.', 'a """\r\nb'])
    def test_what_a_modelfile_cannot_hold(self, text, caplog):
        assert model_of(tokenizer_for("chatml", system_message=text)).system is None
        assert 'The system message has a line that ends with """' in caplog.text

    def test_what_ollama_leaves_out(self, caplog):
        model = model_of(tokenizer_for("chatml", system_message="Dis\u00a0: 👩\u200d👧"))
        assert model.system == "Dis: 👩👧"
        assert "leave out of the system message what is not printed: U+00A0, U+200D." in caplog.text


class TestWhichTemplate:
    @pytest.mark.parametrize("name", GO)
    def test_one_that_prints_the_same(self, name, caplog):
        caplog.set_level(logging.INFO)
        tokenizer = tokenizer_for(name)
        expected = modelfile("x.gguf", tokenizer)
        tokenizer.chat_template += "{# changed #}"
        assert modelfile("x.gguf", tokenizer) == expected
        assert caplog.messages[-1] == f"The Modelfile has the chat template {name}"

    @pytest.mark.parametrize("one", [one for one in PUBLISHED if one.is_here], ids=lambda one: one.folder)
    def test_the_published_one(self, one):
        tokenizer = FORMATS[named_template(one.name).name].tokenizer()
        tokenizer.chat_template = one.jinja
        assert model_of(tokenizer).template == model_of(tokenizer_for(one.name)).template

    def test_one_with_a_system_message_of_its_own(self):
        """As that of Qwen 2 and of SmolLM 2."""
        tokenizer = chatml_tokenizer(
            chat_template="{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
            "<|im_start|>system\nBe of help.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
            "{{ message['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        model = model_of(tokenizer)
        assert (model.template, model.system) == (GO["chatml"].go, "Be of help.")
        assert model.prompt([user("Hi")]) == expected_prompt(tokenizer, [user("Hi")])

    def test_several_of_which_one_is_the_default(self):
        tokenizer = tokenizer_for("qwen-2.5")
        expected = modelfile("x.gguf", tokenizer)
        tokenizer.chat_template = {"default": tokenizer.chat_template, "rag": "{{ documents }}"}
        assert modelfile("x.gguf", tokenizer) == expected

    def test_one_made_of_an_example(self):
        example = "{SYSTEM}\nQ: {INPUT}\nA: {OUTPUT}\nQ: {INPUT}\nA: {OUTPUT}"
        tokenizer = tiny_tokenizer()
        apply_chat_template(
            [{"messages": [user("Hi")]}], tokenizer, example, default_system_message="Be brief."
        )
        template = construct_chat_template(tokenizer, example)
        assert modelfile("x.gguf", tokenizer) == (
            f'FROM ./x.gguf\nTEMPLATE """{template.go}"""\nSYSTEM """Be brief."""\nPARAMETER stop "</s>"\n'
        )
        assert model_of(tokenizer).prompt([user("Hi")]) == "Be brief.\nQ: Hi\nA: "

    @pytest.mark.parametrize(
        ("file", "name"),
        [
            ("Llama-3.2-1B-Instruct.Q8_0.gguf", "llama-3.1"),
            ("Meta-Llama-3.1-8B-Instruct-bnb-4bit.F16.gguf", "llama-3.1"),
            ("Meta-Llama-3-8B-Instruct.Q8_0.gguf", "llama-3"),
            ("Llama-2-7b-chat-hf.Q8_0.gguf", "llama"),
            ("Mistral-7B-Instruct-v0.2.Q8_0.gguf", "mistral"),
            ("Qwen2.5-Coder-7B-Instruct.Q8_0.gguf", "qwen-2.5"),
            ("Qwen3-0.6B.Q8_0.gguf", "qwen-3"),
            ("Qwen3-30B-A3B-Instruct-2507.Q8_0.gguf", "qwen3-instruct"),
            ("Qwen3-4B-Thinking-2507.Q8_0.gguf", "qwen3-thinking"),
            ("gemma-2-9b-it.Q8_0.gguf", "gemma"),
            ("gemma-3-4b-it.Q8_0.gguf", "gemma-3"),
            ("gemma-3n-E4B-it.Q8_0.gguf", "gemma-3"),
            ("phi-4.Q8_0.gguf", "phi-4"),
            ("Phi-3.5-mini-instruct.Q8_0.gguf", "phi-3"),
            ("gpt-oss-20b.Q8_0.gguf", "gpt-oss"),
            ("LFM2-1.2B.Q8_0.gguf", "lfm-2"),
            ("zephyr-7b-beta.Q8_0.gguf", "zephyr"),
            ("vicuna-7b-v1.5.Q8_0.gguf", "vicuna"),
        ],
    )
    def test_a_tokenizer_without_one_goes_by_the_model_s_name(self, file, name, caplog):
        caplog.set_level(logging.INFO)
        tokenizer = FORMATS[name].tokenizer()
        tokenizer.chat_template = None
        model, attached = model_of(tokenizer, file), model_of(tokenizer_for(name, map_eos_token=False))
        assert model == attached._replace(source=f"./{file}")
        assert f"by the name of the model, it is {name}" in caplog.text

    @pytest.mark.parametrize(
        "file",
        [
            *(
                "tiny.Q8_0.gguf",
                "Llama-3.2-1B.Q8_0.gguf",
                "Qwen3-0.6B-Base.Q8_0.gguf",
                "gemma-3-4b-pt.Q8_0.gguf",
            ),
            *(
                "Phi-4-mini-instruct.Q8_0.gguf",
                "Mistral-7B-Instruct-v0.3.Q8_0.gguf",
                "gemma-4-E4B-it.Q8_0.gguf",
            ),
        ],
    )
    def test_names_that_say_nothing(self, file, caplog):
        assert model_of(tiny_tokenizer(), file).template is None
        assert "the Modelfile has no TEMPLATE" in caplog.text

    def test_a_template_that_is_not_known(self, caplog):
        """Whatever the model's name: it was trained with this one."""
        tokenizer = chatml_tokenizer(
            chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}"
        )
        lines = modelfile("Qwen3-0.6B.Q8_0.gguf", tokenizer).splitlines()
        assert lines == [
            "FROM ./Qwen3-0.6B.Q8_0.gguf",
            "# No TEMPLATE: Ollama goes by the chat template in the GGUF.",
            'PARAMETER stop "<|im_end|>"',
        ]
        assert "the Modelfile has no TEMPLATE" in caplog.text

    def test_a_template_that_fails(self):
        tokenizer = chatml_tokenizer(chat_template="{{ raise_exception('no') }}")
        assert model_of(tokenizer).template is None
