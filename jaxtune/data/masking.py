"""`train_on_responses_only`: the way to train on answers alone when the texts were rendered before they came here.
(For conversations, `assistant_only_loss` and prompt/completion data do so exactly, without a search.)"""

from typing import TYPE_CHECKING, Any

from jaxtune.data.markers import find_marker, mask_to_responses
from jaxtune.data.parts import find_parts
from jaxtune.data.sample import Sample
from jaxtune.errors import DatasetError
from jaxtune.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

log = get_logger(__name__)


def train_on_responses_only(
    trainer: Any, instruction_part: str | None = None, response_part: str | None = None
) -> Any:
    """Makes the trainer train on the assistant's answers only (and evaluate on them), and returns the trainer.

    Args:
        trainer: an SFTTrainer, or anything with `samples`, `eval_samples` and `processing_class`.
        instruction_part: what opens a user's turn, as it stands in the text; None takes it from the chat template.
        response_part: what opens the assistant's turn, likewise.
    """
    tokenizer = trainer.processing_class
    if instruction_part is None or response_part is None:
        found = find_parts(tokenizer)
        instruction_part, response_part = instruction_part or found[0], response_part or found[1]
    instruction, response = find_marker(tokenizer, instruction_part), find_marker(tokenizer, response_part)
    masked = {}
    for name, samples in (("samples", trainer.samples), ("eval_samples", trainer.eval_samples)):
        if samples is not None:
            kept = [
                sample for sample in mask_to_responses(samples, instruction, response) if sample.num_trained
            ]
            if not kept:
                raise _no_response(tokenizer, samples[0], name, instruction_part, response_part)
            if len(kept) < len(samples):
                log.warning(
                    "dropped %d of %d %s: no answer in them", len(samples) - len(kept), len(samples), name
                )
            masked[name] = kept
    for name, samples in masked.items():  # not before all of it is known to work
        setattr(trainer, name, samples)
    return trainer


def _no_response(
    tokenizer: "Tokenizer", sample: Sample, name: str, instruction_part: str, response_part: str
) -> DatasetError:
    return DatasetError(
        f"none of the trainer's {name} has anything to train on after {response_part!r} (and before "
        f"{instruction_part!r}).",
        expected=f"these parts as the texts have them; the first begins {tokenizer.decode(sample.input_ids[:64])!r}.",
        fix="Pass instruction_part and response_part as they stand in the texts, line breaks included; or raise "
        "max_length if the prompts alone fill it.",
    )
