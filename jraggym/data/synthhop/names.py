"""Made-up names whose words are split once and for all between training, development and test.

A word is a beginning and an ending ("Tor" + "van"). Every beginning and ending occurs in training words,
so a subword tokenizer trained there can spell any word; but no test word is a training word, so a model
can only get a test name right by copying it from what it reads.
"""

from __future__ import annotations

import random
from functools import cache

ONSETS = "B D F G H J K L M N P R S T V W Z Br Dr Fl Gr Kr Pl St Tr".split()
RIMES = "ar el in or un as em ol ed ig ab ok ut".split()
ENDINGS = (
    "van mer lis dor quil ben sen tho wick ram fel nos gard pin lund mira caster dell hold rane tov bury "
    "shaw mond kett rova stan lia pard gus veld nia trem chel zor bal fin crest dane holm ford mouth ridge "
    "worth sley bridge mont grove field lake nova tessa bina dora geth rick vard hagen moor vale wyn thal "
    "brook cliff port mede low step rust flor gaunt heim"
).split()

SHARES = {"train": 0.8, "development": 0.1, "test": 0.1}


@cache
def words(split: str) -> tuple[str, ...]:
    """The words of one split; the same for every seed, and disjoint between splits."""
    everything = [onset + rime + ending for onset in ONSETS for rime in RIMES for ending in ENDINGS]
    random.Random("synthhop words of the three worlds").shuffle(everything)
    start = 0
    for name, share in SHARES.items():
        stop = start + round(share * len(everything))
        if name == split:
            return tuple(everything[start:stop])
        start = stop
    raise KeyError(split)


class NameMaker:
    """Draws names that are unique within one world."""

    def __init__(self, split: str, rng: random.Random):
        self._words, self._rng, self._taken = words(split), rng, set[str]()

    def draw(self, parts: int) -> str:
        """A fresh name of `parts` words, such as "Torvan Quilmer"."""
        while True:
            name = " ".join(self._rng.choice(self._words) for _ in range(parts))
            if name not in self._taken:
                self._taken.add(name)
                return name
