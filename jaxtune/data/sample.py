"""`Sample`: one tokenised training example, the form that every dataset is brought to before batches are made; and
`PackedRow`: several that a batch counts as one."""

from dataclasses import dataclass

import numpy as np

IGNORED = -100  # the label of a token that is not trained on, as everywhere in the Hugging Face world


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """`labels[t]` is `input_ids[t]` where that token is to be predicted, and -100 where it is only context. Both are
    int32 of one length. (The shift by one, "predict the next token", happens when batches are laid out.)"""

    input_ids: np.ndarray
    labels: np.ndarray

    @property
    def parts(self) -> "tuple[Sample, ...]":
        return (self,)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    def cut(self, start: int | None, end: int | None) -> "Sample":
        return Sample(self.input_ids[start:end], self.labels[start:end])

    @property
    def num_trained(self) -> int:
        """The tokens that a loss will count: the first token has nothing before it to be predicted from."""
        return int(np.count_nonzero(self.labels[1:] != IGNORED))


@dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """Samples, or parts of samples, that lie end to end wherever they go. None of them sees another."""

    parts: tuple[Sample, ...]
    sample_ids: tuple[int, ...]
    """Which samples these are, by their places among those that were packed."""

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)

    @property
    def num_trained(self) -> int:
        return sum(part.num_trained for part in self.parts)


type Item = Sample | PackedRow
"""What the size of a batch counts."""
