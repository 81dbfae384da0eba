"""`apply_chat_template`: two turns written down make a chat template for any number of turns, of which the example
itself is one rendering."""

import datasets
import pytest

from jaxtune.chat_templates import apply_chat_template, construct_chat_template, train_on_responses_only
from jaxtune.data.apply_template import LLAMA_3_EXAMPLE
from jaxtune.data.example_template import example_of
from jaxtune.data.formats import prepare
from jaxtune.data.parts import find_parts
from jaxtune.errors import ChatTemplateError, DatasetError, OptionError
from tests.data.tiny_tokenizer import chatml_tokenizer, llama_tokenizer, tiny_tokenizer, trained_text
from tests.export.go_template import render

PLAIN = "{SYSTEM}\nUSER: {INPUT}\nASSISTANT: {OUTPUT}\nUSER: {INPUT}\nASSISTANT: {OUTPUT}"
ALPACA = (
    "Below are instructions.\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}\n\n"
    "### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}"
)
CHATML = (
    "<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{INPUT}<|im_end|>\n<|im_start|>assistant\n"
    "{OUTPUT}<|im_end|>\n<|im_start|>user\n{INPUT}<|im_end|>\n<|im_start|>assistant\n{OUTPUT}<|im_end|>"
)
BARE = "{INPUT}|{OUTPUT}</s>{INPUT}|{OUTPUT}</s>"
ODD = "\"'\\ {{ {% {# #} é🙂 \t{SYSTEM}</s> {INPUT}\\n \n{OUTPUT}</s>\n #} {INPUT}\\n \n{OUTPUT}</s>\n"
EXAMPLES = {
    "llama": (LLAMA_3_EXAMPLE, llama_tokenizer, ["<|eot_id|>"]),
    "chatml": (CHATML, chatml_tokenizer, []),
    "plain": (PLAIN, tiny_tokenizer, []),
    "alpaca": (ALPACA, tiny_tokenizer, []),
    "bare": (BARE, tiny_tokenizer, []),
    "odd characters": (ODD, tiny_tokenizer, []),
}


@pytest.fixture(params=EXAMPLES)
def case(request):
    """An example, a new tokenizer, and the tokens that may end its answers beside the tokenizer's own."""
    example, make_tokenizer, extra = EXAMPLES[request.param]
    return example, make_tokenizer(), extra


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def chat(turns, system_message=None):
    texts = [make(f"{make.__name__} {n}") for n in range(turns) for make in (user, assistant)]
    return texts if system_message is None else [system(system_message), *texts]


def text(messages, tokenizer, example, **options):
    (row,) = apply_chat_template([{"conversations": messages}], tokenizer, example, **options)
    return row["text"]


def test_the_template_renders_the_example_with_eos_after_its_answers(case):
    example, tokenizer, extra = case
    fields = [user("{INPUT}"), assistant("{OUTPUT}")] * 2
    fields = [system("{SYSTEM}"), *fields] if "{SYSTEM}" in example else fields
    ended = example if any(t in example for t in (tokenizer.eos_token, *extra)) else None
    eos = tokenizer.eos_token
    expected = ended or example.replace("{OUTPUT}", "{OUTPUT}" + eos)
    assert text(fields, tokenizer, example, extra_eos_tokens=extra) == expected
    assert tokenizer.apply_chat_template(fields, tokenize=False) == expected


@pytest.mark.parametrize("turns", [1, 2, 3, 5])
def test_any_number_of_turns_is_the_pattern_of_the_example(case, turns):
    example, tokenizer, extra = case
    messages = chat(turns, "Be brief." if "{SYSTEM}" in example else None)
    whole = text(messages, tokenizer, example, extra_eos_tokens=extra)
    pieces = [whole.index(message["content"]) for message in messages]
    assert pieces == sorted(pieces)
    first = messages[: len(messages) - 2 * (turns - 1)]
    # The end of the example, from the first answer on, is what every further turn adds.
    part = construct_chat_template(tokenizer, example, extra_eos_tokens=extra)
    further = "".join(
        part.question_start
        + f"user {n}"
        + part.question_end
        + part.answer_start
        + f"assistant {n}"
        + part.answer_end
        for n in range(1, turns)
    )
    assert whole == text(first, tokenizer, example, extra_eos_tokens=extra) + further


def test_the_prompt_and_the_answer_are_the_conversation(case):
    example, tokenizer, extra = case
    text(chat(1), tokenizer, example, extra_eos_tokens=extra)
    for messages in (chat(1), chat(3)):
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert whole.startswith(prompt + messages[-1]["content"])
        assert tokenizer.eos_token in whole[len(prompt) :]


def test_it_survives_saving(case, tmp_path):
    example, tokenizer, extra = case
    text(chat(1), tokenizer, example, extra_eos_tokens=extra)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert example_of(again) == construct_chat_template(tokenizer, example, extra_eos_tokens=extra)
    assert again.apply_chat_template(chat(2), tokenize=False) == tokenizer.apply_chat_template(
        chat(2), tokenize=False
    )


class TestSystemMessage:
    def test_a_conversation_s_own_or_the_default(self):
        tokenizer = tiny_tokenizer()
        assert text(chat(1, "Be."), tokenizer, PLAIN).startswith("Be.\nUSER: user 0")
        assert text(chat(1), tokenizer, PLAIN).startswith("You are a helpful assistant.\nUSER: ")
        assert text(chat(1), tokenizer, PLAIN, default_system_message='"x" {a}').startswith('"x" {a}\nUSER: ')

    def test_where_the_example_has_none(self):
        with pytest.raises(ChatTemplateError, match=r"row 0 .*the example has no \{SYSTEM\}"):
            text(chat(1, "Be."), tiny_tokenizer(), ALPACA)


class TestSpecialTokens:
    def test_bos_is_written_once_and_by_name(self):
        tokenizer = llama_tokenizer()
        for example in (LLAMA_3_EXAMPLE, PLAIN):
            written = text(chat(2), tokenizer, example)
            assert written.startswith("<|begin_of_text|>") and written.count("<|begin_of_text|>") == 1
            (sample,) = prepare([{"text": written}], tokenizer, max_length=None)
            assert sample.input_ids.tolist().count(tokenizer.bos_token_id) == 1

    def test_a_bos_that_nothing_adds_is_a_text_like_others(self):
        tokenizer = chatml_tokenizer(bos="<|im_start|>")
        template = construct_chat_template(tokenizer, CHATML)
        assert text(chat(1, "Be."), tokenizer, CHATML).startswith("<|im_start|>system\nBe.<|im_end|>")
        assert render(template.go, chat(1, "Be.")[:2]).startswith("<|im_start|>system\nBe.<|im_end|>")

    def test_eos_is_put_after_answers_that_do_not_end_with_one(self, caplog):
        caplog.set_level("INFO", "jaxtune")
        written = text(chat(2), tiny_tokenizer(), ALPACA)
        assert written.count("</s>") == 2 and written.endswith("assistant 1</s>")
        assert "</s> is put after every answer" in caplog.text

    def test_an_extra_eos_token_of_the_example_becomes_the_tokenizer_s(self):
        tokenizer = llama_tokenizer()
        written = text(chat(1), tokenizer, LLAMA_3_EXAMPLE, extra_eos_tokens=["<|eot_id|>", "<|x|>"])
        assert "<|end_of_text|>" not in written
        assert tokenizer.eos_token == "<|eot_id|>"

    def test_what_looks_like_a_token_and_is_none_is_said(self, caplog):
        text(chat(1), tiny_tokenizer(), LLAMA_3_EXAMPLE)
        assert "<|eot_id|> of the chat template's example: no tokens of this tokenizer" in caplog.text


ROWS = [{"conversations": chat(2), "id": n} for n in range(3)]


class TestDatasets:
    def test_a_column_is_added(self):
        tokenizer = tiny_tokenizer()
        rows = apply_chat_template(ROWS, tokenizer, PLAIN)
        assert [set(row) for row in rows] == [{"conversations", "id", "text"}] * 3
        assert rows[2]["text"] == tokenizer.apply_chat_template(chat(2), tokenize=False)

    def test_a_dataset_stays_one(self):
        made = apply_chat_template(datasets.Dataset.from_list(ROWS), tiny_tokenizer(), PLAIN)
        assert isinstance(made, datasets.Dataset)
        assert list(made) == apply_chat_template(ROWS, tiny_tokenizer(), PLAIN)

    def test_messages_do_as_well(self):
        (row,) = apply_chat_template([{"messages": chat(1)}], tiny_tokenizer(), PLAIN)
        assert "ASSISTANT: assistant 0</s>" in row["text"]

    def test_without_conversations(self):
        with pytest.raises(DatasetError, match="columns") as error:
            apply_chat_template([{"instruction": "a"}], tiny_tokenizer(), PLAIN)
        assert "to_sharegpt" in error.value.fix

    @pytest.mark.parametrize(
        "messages",
        [
            [assistant("a")],
            [user("a"), user("b")],
            [user("a"), {"role": "tool", "content": "4"}],
            [{"from": "human", "value": "a"}],
            [user("a"), {"role": "assistant", "content": None, "tool_calls": [{}]}],
        ],
    )
    def test_what_the_example_has_no_form_for_names_its_row(self, messages):
        tokenizer = tiny_tokenizer()
        with pytest.raises(ChatTemplateError, match="row 3 of the dataset"):
            apply_chat_template([*ROWS, {"conversations": messages}], tokenizer, PLAIN)
        assert tokenizer.chat_template is None  # as it was


class TestTraining:
    class Trainer:
        eval_samples = None

        def __init__(self, samples, tokenizer):
            self.samples, self.processing_class, self.masks = samples, tokenizer, []

    @pytest.mark.parametrize("name", ["llama", "chatml", "plain", "alpaca"])
    def test_responses_only(self, name):
        example, make_tokenizer, extra = EXAMPLES[name]
        tokenizer = make_tokenizer()
        rows = apply_chat_template([{"conversations": chat(2)}], tokenizer, example, extra_eos_tokens=extra)
        trainer = self.Trainer(prepare(rows, tokenizer, max_length=None), tokenizer)
        (sample,) = train_on_responses_only(trainer).samples
        eos = tokenizer.eos_token
        assert trained_text(tokenizer, sample) == f"assistant 0{eos}…assistant 1{eos}"

    def test_parts(self):
        tokenizer = chatml_tokenizer()
        text(chat(1), tokenizer, CHATML)
        assert find_parts(tokenizer) == ("\n<|im_start|>user\n", "\n<|im_start|>assistant\n")

    def test_masks_are_exact(self, case):
        example, tokenizer, extra = case
        text(chat(1), tokenizer, example, extra_eos_tokens=extra)
        (sample,) = prepare([{"messages": chat(2)}], tokenizer, max_length=None, assistant_only_loss=True)
        end = example_of(tokenizer).answer_end
        parts = [f"assistant {n}{end}" for n in range(2)]
        assert trained_text(tokenizer, sample) == "…".join(parts)


def test_ollama_s_template_prints_the_same(case):
    example, tokenizer, extra = case
    template = construct_chat_template(tokenizer, example, extra_eos_tokens=extra)
    if "{{" in example:
        assert template.go is None
        return
    for messages in (chat(1)[:1], chat(2)[:3], chat(3)[:5]):
        messages = [system("Be."), *messages] if "{SYSTEM}" in example else messages
        expected = tokenizer.apply_chat_template(
            messages, chat_template=template.jinja, tokenize=False, add_generation_prompt=True
        )
        assert render(template.go, messages) == expected.removeprefix(tokenizer.bos_token or "")


class TestErrors:
    @pytest.mark.parametrize(
        ("example", "found"),
        [
            ("{INPUT} {OUTPUT}", r"has \{INPUT\}, \{OUTPUT\}"),
            ("hello", "no fields"),
            ("{INPUT}{SYSTEM}:{OUTPUT}{INPUT}:{OUTPUT}", r"has \{INPUT\}, \{SYSTEM\}"),
            ("{INPUT}a{OUTPUT}{INPUT}b{OUTPUT}", "'a' and then 'b'"),
            ("{INPUT}{OUTPUT}{INPUT}{OUTPUT}", "'' and then ''"),
            ("{INPUT}:{OUTPUT}</s>{INPUT}:{OUTPUT}", "after the second, ''"),
            ("{INPUT}:{OUTPUT}</s>{INPUT}:{OUTPUT}</s>\n", r"after the second, '</s>\\n'"),
            (("jinja", "stop"), "is a tuple"),
        ],
    )
    def test_an_example_that_cannot_be_read(self, example, found):
        tokenizer = tiny_tokenizer()
        with pytest.raises(ChatTemplateError, match=found):
            construct_chat_template(tokenizer, example)

    def test_no_tokenizer(self):
        with pytest.raises(OptionError, match="the tokenizer is None"):
            apply_chat_template([{"messages": chat(1)}])
        with pytest.raises(OptionError, match="no eos token"):
            construct_chat_template(tiny_tokenizer(eos=None))

    def test_no_default_system_message(self):
        with pytest.raises(OptionError, match="default_system_message is None"):
            construct_chat_template(tiny_tokenizer(), PLAIN, None)

    def test_extra_eos_tokens_as_one_string(self):
        with pytest.raises(OptionError, match="is the string '<x>'"):
            construct_chat_template(tiny_tokenizer(), extra_eos_tokens="<x>")
