"""Decontamination: drops documents that share a run of words with the evaluation set (Brown et al. 2020, appendix C).

Hashes of runs of `words` words are compared. Shorter evaluation documents are compared as a whole, down to `shortest` words;
even shorter ones would match everywhere, so they are skipped and counted.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from llmcore.files import sha256_of
from llmtrain.data.documents import Docs, Rejects, parts
from llmtrain.data.read import Read
from llmtrain.data.sources import Piece
from llmtrain.data.words import runs_of, words_of
from llmtrain.data.work_directory import Result

if TYPE_CHECKING:
    from llmtrain.data import settings

INDEX = "runs.npz"


def index(
    directory: Path, options: "settings.Decontaminate", reading: "settings.Reading", group: list[Piece]
) -> Result:
    """Write the hashes of the evaluation set's runs by their number of words."""
    runs: dict[int, set[int]] = {}
    looked_for = too_short = 0
    for document in Read(options.against, reading, Rejects(directory))(group):
        for text in parts(document):
            words = words_of(text)
            size = min(options.words, len(words))
            if size < options.shortest:
                too_short += 1
                continue
            looked_for += 1
            runs.setdefault(size, set()).update(map(int, runs_of(words, size)))
    arrays = {str(size): numpy.array(sorted(hashes), numpy.uint64) for size, hashes in sorted(runs.items())}
    with (directory / INDEX).open("wb") as file:
        numpy.savez(file, **arrays)  # type: ignore[arg-type] # the stubs confuse the arrays with `allow_pickle`
    return {"looked_for": looked_for, "too_short": too_short, "sha256": sha256_of(directory / INDEX)}


class Decontaminate:
    """The step that drops documents with a run of the evaluation set."""

    name = "decontaminate"

    def __init__(self, directory: Path, rejects: Rejects) -> None:
        with numpy.load(directory / INDEX) as arrays:
            self.runs = {int(size): arrays[size] for size in arrays.files}
        self.rejects = rejects

    def contaminated(self, text: str) -> int:
        """The length in words of a run of the evaluation set in the text; 0 if there is none."""
        words = words_of(text)
        for size, hashes in self.runs.items():
            mine = runs_of(words, size)
            places = numpy.searchsorted(hashes, mine)
            places[places == len(hashes)] = 0
            if (hashes[places] == mine).any():
                return size
        return 0

    def __call__(self, docs: Docs, rank: int = 0, world_size: int = 1) -> Docs:
        with self.rejects.of(self.name, rank) as reject:
            for document in docs:
                size = self.contaminated(document.text)
                if size:
                    reject(document, "contaminated", f"has {size} words in a row of the evaluation set")
                else:
                    yield document
