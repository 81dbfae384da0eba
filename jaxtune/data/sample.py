"""`Sample`: one tokenised training example, the form that every dataset is brought to before batches are made."""

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
    def num_trained(self) -> int:
        """The tokens that a loss will count: the first token has nothing before it to be predicted from."""
        return int(np.count_nonzero(self.labels[1:] != IGNORED))
