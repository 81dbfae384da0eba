"""ChatML, Phi-4's format, and LFM's. LFM's list of tools is not here, because its chat template has no form for the
calls that would come back; nor can Go take thoughts out of what LFM 2.5 said."""

from jaxtune.export.ollama.formats.parts import Format, turns

_TURN = "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n"
_OPENING, _ENDING = "<|im_start|>assistant\n", "<|im_end|>\n"
_STOPS = ("<|im_start|>", "<|im_end|>")

_CHATML = turns(user=_TURN, opening=_OPENING, ending=_ENDING)

_PHI_4 = turns(
    user="<|im_start|>{{ .Role }}<|im_sep|>{{ .Content }}<|im_end|>",
    opening="<|im_start|>assistant<|im_sep|>",
    ending="<|im_end|>",
)

# A system message that opens the conversation and says nothing is no turn.
_LFM = turns(
    system="{{ if or $i .Content }}" + _TURN + "{{ end }}", user=_TURN, opening=_OPENING, ending=_ENDING
)

FORMATS = {
    "chatml": Format(_CHATML, _STOPS),
    "phi-4": Format(_PHI_4, (*_STOPS, "<|im_sep|>")),
    "lfm-2": Format(_LFM, _STOPS, {"temperature": 0.3, "min_p": 0.15}),
    "lfm-2.5": Format(_LFM, _STOPS, {"temperature": 0.1, "top_p": 0.1, "top_k": 50}),
}
