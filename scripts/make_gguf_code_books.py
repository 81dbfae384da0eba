"""Writes the code books of GGUF's smallest types, as the gguf package knows them, to jaxtune/export/gguf/quants.

python scripts/make_gguf_code_books.py
"""

from pathlib import Path

import numpy as np
from gguf import quants

TARGET = Path(__file__).parents[1] / "jaxtune" / "export" / "gguf" / "quants" / "code_books.npz"


def levels(type: type) -> np.ndarray:
    """uint8 [entries, values of one]: which of the values that the book has, in ascending order."""
    type.init_grid()
    grid = type.grid.reshape(type.grid_shape)
    return np.unique(grid, return_inverse=True)[1].reshape(grid.shape).astype(np.uint8)


def main() -> None:
    books = {
        name: levels(getattr(quants, name)) for name in "IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S".split()
    }
    np.savez_compressed(TARGET, **books)


if __name__ == "__main__":
    main()
