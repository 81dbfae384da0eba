"""The named chat templates for Ollama, in Go's template language.

Each prints what the jinja template of its name prints, byte for byte and without the bos token, with these exceptions:
- What a template takes off the ends of a message is only ASCII's white space here, not all of Unicode's.
- JSON (tools, the arguments of calls) is Go's: without spaces, the arguments in order, `<`, `>` and `&` escaped.
- Where jinja refuses a conversation (two questions in a row, a role that the format does not know), something is
  printed, because Go cannot refuse.
- A default system message is not in the template: it is the Modelfile's SYSTEM.
What else a format leaves out is said in its file.
"""

from jaxtune.export.ollama.formats import chatml, gemma, gpt_oss, llama, plain, qwen
from jaxtune.export.ollama.formats.parts import Format

FORMATS: dict[str, Format] = {
    **chatml.FORMATS,
    **llama.FORMATS,
    **qwen.FORMATS,
    **gemma.FORMATS,
    **gpt_oss.FORMATS,
    **plain.FORMATS,
}
"""By the names of `data.chat_templates.TEMPLATES`."""

__all__ = ["FORMATS", "Format"]
