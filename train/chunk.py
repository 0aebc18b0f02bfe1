"""From dumps to a corpus to search: python -m train.chunk wiki-00.jsonl wiki-01.jsonl --out corpora/wiki.jsonl

A line of a dump is {"title": "...", "text": "..."}, perhaps with an id (--text-field names another field than text);
see jraggym/data/corpora.py. A killed command that is given again goes on where it was; on SIGTERM it ends at its next
commit with exit code 75.
`python -m eval.qa ... --corpus corpora/wiki.jsonl` searches what it writes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from jraggym.data.corpora import write_chunks
from jraggym.errors import exit_on_input_error
from jraggym.preemption import preemptible


@dataclass(frozen=True)
class Arguments:
    """Cuts documents into chunks, and leaves out those whose text was there before."""

    sources: tyro.conf.Positional[tuple[Path, ...]]
    """The dumps: jsonl files, read in this order."""
    out: Path
    """The jsonl file of chunks."""
    words: int = 100
    """A chunk has at most so many words."""
    overlap: int = 20
    """A chunk begins with the last sentences of the one before, of so many words at most."""
    text_field: str = "text"
    """The field of a dump with a document's text: "content" in MedRAG's textbooks."""


def main() -> None:
    with exit_on_input_error(), preemptible():
        arguments = tyro.cli(Arguments, description=__doc__)
        with tqdm(desc=str(arguments.out), unit=" lines of a dump", file=sys.stderr) as bar:
            path = write_chunks(
                arguments.sources,
                arguments.out,
                words=arguments.words,
                overlap=arguments.overlap,
                field=arguments.text_field,
                progress=lambda done: bar.update(done - bar.n),
            )
        print(path)


if __name__ == "__main__":
    main()
