"""`train_on_responses_only`: the way to train on answers alone when the texts were rendered before they came here.
(For conversations, `assistant_only_loss` and prompt/completion data do so exactly, without a search.)"""

from collections.abc import Mapping, Sequence
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
    """Makes the trainer train on the assistant's answers only (and evaluate on them, also in datasets that it is given
    later), and returns the trainer.

    Args:
        trainer: an SFTTrainer, or anything with `samples`, `eval_samples`, `masks` and `processing_class`.
        instruction_part: what opens a user's turn, as it stands in the text; None takes it from the chat template.
        response_part: what opens the assistant's turn, likewise.
    """
    tokenizer = trainer.processing_class
    if instruction_part is None or response_part is None:
        found = find_parts(tokenizer)
        instruction_part, response_part = instruction_part or found[0], response_part or found[1]
    instruction, response = find_marker(tokenizer, instruction_part), find_marker(tokenizer, response_part)

    def mask(samples: Sequence[Sample], name: str = "eval_samples") -> list[Sample]:
        kept = [sample for sample in mask_to_responses(samples, instruction, response) if sample.num_trained]
        if not kept:
            raise _no_response(tokenizer, samples[0], name, instruction_part, response_part)
        if len(kept) < len(samples):
            log.warning(
                "dropped %d of %d %s: no answer in them", len(samples) - len(kept), len(samples), name
            )
        return kept

    own, evaluated = mask(trainer.samples, "samples"), trainer.eval_samples
    if isinstance(evaluated, Mapping):
        evaluated = {name: mask(samples) for name, samples in evaluated.items()}
    elif evaluated is not None:
        evaluated = mask(evaluated)
    trainer.samples, trainer.eval_samples = own, evaluated  # not before all of it is known to work
    trainer.masks.append(mask)
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
