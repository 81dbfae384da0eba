"""The named templates against those that were published with the models: the same text for every conversation that the
published one renders, and an error where it raises. Published ones that are kept beside the repository are rendered;
of the others there are texts here, written down from what they print."""

import datetime
import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest

from jaxtune.data.templates import get_chat_template, named_template
from tests.data.named_formats import FORMATS
from tests.kit import published


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def call(**arguments) -> dict:
    return {"type": "function", "function": {"name": "add", "arguments": arguments}}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f'Does "{name}".',
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
    for name in ("add", "subtract")
]

CONVERSATIONS = {
    "a question": [user("Hi?")],
    "an answer": [user("Hi?"), assistant("Hello.")],
    "a second question": [user("Hi?"), assistant("Hello."), user("And?")],
    "three answers": [user("1"), assistant("2"), user("3"), assistant("4"), user("5"), assistant("6")],
    "system": [system("Be brief."), user("Hi?")],
    "system and an answer": [system("Be brief."), user("Hi?"), assistant("Hello.")],
    "system and two answers": [system("Be."), user("1"), assistant("2"), user("3"), assistant("4")],
    "white space": [user(" Hi?\n"), assistant("\n Hello. \n"), user("\tAnd?"), assistant(" So.\n\n")],
    "system with white space": [system("\n Be brief. \n"), user(" Hi? "), assistant(" Yo ")],
    "nothing said": [user(""), assistant("")],
    "nothing said by the system": [system(""), user("Hi?"), assistant("Hello.")],
    "markup": [user('<b>&"x"\'s {{ 1 }} {% x %} \\n'), assistant("naïve 🙂 <|x|>")],
    "two questions": [user("1"), user("2"), assistant("3")],
    "the assistant first": [assistant("1"), user("2")],
}
WITH_TOOLS = {
    "tools": [user("1 + 2?")],
    "tools and system": [system("Be brief."), user("1 + 2?")],
    "a call": [user("1 + 2?"), assistant("", tool_calls=[call(a=1, b="x")])],
    "a call with words": [user("1 + 2?"), assistant("Let me see.", tool_calls=[call(a=1)])],
    "a result": [
        user("1 + 2?"), assistant("", tool_calls=[call(a=1)]), {"role": "tool", "content": "3"}, assistant("It is 3."),
    ],
}  # fmt: skip
TWO_CALLS = {
    "two calls and two results": [
        system("Be brief."), user("1 + 2?"), assistant("", tool_calls=[call(a=1), call(b={"c": [1.5, None]})]),
        {"role": "tool", "content": "3"}, {"role": "tool", "content": '{"x": 4}'}, assistant("3."), user("And?"),
    ],
}  # fmt: skip
ARGUMENTS_AS_TEXT = {
    "arguments as text": [
        user("1?"), assistant("", tool_calls=[{"function": {"name": "add", "arguments": '{"a": 1}'}}]),
    ],
}  # fmt: skip
THOUGHTS = {
    "thoughts": [
        user("1"), assistant("<think>\nhm\n</think>\n\n2"), user("3"), assistant("<think>\n\nso\n</think>\n\n\n4"),
    ],
    "thoughts apart": [
        user("1"), assistant("2", reasoning_content="hm"), user("3"), assistant("4", reasoning_content="\nso\n"),
    ],
    "thoughts between calls": [
        user("1"), assistant("<think>\nhm\n</think>\n\nSee:", tool_calls=[call(a=1)]), {"role": "tool", "content": "3"},
        assistant("", tool_calls=[call(a=2)]), {"role": "tool", "content": "4"}, assistant("5"),
    ],
}  # fmt: skip


NOTHING: Mapping = MappingProxyType({})


class Published(NamedTuple):
    name: str
    folder: str
    file: str = "tokenizer_config.json"
    with_tools: Mapping[str, list[dict]] = NOTHING
    options: Mapping = NOTHING

    @property
    def jinja(self) -> str:
        text = (published.FOLDER / self.folder / self.file).read_text()
        return text if self.file.endswith(".jinja") else json.loads(text)["chat_template"]

    @property
    def is_here(self) -> bool:
        return (published.FOLDER / self.folder / self.file).exists()


QWEN_TOOLS = {**WITH_TOOLS, **TWO_CALLS}
ALL = [
    Published("chatml", "dolphin-mixtral-8x7b"),
    Published("gemma_chatml", "mistral-7b-v0.1-finetune-32002"),
    Published("zephyr", "tinyllama-1.1b-chat-v1.0", "chat_template.jinja"),
    Published("llama", "adapter-llama-2-7b-r64"),
    Published("llama-3.1", "llama-3.1-8b-instruct-bnb-8bit", with_tools=WITH_TOOLS),
    Published("llama-3.2", "llama-3.2-3b-instruct", with_tools=WITH_TOOLS, options={"date_string": "1 May 2025"}),
    Published("mistral", "mistral-7b-instruct-v0.2"),
    Published("gemma", "gemma-2b-it"),
    Published("gemma2", "gemma-2-2b-it"),
    Published("gemma-3", "gemma-3-4b-it", "chat_template.json"),
    Published("phi-3", "phi-3-mini-4k-instruct"),
    Published("qwen-2.5", "qwen2.5-7b-instruct", with_tools={**QWEN_TOOLS, **ARGUMENTS_AS_TEXT}),
    Published(
        "qwen-3", "qwen3-4b", with_tools={**QWEN_TOOLS, **ARGUMENTS_AS_TEXT, **THOUGHTS}
    ),
    Published("qwen-3", "qwen3-1.7b", options={"enable_thinking": False}, with_tools=THOUGHTS),
    # Its text-only conversations are those of the instruct models without pictures.
    Published(
        "qwen3-instruct", "qwen3-vl-4b-instruct", "chat_template.json",
        with_tools={**QWEN_TOOLS, **ARGUMENTS_AS_TEXT},
    ),
]  # fmt: skip


def outcome(render: Callable[[], str]) -> str | None:
    """What is rendered, None where that is refused."""
    try:
        return render()
    except Exception:  # whatever a template raises
        return None


def cases() -> list:
    return [
        pytest.param(one, messages, tools, id=f"{one.name}, {one.folder}: {title}")
        for one in ALL
        if one.is_here
        for tools, conversations in ((None, CONVERSATIONS), (TOOLS, one.with_tools))
        for title, messages in conversations.items()
    ]


@pytest.mark.parametrize("prompt", [False, True], ids=["", "and a prompt"])
@pytest.mark.parametrize(("one", "messages", "tools"), cases())
def test_renders_what_the_published_one_does(one, messages, tools, prompt):
    form = FORMATS[named_template(one.name).name]
    theirs, ours = form.tokenizer(), get_chat_template(form.tokenizer(), one.name)
    options = {"tokenize": False, "add_generation_prompt": prompt, "tools": tools, **one.options}
    expected = outcome(lambda: theirs.apply_chat_template(messages, chat_template=one.jinja, **options))
    assert outcome(lambda: ours.apply_chat_template(messages, **options)) == expected


# The conversations whose texts stand below.
ONE, ANSWERED, TWICE, SYSTEM = (
    [user(" Hi?\n")],
    [user("Hi?"), assistant(" Hello. ")],
    [user("Hi?"), assistant("Hello."), user("And?"), assistant("So.")],
    [system(" Be brief. "), user("Hi?"), assistant("Hello.")],
)
VICUNA = (
    "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)
VICUNA_OLD = VICUNA.replace("curious user", "curious human").replace("the user's", "the human's")
ALPACA = (
    "<s>Below are some instructions that describe some tasks. "
    "Write responses that appropriately complete each request."
)
HARMONY = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2025-08-05\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
)
HARMONY_TWICE = (
    "<|start|>user<|message|>Hi?<|end|><|start|>assistant<|channel|>final<|message|>Hello.<|end|>"
    "<|start|>user<|message|>And?<|end|><|start|>assistant<|channel|>final<|message|>So."
)
IM_TWICE = (
    "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
)
IM_SYSTEM = (
    "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"
    "<|im_start|>assistant\nHello.<|im_end|>\n"
)
IM_ONE = "<|im_start|>user\n Hi?\n<|im_end|>\n"
IM_ANSWERED = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n Hello. <|im_end|>\n"
THOUGHT = "<think>\n\n</think>\n\n"

# name: what asks for an answer, and each conversation with its text
TEXTS = {
    "unsloth": (">>> Assistant: ", [
        (ONE, "<s>You are a helpful assistant to the user\n>>> User:  Hi?\n\n"),
        (ANSWERED, "<s>You are a helpful assistant to the user\n>>> User: Hi?\n>>> Assistant:  Hello. </s>\n"),
        (TWICE, "<s>You are a helpful assistant to the user\n>>> User: Hi?\n>>> Assistant: Hello.</s>\n"
                ">>> User: And?\n>>> Assistant: So.</s>\n"),
        (SYSTEM, "<s> Be brief. \n>>> User: Hi?\n>>> Assistant: Hello.</s>\n"),
    ]),
    "vicuna": ("ASSISTANT:", [
        (ONE, f"{VICUNA} USER:  Hi?\n "),
        (ANSWERED, f"{VICUNA} USER: Hi? ASSISTANT:  Hello. </s>"),
        (TWICE, f"{VICUNA} USER: Hi? ASSISTANT: Hello.</s>USER: And? ASSISTANT: So.</s>"),
        (SYSTEM, "<s> Be brief.  USER: Hi? ASSISTANT: Hello.</s>"),
    ]),
    "vicuna_old": ("### Assistant:", [
        (ONE, f"{VICUNA_OLD}\n### Human:  Hi?\n\n"),
        (ANSWERED, f"{VICUNA_OLD}\n### Human: Hi?\n### Assistant:  Hello. </s>\n"),
        (TWICE, f"{VICUNA_OLD}\n### Human: Hi?\n### Assistant: Hello.</s>\n"
                "### Human: And?\n### Assistant: So.</s>\n"),
        (SYSTEM, "<s> Be brief. \n### Human: Hi?\n### Assistant: Hello.</s>\n"),
    ]),
    "alpaca": ("### Response:\n", [
        (ONE, f"{ALPACA}\n\n### Instruction:\n Hi?\n\n\n"),
        (ANSWERED, f"{ALPACA}\n\n### Instruction:\nHi?\n\n### Response:\n Hello. </s>\n\n"),
        (TWICE, f"{ALPACA}\n\n### Instruction:\nHi?\n\n### Response:\nHello.</s>\n\n"
                "### Instruction:\nAnd?\n\n### Response:\nSo.</s>\n\n"),
        (SYSTEM, "<s> Be brief. \n\n### Instruction:\nHi?\n\n### Response:\nHello.</s>\n\n"),
    ]),
    "starling": ("GPT4 Correct Assistant:", [
        (ONE, "<s>GPT4 Correct User:  Hi?\n<|end_of_turn|>"),
        (ANSWERED, "<s>GPT4 Correct User: Hi?<|end_of_turn|>GPT4 Correct Assistant:  Hello. <|end_of_turn|>"),
        (TWICE, "<s>GPT4 Correct User: Hi?<|end_of_turn|>GPT4 Correct Assistant: Hello.<|end_of_turn|>"
                "GPT4 Correct User: And?<|end_of_turn|>GPT4 Correct Assistant: So.<|end_of_turn|>"),
        (SYSTEM, "<s>GPT4 Correct System:  Be brief. <|end_of_turn|>GPT4 Correct User: Hi?<|end_of_turn|>"
                 "GPT4 Correct Assistant: Hello.<|end_of_turn|>"),
    ]),
    "yi-chat": ("<|im_start|>assistant\n", [
        (ONE, IM_ONE), (ANSWERED, IM_ANSWERED), (TWICE, IM_TWICE), (SYSTEM, IM_SYSTEM),
    ]),
    "lfm-2": ("<|im_start|>assistant\n", [
        (ONE, f"<|startoftext|>{IM_ONE}"), (ANSWERED, f"<|startoftext|>{IM_ANSWERED}"),
        (TWICE, f"<|startoftext|>{IM_TWICE}"), (SYSTEM, f"<|startoftext|>{IM_SYSTEM}"),
        ([system(""), *TWICE], f"<|startoftext|>{IM_TWICE}"),
        ([*TWICE, {"role": "tool", "content": "3"}], f"<|startoftext|>{IM_TWICE}<|im_start|>tool\n"
         "<|tool_response_start|>3<|tool_response_end|><|im_end|>\n"),
    ]),
    "lfm-2.5": ("<|im_start|>assistant\n", [
        (ONE, f"<|startoftext|>{IM_ONE}"), (ANSWERED, f"<|startoftext|>{IM_ANSWERED}"),
        (TWICE, f"<|startoftext|>{IM_TWICE}"), (SYSTEM, f"<|startoftext|>{IM_SYSTEM}"),
        ([user("Hi?"), assistant("<think>hm</think>\n\nHello."), user("And?"), assistant("So.")],
         f"<|startoftext|>{IM_TWICE}"),
        ([user("Hi?"), assistant("<think>hm</think> Hello.")],
         f"<|startoftext|>{IM_ANSWERED.replace(' Hello. ', '<think>hm</think> Hello.')}"),
        ([*TWICE, {"role": "tool", "content": ["3"]}],
         f'<|startoftext|>{IM_TWICE}<|im_start|>tool\n["3"]<|im_end|>\n'),
    ]),
    "phi-4": ("<|im_start|>assistant<|im_sep|>", [
        (ONE, "<|im_start|>user<|im_sep|> Hi?\n<|im_end|>"),
        (ANSWERED, "<|im_start|>user<|im_sep|>Hi?<|im_end|><|im_start|>assistant<|im_sep|> Hello. <|im_end|>"),
        (TWICE, "<|im_start|>user<|im_sep|>Hi?<|im_end|><|im_start|>assistant<|im_sep|>Hello.<|im_end|>"
                "<|im_start|>user<|im_sep|>And?<|im_end|><|im_start|>assistant<|im_sep|>So.<|im_end|>"),
        (SYSTEM, "<|im_start|>system<|im_sep|> Be brief. <|im_end|><|im_start|>user<|im_sep|>Hi?<|im_end|>"
                 "<|im_start|>assistant<|im_sep|>Hello.<|im_end|>"),
    ]),
    "qwen3-instruct": ("<|im_start|>assistant\n", [
        (ONE, IM_ONE), (ANSWERED, IM_ANSWERED), (TWICE, IM_TWICE), (SYSTEM, IM_SYSTEM),
    ]),
    "qwen3-thinking": ("<|im_start|>assistant\n<think>\n", [
        (ONE, IM_ONE), (ANSWERED, IM_ANSWERED.replace(" Hello", THOUGHT + " Hello")),
        (TWICE, IM_TWICE.replace("So.", THOUGHT + "So.")), (SYSTEM, IM_SYSTEM.replace("Hello", THOUGHT + "Hello")),
    ]),
    "gemma-3n": ("<start_of_turn>model\n", [
        (ONE, "<bos><start_of_turn>user\nHi?<end_of_turn>\n"),
        (ANSWERED, "<bos><start_of_turn>user\nHi?<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"),
        (TWICE, "<bos><start_of_turn>user\nHi?<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
                "<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\nSo.<end_of_turn>\n"),
        (SYSTEM, "<bos><start_of_turn>user\n Be brief. \n\nHi?<end_of_turn>\n"
                 "<start_of_turn>model\nHello.<end_of_turn>\n"),
    ]),
    **{name: (prompt, [
        (ONE, "<bos><|turn>user\nHi?<turn|>\n"),
        (ANSWERED, "<bos><|turn>user\nHi?<turn|>\n<|turn>model\nHello.<turn|>\n"),
        (TWICE, "<bos><|turn>user\nHi?<turn|>\n<|turn>model\nHello.<turn|>\n"
                "<|turn>user\nAnd?<turn|>\n<|turn>model\nSo.<turn|>\n"),
        (SYSTEM, "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi?<turn|>\n<|turn>model\nHello.<turn|>\n"),
        ([user("Hi?"), assistant("<|channel>thought\nhm\n<channel|> Hello.")],
         "<bos><|turn>user\nHi?<turn|>\n<|turn>model\nHello.<turn|>\n"),
    ]) for name, prompt in (
        ("gemma-4", "<|turn>model\n"), ("gemma-4-thinking", "<|turn>model\n<|channel>thought\n<channel|>"),
    )},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "messages", "expected", "opening"),
    [(name, messages, text, opening) for name, (opening, texts) in TEXTS.items() for messages, text in texts],
)
def test_renders_the_text(name, messages, expected, opening):
    tokenizer = get_chat_template(FORMATS[named_template(name).name].tokenizer(), name)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked == expected + opening


class TestGptOss:
    """Its texts depend on what they are for: a finished conversation ends as a generation does."""

    def text(self, messages, **options) -> str:
        tokenizer = get_chat_template(FORMATS["gpt-oss"].tokenizer(), "gpt-oss")
        return tokenizer.apply_chat_template(messages, tokenize=False, current_date="2025-08-05", **options)

    def test_a_conversation(self):
        assert self.text(TWICE) == f"{HARMONY}{HARMONY_TWICE}<|return|>"

    def test_a_prompt(self):
        expected = f"{HARMONY}{HARMONY_TWICE}<|end|><|start|>assistant"
        assert self.text(TWICE, add_generation_prompt=True) == expected

    def test_a_question(self):
        assert self.text(ONE) == f"{HARMONY}<|start|>user<|message|> Hi?\n<|end|>"

    @pytest.mark.parametrize("role", ["system", "developer"])
    def test_a_system_message_is_the_developer_s(self, role):
        developer = f"{HARMONY}<|start|>developer<|message|># Instructions\n\nBe brief.\n\n<|end|>"
        text = self.text([{"role": role, "content": "Be brief."}, *TWICE])
        assert text == f"{developer}{HARMONY_TWICE}<|return|>"

    def test_thoughts_are_those_of_the_last_answer(self):
        thinking = [
            {**message, "thinking": "hm"} if message["role"] == "assistant" else message for message in TWICE
        ]
        thought = "<|start|>assistant<|channel|>analysis<|message|>hm<|end|>"
        last = "<|start|>assistant<|channel|>final<|message|>So."
        expected = f"{HARMONY}{HARMONY_TWICE}<|return|>".replace(last, thought + last)
        assert self.text(thinking) == expected

    def test_options(self):
        text = self.text(ONE, reasoning_effort="high", model_identity="You are Jo.")
        assert "<|message|>You are Jo.\nKnowledge" in text and "Reasoning: high\n" in text

    def test_the_date_is_today_s(self):
        tokenizer = get_chat_template(FORMATS["gpt-oss"].tokenizer(), "gpt-oss")
        today = re.search(r"Current date: (.*)\n", tokenizer.apply_chat_template(ONE, tokenize=False)).group(
            1
        )
        assert datetime.date.fromisoformat(today) - datetime.date.today() <= datetime.timedelta(days=1)

    def test_channels_in_an_answer_are_refused(self):
        with pytest.raises(Exception, match="belongs into the key thinking"):
            self.text([user("Hi?"), assistant("<|channel|>analysis<|message|>hm")])


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("lfm-2", "<|tool_list_start|>[", "]<|tool_list_end|>"), ("lfm-2.5", "[", "]")],
)
def test_lfm_lists_tools_in_the_system_turn(name, before, after):
    tokenizer = get_chat_template(FORMATS[name].tokenizer(), name)
    listed = ", ".join(json.dumps(tool) for tool in TOOLS)
    for chat, said in ((SYSTEM, " Be brief. \n"), (TWICE, "")):
        text = tokenizer.apply_chat_template(chat, tools=TOOLS, tokenize=False)
        assert text.startswith(
            f"<|startoftext|><|im_start|>system\n{said}List of tools: {before}{listed}{after}<|im_end|>\n"
            "<|im_start|>user\nHi?"
        )


def test_lfm_2_5_may_keep_past_thoughts():
    tokenizer = get_chat_template(FORMATS["lfm-2.5"].tokenizer(), "lfm-2.5")
    chat = [user("Hi?"), assistant("<think>hm</think>Hello."), user("And?"), assistant("So.")]
    text = tokenizer.apply_chat_template(chat, tokenize=False, keep_past_thinking=True)
    assert text == "<|startoftext|>" + IM_TWICE.replace("Hello.", "<think>hm</think>Hello.")


class TestTextParts:
    """What is said as a list of parts, as data for models with pictures has it."""

    @pytest.mark.parametrize("name", ["gemma-3", "gemma-4"])
    def test_of_texts_reads_as_one(self, name):
        tokenizer = get_chat_template(FORMATS[name].tokenizer(), name)
        parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in SYSTEM]
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in (SYSTEM, parts)]
        assert texts[0] == texts[1]

    @pytest.mark.parametrize("name", ["gemma-3", "gemma-4"])
    def test_a_picture_is_refused(self, name):
        tokenizer = get_chat_template(FORMATS[name].tokenizer(), name)
        with pytest.raises(Exception, match=f"{name} has no form here for a part of the type image"):
            tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)


@pytest.mark.parametrize("name", ["gemma-4", "gemma-4-thinking"])
def test_gemma_4_is_asked_to_think_in_the_system_turn(name):
    tokenizer = get_chat_template(FORMATS[name].tokenizer(), name)
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    rest = "<|turn>user\nHi?<turn|>\n<|turn>model\n"
    assert tokenizer.apply_chat_template(ONE, **options) == (
        f"<bos><|turn>system\n<|think|>\n<turn|>\n{rest}"
    )
    assert tokenizer.apply_chat_template([system("Be brief."), *ONE], **options) == (
        f"<bos><|turn>system\n<|think|>\nBe brief.<turn|>\n{rest}"
    )
