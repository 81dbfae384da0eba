"""A Modelfile for Ollama: the GGUF, the chat template in Go's template language, the strings at which to stop."""

from jaxtune.export.ollama.modelfile import MODELFILE, modelfile, sampling_of

__all__ = ["MODELFILE", "modelfile", "sampling_of"]
