"""Chat templates render the published formats to the letter, by name, whatever the tokenizer's own template was."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxtune import assets
from jaxtune.data.formats import prepare
from jaxtune.data.templates import TEMPLATES, get_chat_template, masking_template, named_template, template_of
from jaxtune.errors import ChatTemplateError, OptionError
from tests.data.named_formats import ALTERNATING, FORMATS, WITHOUT_SYSTEM
from tests.data.tiny_tokenizer import CHATML, chatml_tokenizer, llama_tokenizer, tiny_tokenizer

TOKENIZERS = {name: form.tokenizer for name, form in FORMATS.items()}
WITH_SYSTEM = [name for name in FORMATS if name not in WITHOUT_SYSTEM]

SYSTEM = {"role": "system", "content": " Be brief. "}
USER = {"role": "user", "content": " Hi?\n"}
ASSISTANT = {"role": "assistant", "content": "Hello. "}

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}

LLAMA_31_HEAD = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
)

RENDERED = [
    (
        "chatml",
        [SYSTEM, USER, ASSISTANT],
        "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\n Hi?\n<|im_end|>\n"
        "<|im_start|>assistant\nHello. <|im_end|>\n",
    ),
    (
        "llama-3",
        [SYSTEM, USER, ASSISTANT],
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>",
    ),
    (
        "llama-3.1",
        [SYSTEM, USER, ASSISTANT],
        LLAMA_31_HEAD + "Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>",
    ),
    (
        "llama-3.1",
        [USER],
        LLAMA_31_HEAD + "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>",
    ),
]
WITH_TOOLS = ("lfm-2", "lfm-2.5", "llama-3.1", "qwen-2.5", "qwen-3", "qwen3-instruct", "qwen3-thinking")
PROMPTS = {
    "chatml": "<|im_start|>assistant\n",
    "llama-3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama-3.1": "<|start_header_id|>assistant<|end_header_id|>\n\n",
}


def render(tokenizer, messages, **options) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.fixture(params=TOKENIZERS)
def name(request) -> str:
    return request.param


@pytest.mark.parametrize(("name", "messages", "expected"), RENDERED)
def test_the_published_format(name, messages, expected):
    tokenizer = get_chat_template(TOKENIZERS[name](), name)
    assert render(tokenizer, messages) == expected
    assert render(tokenizer, messages, add_generation_prompt=True) == expected + PROMPTS[name]


def test_llama_31_takes_another_date():
    tokenizer = get_chat_template(llama_tokenizer(), "llama-3.1")
    assert "Today Date: 01 Jan 2030\n" in render(tokenizer, [USER], date_string="01 Jan 2030")


def test_llama_31_tools():
    tokenizer = get_chat_template(llama_tokenizer(), "llama-3.1")
    text = render(tokenizer, [USER, CALL, {"role": "tool", "content": "3"}], tools=[TOOL])
    assert "<|end_header_id|>\n\nEnvironment: ipython\nCutting Knowledge" in text
    assert "user<|end_header_id|>\n\nGiven the following functions, please respond with a JSON" in text
    assert '    "type": "function",\n' in text and text.count("Hi?<|eot_id|>") == 1
    assert text.endswith(
        'assistant<|end_header_id|>\n\n{"name": "add", "parameters": {"a": 1}}<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"3"<|eot_id|>'
    )


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in WITH_TOOLS])
def test_a_format_without_tools_does_not_drop_them_silently(name):
    tokenizer = get_chat_template(TOKENIZERS[name](), name)
    with pytest.raises(Exception, match="no form for tools"):
        render(tokenizer, [USER], tools=[TOOL])
    with pytest.raises(Exception, match="no form for tool calls"):
        render(tokenizer, [USER, CALL])


NAMES = (
    "unsloth, zephyr, chatml, mistral, llama, vicuna, vicuna_old, vicuna old, alpaca, gemma, gemma_chatml, gemma2, "
    "gemma2_chatml, llama-3, llama3, phi-3, phi-35, phi-3.5, llama-3.1, llama-31, llama-3.2, llama-3.3, llama-32, "
    "llama-33, qwen-2.5, qwen-25, qwen25, qwen2.5, qwen-2.5-coder, qwen-25-coder, qwen2.5-coder, qwen25-coder, phi-4, "
    "gemma-3, gemma3, qwen-3, qwen3, gemma-3n, gemma3n, gemma-4, gemma4, gemma-4-thinking, gemma4-thinking, gpt-oss, "
    "gptoss, qwen3-instruct, qwen3-thinking, lfm-2, lfm-2.5, starling, yi-chat"
)


@pytest.mark.parametrize(
    "name", [name for name in FORMATS if name not in ("chatml", "lfm-2", "lfm-2.5", "llama-3", "llama-3.1")]
)
def test_an_unknown_role_is_not_dropped_silently(name):
    tokenizer = get_chat_template(TOKENIZERS[name](), name)
    with pytest.raises(Exception, match=r"the role critic|user and assistant in turn"):
        render(tokenizer, [USER, {"role": "critic", "content": "No."}])


class TestNames:
    @pytest.mark.parametrize("alias", ["llama-31", "llama-3.2", "llama-3.3", "llama-32", "llama-33"])
    def test_aliases(self, alias):
        assert named_template(alias).name == "llama-3.1"
        assert named_template("llama3").name == "llama-3"

    def test_all_that_scripts_know(self):
        assert set(NAMES.split(", ")) == {n for t in TEMPLATES for n in (t.name, *t.aliases)}

    def test_an_unknown_name_brings_the_nearest(self):
        with pytest.raises(ChatTemplateError, match="no chat template named 'lama-3'") as error:
            get_chat_template(llama_tokenizer(), "lama-3")
        assert "chatml" in error.value.expected
        assert "Did you mean 'llama-3'" in error.value.fix

    def test_a_template_of_one_s_own(self):
        jinja = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        tokenizer = get_chat_template(tiny_tokenizer(), (jinja, "</s>"))
        assert render(tokenizer, [USER]) == "[user] Hi?\n</s>"
        assert tokenizer.chat_template == jinja
        assert template_of(tokenizer) is None

    def test_our_templates_are_known_again_after_saving(self, name, tmp_path):
        system_message = None if name in WITHOUT_SYSTEM else "Be brief."
        tokenizer = get_chat_template(TOKENIZERS[name](), name, system_message=system_message)
        tokenizer.save_pretrained(tmp_path)
        assert template_of(PreTrainedTokenizerFast.from_pretrained(tmp_path)).name == name

    def test_the_embedded_model_s_own_is_chatml(self):
        assert template_of(AutoTokenizer.from_pretrained(assets.TINY)).name == "chatml"


class TestStopToken:
    def test_becomes_the_eos_token(self):
        tokenizer = llama_tokenizer()
        size = len(tokenizer)
        assert get_chat_template(tokenizer, "llama-3") is tokenizer
        assert tokenizer.eos_token == "<|eot_id|>"
        assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|eot_id|>")
        assert len(tokenizer) == size

    def test_stays_where_it_is_not_to_be_mapped(self):
        assert (
            get_chat_template(llama_tokenizer(), "llama-3", map_eos_token=False).eos_token
            == "<|end_of_text|>"
        )

    def test_the_tokenizer_s_own(self):
        assert get_chat_template(tiny_tokenizer(), ("x", "eos_token")).eos_token == "</s>"

    def test_is_the_tokenizer_s_own_in_formats_that_have_none(self):
        tokenizer = get_chat_template(FORMATS["zephyr"].tokenizer(), "zephyr")
        assert tokenizer.eos_token == "</s>"
        assert render(tokenizer, [USER, ASSISTANT]).endswith("<|assistant|>\nHello. </s>\n")

    def test_a_tokenizer_without_one_is_refused_by_these(self):
        with pytest.raises(ChatTemplateError, match="'zephyr' ends turns with the tokenizer's eos token"):
            get_chat_template(tiny_tokenizer(("</s>",), eos=None), "zephyr")

    def test_is_never_added_to_the_vocabulary(self):
        tokenizer = llama_tokenizer()
        size = len(tokenizer)
        with pytest.raises(ChatTemplateError, match=r"'<\|im_end\|>' is not in the tokenizer's vocabulary"):
            get_chat_template(tokenizer, "chatml")
        assert len(tokenizer) == size
        assert tokenizer.chat_template is None and tokenizer.eos_token == "<|end_of_text|>"


class TestBos:
    """A tokenizer that starts every text with bos gets a template that does, and no other tokenizer does."""

    def test_chatml_begins_with_the_bos_that_the_tokenizer_adds(self):
        tokenizer = get_chat_template(tiny_tokenizer(("<s>", *CHATML), bos="<s>", adds_bos=True), "chatml")
        assert render(tokenizer, [USER]) == "<s><|im_start|>user\n Hi?\n<|im_end|>\n"

    def test_is_there_exactly_once(self, name):
        form = FORMATS[name]._replace(bos="<s>", adds_bos=True)
        tokenizer = get_chat_template(form.tokenizer(), name)
        rows = [{"messages": [USER, ASSISTANT]}]
        (sample,) = prepare(rows, tokenizer, max_length=None)
        assert sample.input_ids.tolist().count(tokenizer.bos_token_id) == 1
        assert sample.input_ids[0] == tokenizer.bos_token_id

    def test_a_bos_token_that_is_only_a_name_is_not_written(self):
        tokenizer = get_chat_template(tiny_tokenizer(CHATML, bos="<|im_start|>"), "chatml")
        assert render(tokenizer, [USER]).startswith("<|im_start|>user")


class TestSystemMessage:
    MESSAGE = 'Say "it\'s" {{ 1 }} {% if %}\\ naïvely 🙂\n\ttwice'

    @pytest.mark.parametrize("name", WITH_SYSTEM)
    def test_opens_conversations_without_one(self, name):
        tokenizer = get_chat_template(TOKENIZERS[name](), name, system_message=self.MESSAGE)
        assert render(tokenizer, [USER]) == render(
            tokenizer, [{"role": "system", "content": self.MESSAGE}, USER]
        )
        assert self.MESSAGE in render(tokenizer, [USER])

    @pytest.mark.parametrize("name", WITH_SYSTEM)
    def test_gives_way_to_the_conversation_s_own(self, name):
        plain = get_chat_template(TOKENIZERS[name](), name)
        with_default = get_chat_template(TOKENIZERS[name](), name, system_message=self.MESSAGE)
        assert render(with_default, [SYSTEM, USER]) == render(plain, [SYSTEM, USER])

    @pytest.mark.parametrize("name", WITHOUT_SYSTEM)
    def test_is_refused_by_formats_that_have_none(self, name):
        with pytest.raises(ChatTemplateError, match=f"'{name}' has no place for a system message"):
            get_chat_template(TOKENIZERS[name](), name, system_message=self.MESSAGE)
        tokenizer = get_chat_template(TOKENIZERS[name](), name)
        with pytest.raises(Exception, match=f"{name} has no system role: begin the first user message"):
            render(tokenizer, [SYSTEM, USER])


class TestAlternation:
    @pytest.mark.parametrize("name", ALTERNATING)
    @pytest.mark.parametrize("messages", [[USER, USER], [ASSISTANT], [USER, ASSISTANT, ASSISTANT]])
    def test_is_asked_for_by_formats_that_rely_on_it(self, name, messages):
        tokenizer = get_chat_template(TOKENIZERS[name](), name)
        with pytest.raises(Exception, match=f"{name} wants user and assistant in turn"):
            render(tokenizer, messages)


SHAREGPT = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}


class TestMapping:
    @pytest.mark.parametrize("name", WITH_SYSTEM)
    def test_the_dataset_s_own_names(self, name):
        plain = get_chat_template(TOKENIZERS[name](), name)
        mapped = get_chat_template(TOKENIZERS[name](), name, mapping=SHAREGPT, system_message="Be brief.")
        chat = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]
        standard = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
        system = {"role": "system", "content": "Be brief."}
        assert render(mapped, chat) == render(mapped, standard) == render(plain, [system, *standard])
        own_system = [{"from": "system", "value": "S"}, *chat]
        assert render(mapped, own_system) == render(plain, [{"role": "system", "content": "S"}, *standard])

    def test_an_unknown_name_is_an_error(self):
        with pytest.raises(OptionError, match="speaker"):
            get_chat_template(chatml_tokenizer(), mapping={"speaker": "from"})


class TestGenerationMarkers:
    """They are put in for masks only: engines that know no such tag could not read the saved template."""

    def test_the_tokenizer_s_template_has_none(self, name):
        tokenizer = get_chat_template(TOKENIZERS[name](), name)
        assert "generation %}" not in tokenizer.chat_template

    def test_the_masking_template_renders_the_same(self, name):
        has_system = name not in WITHOUT_SYSTEM
        tokenizer = get_chat_template(
            TOKENIZERS[name](), name, system_message="Be brief." if has_system else None
        )
        marked = masking_template(tokenizer)
        assert "{% generation %}" in marked
        system = [SYSTEM] if has_system else []
        for chat in ([USER], [USER, ASSISTANT], [*system, USER, ASSISTANT, USER, ASSISTANT]):
            assert render(tokenizer, chat, chat_template=marked) == render(tokenizer, chat)

    def test_a_template_that_marks_nothing_has_no_masking_template(self):
        assert masking_template(tiny_tokenizer(chat_template="{{ messages[0].content }}")) is None
        marked = "{% generation %}{{ messages[0].content }}{% endgeneration %}"
        assert masking_template(tiny_tokenizer(chat_template=marked)) == marked

    def test_every_template_has_them_and_the_parts_that_it_renders(self):
        for template in TEMPLATES:
            tokenizer = get_chat_template(TOKENIZERS[template.name](), template.name)
            text = render(tokenizer, [USER, ASSISTANT])
            assert "{% generation %}" in template.marked_jinja
            instruction, response = template.parts_of(tokenizer)
            assert instruction in text and response in text
            assert template.stop_token_of(tokenizer) == tokenizer.eos_token
            assert text.removesuffix(FORMATS[template.name].at_the_end).endswith(tokenizer.eos_token)
