"""`jaxtune export`: an adapter, or a whole model, as something that others run: GGUF, or a merged folder.

Weights are read from the base as they are merged: neither the device nor the host ever holds the model.
"""

import functools
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from jaxtune.cli import in_shell, report
from jaxtune.errors import OptionError, nearest

GGUF = "gguf"
FLAGS = {"save_method": "--to"} | {
    name: f"--{name.replace('_', '-')}"
    for name in (
        "quantization_method", "imatrix_file", "max_shard_size", "base_model", "original_model", "dequantize",
        "max_seq_length", "token", "verify",
    )
}  # fmt: skip
"""What is called so in Python."""


@in_shell.errors(FLAGS)
def export(
    model: Annotated[str | None, tyro.conf.Positional] = None,
    to: str = GGUF,
    output_dir: Path | None = None,
    quantization_method: tuple[str, ...] = (),
    imatrix_file: Path | None = None,
    max_shard_size: str | None = None,
    base_model: str | None = None,
    original_model: str | None = None,
    dequantize: bool = False,
    max_seq_length: int | None = None,
    token: str | None = None,
    revision: str | None = None,
    verify: bool = True,
    lists: Annotated[bool, tyro.conf.arg(name="list")] = False,
) -> int:
    """Writes a model for llama.cpp, Ollama, vLLM or transformers: an adapter merged into its base, or a whole model.

    Args:
        model: The hub id or the folder of an adapter, ours or PEFT's, or of a model.
        to: What it becomes: gguf, or a save_method of save_pretrained_merged; --list names them.
        output_dir: The folder; of GGUF, its name without the _gguf that it ends with. Left out, the model's name.
        quantization_method: Of GGUF, one or several; --list names them. Left out, q8_0.
        imatrix_file: Of GGUF: what save_imatrix or llama-imatrix measured with the model.
        max_shard_size: The most that one file holds, such as 5GB.
        base_model: The hub id or the folder of the base, in place of the one that the adapter names.
        original_model: What a base that is quantised itself was made from, an id or a folder; left out, it is found.
        dequantize: Merge into the weights of such a base as they are.
        max_seq_length: The length that the model was trained for, if it was stretched for that.
        token: The hub's, for models that are gated.
        revision: A branch, tag or commit of the hub's model.
        verify: With --no-verify, what was written is not read back and compared.
        lists: List all that --to and --quantization-method can be, with sizes for the model, or for Llama 3.1 8B.

    Returns:
        0.
    """
    if lists:
        show_methods(model, base_model, token, revision)
        return 0
    if model is None:
        raise OptionError(
            "No model was named.",
            expected="the hub id or the folder of an adapter or of a model.",
            fix="jaxtune export MODEL --to gguf; or jaxtune export --list.",
        )
    _require(to, quantization_method, imatrix_file)
    from jaxtune.api import without_weights

    found = without_weights(
        model, base_model=base_model, max_seq_length=max_seq_length, token=token, revision=revision
    )
    name = Path(model).expanduser().resolve().name
    folder = Path(name if to == GGUF else f"{name}-{to}") if output_dir is None else output_dir.expanduser()
    if to == GGUF:
        files = found.save_pretrained_gguf(
            folder.with_name(folder.name.removesuffix("_gguf")),
            quantization_method=quantization_method or "q8_0",
            imatrix_file=imatrix_file,
            max_shard_size=max_shard_size,
            token=token,
            original_model=original_model,
            dequantize=dequantize,
            verify=verify,
        )
        if max_shard_size is None:
            uses = {file.name: f"for llama.cpp: llama-cli -m {file.name}" for file in files}
            uses["Modelfile"] = f"for Ollama, there: ollama create {name.lower()}"
        else:
            uses = {file.name: "for llama.cpp, which is given the first" for file in files}
            uses["Modelfile"] = "for Ollama, once the files are one: it says how"
        report.files(files[0].parent, uses)
    else:
        found.save_pretrained_merged(
            folder,
            found.tokenizer,
            save_method=to,
            max_shard_size=max_shard_size or "5GB",
            token=token,
            original_model=original_model,
            dequantize=dequantize,
            verify=verify,
        )
        report.files(folder.parent, {folder.name: f"for {_readers(to)}"})
    return 0


def _readers(save_method: str) -> str:
    from jaxtune.outputs import NEEDS

    if save_method == "lora":
        return "PEFT, vLLM and jaxtune"
    if save_method not in NEEDS:
        return "transformers, vLLM and jaxtune"
    ours = "" if save_method in ("w8a16", "w4a16") else " jaxtune,"
    return f"vLLM,{ours} and transformers with {NEEDS[save_method]}"


def _require(to: str, quantization_method: tuple[str, ...], imatrix_file: Path | None) -> None:
    """Before anything is fetched."""
    from jaxtune.export.gguf.folder import check_methods
    from jaxtune.outputs import SAVE_METHODS

    if to == GGUF:
        check_methods(quantization_method or None, imatrix_file)
    elif to not in SAVE_METHODS:
        raise OptionError(
            f"--to {to}.",
            expected=f"one of {', '.join((GGUF, *SAVE_METHODS))}.",
            fix=f"Choose one of these.{nearest(to, (GGUF, *SAVE_METHODS))}",
        )
    elif quantization_method or imatrix_file:
        option = "--quantization-method" if quantization_method else "--imatrix-file"
        raise OptionError(
            f"{option} with --to {to}.", expected="that of GGUF.", fix=f"Leave it out, or say --to {GGUF}."
        )


def show_methods(model: str | None, base_model: str | None, token: str | None, revision: str | None) -> None:
    from jaxtune.export.gguf.folder import ALIASES
    from jaxtune.export.gguf.sizes import LLAMA_8B, sizes
    from jaxtune.loading.describe import architecture
    from jaxtune.loading.hub import resolve
    from jaxtune.outputs import SAVE_METHODS

    config, of = LLAMA_8B, "Llama 3.1 8B"
    if model is not None:
        find = functools.partial(resolve, token=token, weights=False)
        config, of = architecture(model, find, revision=revision, base_model=base_model), model
    table = Table(
        "--quantization-method", "bits/weight", "size", "", title=f"--to gguf, of {of}", title_justify="left"
    )
    for method, size in sizes(config).items():
        others = ", ".join(alias for alias, meant in ALIASES.items() if meant == method)
        note = "with --imatrix-file only" if size.needs_importance else others and f"also {others}"
        table.add_row(method, f"{size.bits:.2f}", report.size_text(size.nbytes), note)
    report.console.print(table)
    report.say(f"--to can also be: {', '.join(SAVE_METHODS)}")
