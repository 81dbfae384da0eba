"""The module that Unsloth's scripts import these names from: `from jaxtune.chat_templates import get_chat_template`."""

from jaxtune.data.apply_template import apply_chat_template, construct_chat_template
from jaxtune.data.masking import train_on_responses_only
from jaxtune.data.merging import to_sharegpt
from jaxtune.data.sharegpt import standardize_data_formats, standardize_sharegpt
from jaxtune.data.templates import get_chat_template

__all__ = [
    "apply_chat_template",
    "construct_chat_template",
    "get_chat_template",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
]
