"""The named conversation formats. Names of one and the same format are aliases of one template."""

from jaxtune.data.chat_templates import chatml, gemma, gpt_oss, lfm, llama, plain, qwen
from jaxtune.data.chat_templates.template import ChatTemplate

TEMPLATES: tuple[ChatTemplate, ...] = (
    *chatml.TEMPLATES,
    *llama.TEMPLATES,
    *qwen.TEMPLATES,
    *gemma.TEMPLATES,
    *gpt_oss.TEMPLATES,
    *lfm.TEMPLATES,
    *plain.TEMPLATES,
)

__all__ = ["TEMPLATES", "ChatTemplate"]
