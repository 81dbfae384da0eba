"""The assistant's tokens are exactly those of the template's generation blocks, whatever is in them and around them;
and a text gets what its tokenizer puts in front of texts."""

import pytest
from tokenizers import processors

from jaxtune.data.encoding import encode_marked, encode_texts, prefix_ids, visibly_marked
from jaxtune.data.templates import TEMPLATES, get_chat_template, masking_template
from tests.data.named_formats import FORMATS
from tests.data.tiny_tokenizer import CHATML, chatml_tokenizer, llama_tokenizer, tiny_tokenizer

ANSWERS = ["4", " 4", "\n4", "4 \n", "", "na\u00efve \U0001f642", "two\n\nparts", "<|im_end|>"]

THOUGHTFUL = {"role": "assistant", "content": "six", "reasoning_content": "hm", "thinking": "hm"}


def chat_with(answer: str) -> list[dict[str, str]]:
    turns = ["2+2?", answer, "and 3+3?", "six"]
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


def marked_text(tokenizer, template: str, messages) -> tuple[list[int], str]:
    """All token ids, and the text of those that are marked."""
    rendered = tokenizer.apply_chat_template(messages, chat_template=visibly_marked(template), tokenize=False)
    ((ids, marked),) = encode_marked(tokenizer, [rendered])
    return ids, tokenizer.decode([token for token, kept in zip(ids, marked.tolist(), strict=True) if kept])


class TestMarkedTokens:
    @pytest.mark.parametrize("answer", ANSWERS)
    @pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
    def test_are_the_answers_with_the_tokens_that_end_them(self, template, answer):
        form = FORMATS[template.name]
        tokenizer = get_chat_template(form.tokenizer(merges=()), template.name)
        ids, text = marked_text(tokenizer, masking_template(tokenizer), chat_with(answer))
        assert text == form.written(answer) + form.written_last("six")
        assert ids == tokenizer.apply_chat_template(chat_with(answer))["input_ids"]

    @pytest.mark.parametrize("name", ["qwen-2.5", "qwen-3", "qwen3-instruct", "qwen3-thinking"])
    def test_hold_calls_of_tools_and_no_results(self, name):
        tokenizer = get_chat_template(FORMATS[name].tokenizer(merges=()), name)
        calls = [{"function": {"name": "add", "arguments": {"a": a}}} for a in (1, 2)]
        chat = [
            {"role": "user", "content": "1? 2?"},
            {"role": "assistant", "content": "See:", "tool_calls": calls},
            {"role": "tool", "content": "3"},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "five"},
        ]
        _, text = marked_text(tokenizer, masking_template(tokenizer), chat)
        called = "".join(
            f'\n<tool_call>\n{{"name": "add", "arguments": {{"a": {a}}}}}\n</tool_call>' for a in (1, 2)
        )
        assert text == f"See:{called}<|im_end|>{FORMATS[name].written_last('five')}"

    def test_hold_the_thought_before_an_answer(self):
        qwen = get_chat_template(FORMATS["qwen-3"].tokenizer(merges=()), "qwen-3")
        _, text = marked_text(qwen, masking_template(qwen), [*chat_with("4")[:3], THOUGHTFUL])
        assert text == "4<|im_end|><think>\nhm\n</think>\n\nsix<|im_end|>"
        gpt = get_chat_template(FORMATS["gpt-oss"].tokenizer(merges=()), "gpt-oss")
        _, text = marked_text(gpt, masking_template(gpt), [*chat_with("4")[:3], THOUGHTFUL])
        assert text == (
            "<|channel|>final<|message|>4<|end|>"
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>six<|return|>"
        )

    @pytest.mark.parametrize(
        ("name", "tokenizer"), [("chatml", chatml_tokenizer), ("llama-3.1", llama_tokenizer)]
    )
    def test_are_those_of_transformers(self, name, tokenizer):
        tokenizer = get_chat_template(tokenizer(), name)
        template = masking_template(tokenizer)
        theirs = tokenizer.apply_chat_template(
            chat_with("4"), chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        rendered = tokenizer.apply_chat_template(
            chat_with("4"), chat_template=visibly_marked(template), tokenize=False
        )
        ((ids, marked),) = encode_marked(tokenizer, [rendered])
        assert (ids, marked.tolist()) == (
            theirs["input_ids"],
            [bool(kept) for kept in theirs["assistant_masks"]],
        )

    def test_offsets_that_leave_out_white_space_lose_nothing(self):
        tokenizer = get_chat_template(chatml_tokenizer(merges=((" ", "w"),)), "chatml")
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        _, text = marked_text(tokenizer, masking_template(tokenizer), chat_with(" well"))
        assert text == " well<|im_end|>six<|im_end|>"

    def test_a_token_across_the_border_is_marked(self):
        tokenizer = get_chat_template(chatml_tokenizer(), "chatml")  # two newlines are one token
        _, text = marked_text(tokenizer, masking_template(tokenizer), chat_with("\n4"))
        assert text == "\n\n4<|im_end|>six<|im_end|>"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}\n  {% generation %}\n  {{ m.content }}\n  {% endgeneration %}\n{% endfor %}",
        "{% for m in messages %}\n  {%- generation -%}\n  {{ m.content }}\n  {%- endgeneration -%}\n.{% endfor %}",
        "{%for m in messages%} {%generation%} {{ m.content }} {%endgeneration%} {%endfor%}",
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set x = m.content %}{{ x }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    ],
)
def test_marking_visibly_changes_nothing_else(template):
    tokenizer = chatml_tokenizer()
    ids, _ = marked_text(tokenizer, template, chat_with("4"))
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(
        chat_with("4"), chat_template=template, tokenize=False
    )


class TestPrefix:
    def test_is_what_the_tokenizer_adds_by_itself(self):
        llama = llama_tokenizer()
        assert prefix_ids(llama) == [llama.bos_token_id]
        assert prefix_ids(tiny_tokenizer()) == []
        assert prefix_ids(tiny_tokenizer(CHATML, bos="<|im_start|>")) == []  # named, and never added

    def test_what_it_adds_behind_is_no_prefix(self):
        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
        )
        assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
        assert prefix_ids(tokenizer) == []

    def test_is_there_once(self):
        llama = llama_tokenizer()
        plain, rendered = encode_texts(llama, ["a", "<|begin_of_text|>a"])
        assert plain == rendered == [llama.bos_token_id, *llama("a", add_special_tokens=False)["input_ids"]]
