"""Made-up captions in any number, for tests of scores and of their intervals."""

import numpy as np


def random_items(num_items: int, seed: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Predictions and four references of 11 words from a vocabulary of 3,375 with a natural skew."""
    letters = "bcdfghjklmnprst"
    vocabulary = np.array([f"{first}a{second}o{third}" for first in letters for second in letters for third in letters])
    generator = np.random.default_rng(seed)
    words = vocabulary[(len(vocabulary) * generator.random((num_items, 5, 11)) ** 3).astype(int)]
    captions = [[" ".join(caption) + "." for caption in item] for item in words.tolist()]
    return (
        {str(index): item[0] for index, item in enumerate(captions)},
        {str(index): item[1:] for index, item in enumerate(captions)},
    )
