"""Only the assistant's answers are trained on, wherever their markers stand and however these tokenise there."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxtune.data.formats import prepare
from jaxtune.data.markers import Marker, find_marker, mask_to_responses
from jaxtune.data.masking import train_on_responses_only
from jaxtune.data.parts import find_parts
from jaxtune.data.sample import Sample
from jaxtune.data.templates import get_chat_template
from jaxtune.errors import ChatTemplateError, DatasetError
from tests.data.named_formats import FORMATS
from tests.data.tiny_tokenizer import CHATML, chatml_tokenizer, llama_tokenizer, tiny_tokenizer, trained_text

INSTRUCTION, RESPONSE = Marker(core=(1,)), Marker(core=(2,))
CHAT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "and 3+3?"},
    {"role": "assistant", "content": "\nsix"},
]


def labels_of(ids: list[int], instruction: Marker = INSTRUCTION, response: Marker = RESPONSE) -> list[int]:
    ids = np.asarray(ids, dtype=np.int32)
    (sample,) = mask_to_responses([Sample(ids, ids)], instruction, response)
    assert sample.input_ids is ids and sample.labels.dtype == np.int32
    return [0 if label == -100 else int(label) for label in sample.labels]


class TestMask:
    """With 1 for an instruction marker and 2 for a response marker; 0 is what is not trained on."""

    @pytest.mark.parametrize(
        ("ids", "expected"),
        [
            ([5, 1, 5, 2, 7, 8], [0, 0, 0, 0, 7, 8]),  # to the end, the token that ends the turn included
            ([1, 5, 2, 7, 1, 5, 2, 8], [0, 0, 0, 7, 0, 0, 0, 8]),
            ([5, 1, 5], [0, 0, 0]),  # no answer
            ([5, 5], [0, 0]),
            ([2, 7], [0, 7]),  # no question
            ([2, 7, 2, 8], [0, 7, 0, 8]),  # two answers in a row: their markers are no answers
            ([2, 1, 2], [0, 0, 0]),  # empty answers
        ],
    )
    def test_answers(self, ids, expected):
        assert labels_of(ids) == expected

    def test_what_was_not_trained_on_stays_so(self):
        sample = Sample(np.array([2, 7, 8], np.int32), np.array([2, -100, 8], np.int32))
        (masked,) = mask_to_responses([sample], INSTRUCTION, RESPONSE)
        assert masked.labels.tolist() == [-100, -100, 8]
        assert sample.labels.tolist() == [2, -100, 8]

    def test_a_marker_takes_its_edges_along_where_they_are(self):
        response = Marker(core=(2, 3), after=((4, 5), (4,), (6,)))
        assert labels_of([2, 3, 4, 5, 7], response=response) == [0, 0, 0, 0, 7]
        assert labels_of([2, 3, 4, 7], response=response) == [0, 0, 0, 7]
        assert labels_of([2, 3, 6, 7], response=response) == [0, 0, 0, 7]
        assert labels_of([2, 3, 7, 4], response=response) == [0, 0, 7, 4]
        assert labels_of([2, 3, 4], response=response) == [0, 0, 0]

    def test_the_edge_before_an_instruction_is_not_part_of_the_answer(self):
        assert labels_of([2, 7, 9, 1, 5], instruction=Marker(core=(1,), before=((9,),))) == [0, 7, 0, 0, 0]


class TestMarkers:
    def test_a_part_of_whole_tokens(self):
        tokenizer = chatml_tokenizer(merges=())
        marker = find_marker(tokenizer, "<|im_start|>user\n")
        assert marker.core == tuple(tokenizer("<|im_start|>user\n")["input_ids"])

    def test_edges_that_merge_with_other_text(self):
        tokenizer = tiny_tokenizer()  # two newlines are one token
        marker = find_marker(tokenizer, "\n### Answer\n")
        assert tokenizer.decode(marker.core) == "### Answer"
        newline = tuple(tokenizer("\n")["input_ids"])
        assert set(marker.before) == set(marker.after) == {(), newline}

    @pytest.mark.parametrize("gap", ["\n", "\n\n"])
    @pytest.mark.parametrize("answer", ["yes", "\nyes"])
    def test_are_found_whatever_is_next_to_them(self, gap, answer):
        tokenizer = tiny_tokenizer()
        text = f"Ask{gap}\n### Answer\n{answer}</s>"
        instruction, response = find_marker(tokenizer, "### Ask\n"), find_marker(tokenizer, "\n### Answer\n")
        ids = np.asarray(tokenizer(text)["input_ids"], dtype=np.int32)
        (sample,) = mask_to_responses([Sample(ids, ids)], instruction, response)
        assert trained_text(tokenizer, sample).lstrip("\n") == "yes</s>"

    def test_a_part_that_never_tokenises_the_same(self):
        tokenizer = tiny_tokenizer(merges=(("\n", "\n"), ("\n\n", "\n"), (" ", "\n")))
        with pytest.raises(ChatTemplateError, match="depend on the text around it"):
            find_marker(tokenizer, "\n")


OWN_TEMPLATES = {
    # name: (jinja, instruction part, response part)
    "chatml without our name": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>user\n",
        "<|im_start|>assistant\n",
    ),
    "an empty thought before the last answer": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
        "<|im_start|>user\n",
        "<|im_start|>assistant\n",
    ),
    "without a generation prompt": (
        "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}",
        "[INST] ",
        " [/INST] ",
    ),
    "something after the last turn": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '</s>' }}{% endif %}",
        "<|user|>\n",
        "<|assistant|>\n",
    ),
    "more in the turn than in the prompt": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}{{ '<final>' }}{% endif %}"
        "{{ ':' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}",
        "<|im_start|>user:",
        "<|im_start|>assistant<final>:",
    ),
}


# In these the model begins its answer with a space, which would be derived as part of what opens it.
A_SPACE_FIRST = ("llama", "vicuna", "vicuna_old", "starling")
# Of gpt-oss nothing could be derived: its last answer ends otherwise than the others.
DERIVABLE = [name for name in FORMATS if name != "gpt-oss"]


class TestParts:
    @pytest.mark.parametrize("name", DERIVABLE)
    def test_of_our_templates_are_those_that_would_be_derived(self, name):
        own = get_chat_template(FORMATS[name].tokenizer(), name)
        instruction, response = find_parts(own)
        own.chat_template += "{# no template of ours #}"
        assert find_parts(own) == (instruction, response + (" " if name in A_SPACE_FIRST else ""))

    @pytest.mark.parametrize(("jinja", "instruction", "response"), OWN_TEMPLATES.values(), ids=OWN_TEMPLATES)
    def test_derived_from_the_tokenizer_s_own_template(self, jinja, instruction, response):
        tokenizer = tiny_tokenizer(("<s>", "</s>", *CHATML), chat_template=jinja)
        assert find_parts(tokenizer) == (instruction, response)

    @pytest.mark.parametrize(
        "jinja",
        [
            "{% for m in messages %}{{ m.content }}{% endfor %}",  # nothing opens a turn
            "{% for m in messages %}{{ '<|im_start|>' + m.content }}{% endfor %}",  # the same opens both
            "{{ messages[-1].content }}",  # most of the conversation is left out
        ],
    )
    def test_a_template_that_does_not_show_them(self, jinja):
        with pytest.raises(ChatTemplateError, match="cannot be read off") as error:
            find_parts(tiny_tokenizer(("</s>", *CHATML), chat_template=jinja))
        assert "instruction_part=" in error.value.fix

    def test_no_template(self):
        with pytest.raises(ChatTemplateError, match="no chat template"):
            find_parts(tiny_tokenizer())


def trainer_on(rows, tokenizer, eval_rows=None) -> SimpleNamespace:
    samples, eval_samples = (rows and prepare(rows, tokenizer, max_length=None) for rows in (rows, eval_rows))
    return SimpleNamespace(samples=samples, eval_samples=eval_samples, masks=[], processing_class=tokenizer)


class TestTrainer:
    @pytest.mark.parametrize(
        ("name", "tokenizer", "expected"),
        [
            ("chatml", chatml_tokenizer, "4<|im_end|>\n…\n\nsix<|im_end|>\n"),
            ("llama-3", llama_tokenizer, "4<|eot_id|>…six<|eot_id|>"),
            ("llama-3.1", llama_tokenizer, "4<|eot_id|>…six<|eot_id|>"),
        ],
    )
    def test_conversations(self, name, tokenizer, expected):
        tokenizer = get_chat_template(tokenizer(), name)
        trainer = trainer_on([{"messages": CHAT}], tokenizer)
        assert train_on_responses_only(trainer) is trainer
        assert trained_text(tokenizer, trainer.samples[0]) == expected

    @pytest.mark.parametrize("name", FORMATS)
    def test_conversations_of_every_named_template(self, name):
        form = FORMATS[name]
        tokenizer = get_chat_template(form.tokenizer(merges=()), name)
        trainer = train_on_responses_only(trainer_on([{"messages": CHAT}], tokenizer))
        assert trained_text(tokenizer, trainer.samples[0]) == (
            f"{form.written('4')}{form.after}…{form.written_last('\nsix')}{form.at_the_end}"
        )

    @pytest.mark.parametrize("name", FORMATS)
    def test_conversations_without_a_search(self, name):
        """What the template marks: the same, without what follows an answer."""
        form = FORMATS[name]
        tokenizer = get_chat_template(form.tokenizer(merges=()), name)
        (sample,) = prepare([{"messages": CHAT}], tokenizer, max_length=None, assistant_only_loss=True)
        assert trained_text(tokenizer, sample) == f"{form.written('4')}…{form.written_last('\nsix')}"

    def test_rendered_text_with_parts_of_one_s_own(self):
        tokenizer = tiny_tokenizer()
        texts = ["### Ask:\nhow\n\n### Answer:\nso", "### Ask:\nwhy\n\n### Answer:\n\nbecause"]
        trainer = trainer_on([{"text": text} for text in texts], tokenizer)
        train_on_responses_only(trainer, instruction_part="### Ask:\n", response_part="### Answer:\n")
        # The line break of the marker and that of the answer are one token, which is then the answer's.
        assert [trained_text(tokenizer, sample) for sample in trainer.samples] == [
            "so</s>",
            "\n\nbecause</s>",
        ]

    def test_evaluation_samples_too(self):
        tokenizer = get_chat_template(chatml_tokenizer(), "chatml")
        trainer = trainer_on([{"messages": CHAT}], tokenizer, eval_rows=[{"messages": CHAT[:2]}])
        train_on_responses_only(trainer)
        assert trained_text(tokenizer, trainer.eval_samples[0]) == "4<|im_end|>\n"

    def test_samples_without_an_answer_are_dropped_and_said(self, caplog):
        tokenizer = get_chat_template(chatml_tokenizer(), "chatml")
        trainer = trainer_on([{"messages": CHAT}, {"messages": CHAT[:1]}], tokenizer)
        train_on_responses_only(trainer)
        assert len(trainer.samples) == 1
        assert caplog.messages == ["dropped 1 of 2 samples: no answer in them"]

    def test_no_answer_anywhere_is_an_error_and_changes_nothing(self):
        tokenizer = get_chat_template(chatml_tokenizer(), "chatml")
        trainer = trainer_on([{"messages": CHAT}], tokenizer, eval_rows=[{"text": "plain text"}])
        before = trainer.samples
        with pytest.raises(
            DatasetError, match="none of the trainer's eval_samples has anything to train on"
        ) as error:
            train_on_responses_only(trainer)
        assert "plain text" in error.value.expected
        assert trainer.samples is before
