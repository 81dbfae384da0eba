"""For each named template a tokenizer that it fits, and what the assistant writes in it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from tests.data.tiny_tokenizer import CHATML, LLAMA, tiny_tokenizer


class Format(NamedTuple):
    special_tokens: Sequence[str]
    written: Callable[[str], str]
    """From an answer that is not the last: all that the model has to write for it, with the token that ends it."""
    written_last: Callable[[str], str]
    """From the last one."""
    after: str = ""
    """What comes after an answer without being its own, and before what opens the next question."""
    at_the_end: str = ""
    """And after the last one."""
    bos: str | None = None
    eos: str = "</s>"
    adds_bos: bool = False

    def tokenizer(self, **options: Any) -> PreTrainedTokenizerFast:
        return tiny_tokenizer(
            tuple(dict.fromkeys((*self.special_tokens, *filter(None, (self.bos, self.eos))))),
            bos=self.bos,
            eos=self.eos,
            adds_bos=self.adds_bos,
            **options,
        )


def _format(special_tokens: Sequence[str], written, written_last=None, **others) -> Format:
    return Format(special_tokens, written, written_last or written, **others)


def _ended_by(token: str, *, before: str = "", trimmed: bool = False) -> Callable[[str], str]:
    return lambda answer: f"{before}{answer.strip() if trimmed else answer}{token}"


def _after_an_empty_thought(answer: str) -> str:
    return "<think>\n\n</think>\n\n" + answer.lstrip("\n") + "<|im_end|>"


_LINES = {"after": "\n", "at_the_end": "\n"}
_S = {"bos": "<s>", "eos": "</s>", "adds_bos": True}
_QWEN = {"eos": "<|im_end|>", **_LINES}
_LLAMA_3 = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "adds_bos": True}
_GEMMA = {"bos": "<bos>", "eos": "<eos>", "adds_bos": True, **_LINES}
_LFM = {"bos": "<|startoftext|>", "eos": "<|im_end|>", "adds_bos": True, **_LINES}
_IM_END = _ended_by("<|im_end|>")
_EOT = _ended_by("<|eot_id|>", trimmed=True)
_GEMMA_TURN, _GEMMA_4_TURN = ("<start_of_turn>", "<end_of_turn>"), ("<|turn>", "<turn|>")
_HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>")

FORMATS = {
    "chatml": _format(CHATML, _IM_END, eos="<|im_end|>", **_LINES),
    "lfm-2": _format(CHATML, _IM_END, **_LFM),
    "lfm-2.5": _format(CHATML, _IM_END, **_LFM),
    "phi-4": _format((*CHATML, "<|im_sep|>"), _IM_END, eos="<|endoftext|>"),
    "llama": _format((), _ended_by(" </s>", before=" ", trimmed=True), **_S),
    "llama-3": _format(LLAMA, _EOT, **_LLAMA_3),
    "llama-3.1": _format(LLAMA, _EOT, **_LLAMA_3),
    "mistral": _format((), _ended_by("</s>"), **_S),
    "qwen-2.5": _format(CHATML, _IM_END, **_QWEN),
    "qwen-3": _format(CHATML, _IM_END, _after_an_empty_thought, **_QWEN),
    "qwen3-instruct": _format(CHATML, _IM_END, **_QWEN),
    "qwen3-thinking": _format(CHATML, _IM_END, _after_an_empty_thought, **_QWEN),
    "gemma": _format(_GEMMA_TURN, _ended_by("<end_of_turn>", trimmed=True), **_GEMMA),
    "gemma-3": _format(_GEMMA_TURN, _ended_by("<end_of_turn>", trimmed=True), **_GEMMA),
    "gemma-4": _format(_GEMMA_4_TURN, _ended_by("<turn|>", trimmed=True), **_GEMMA),
    "gemma-4-thinking": _format(_GEMMA_4_TURN, _ended_by("<turn|>", trimmed=True), **_GEMMA),
    "gpt-oss": _format(
        _HARMONY,
        _ended_by("<|end|>", before="<|channel|>final<|message|>"),
        _ended_by("<|return|>", before="<|channel|>final<|message|>"),
        bos="<|startoftext|>",
        eos="<|return|>",
    ),
    "unsloth": _format((), _ended_by("</s>"), **_S, **_LINES),
    "zephyr": _format((), _ended_by("</s>"), **_LINES),
    "vicuna": _format((), _ended_by("</s>", before=" "), **_S),
    "vicuna_old": _format((), _ended_by("</s>", before=" "), **_S, **_LINES),
    "alpaca": _format((), _ended_by("</s>"), **_S, after="\n\n", at_the_end="\n\n"),
    "starling": _format(
        ("<|end_of_turn|>",), _ended_by("<|end_of_turn|>", before=" "), bos="<s>", adds_bos=True
    ),
    "phi-3": _format(
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        _ended_by("<|end|>"),
        eos="<|endoftext|>",
        after="\n",
        at_the_end="\n<|endoftext|>",
    ),
}
"""By the names of `TEMPLATES`."""

WITHOUT_SYSTEM = ("mistral", "gemma")
ALTERNATING = ("mistral", "llama", "gemma", "gemma-3")
