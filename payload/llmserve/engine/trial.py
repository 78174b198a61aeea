"""Compiles grammars on trial, in a process of its own: a hostile schema may take forever, and a thread cannot be killed.

`python -m llmserve.engine.trial` reads a grammar as a JSON string from each line, and answers with a line: the grammar's error as
a JSON string, or an empty one. It needs no tokenizer, and starts in a tenth of a second.
"""

import json
import select
import subprocess
import sys
import threading

from llguidance import LLMatcher, LLParserLimits

LIMITS = LLParserLimits(max_grammar_size=100_000, initial_lexer_fuel=500_000, verbose_errors=False)
SECONDS, START_SECONDS = 2.0, 30.0
TOO_MUCH = f"it takes more than {SECONDS:g} s, or too much memory, to compile: send a simpler one"


class Trial:
    """The process, which is started on first use, and again after it had to be killed."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lock = threading.Lock()

    def fault(self, grammar: str) -> str:
        """Why a grammar cannot be compiled; empty if it can. One at a time; blocks for at most SECONDS once the process has
        started."""
        with self.lock:
            if self.process is None:
                command = [sys.executable, "-m", "llmserve.engine.trial"]
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
                self.answer(self.process, "", START_SECONDS)
            fault = self.answer(self.process, grammar, SECONDS)
            if fault is None:
                self.process.kill()
                self.process.communicate()
                self.process = None
            return TOO_MUCH if fault is None else fault

    def answer(self, process: subprocess.Popen[str], grammar: str, seconds: float) -> str | None:
        """The answer of the process; None if it does not answer in time."""
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("it has no pipes")
        try:
            process.stdin.write(json.dumps(grammar) + "\n")
            process.stdin.flush()
            if not select.select([process.stdout], [], [], seconds)[0]:
                return None
            return str(json.loads(process.stdout.readline()))
        except (OSError, ValueError):
            return None


def main() -> None:
    """Answer until the input ends."""
    for line in sys.stdin:
        grammar = json.loads(line)
        fault = LLMatcher.validate_grammar(grammar, limits=LIMITS) if grammar else ""
        print(json.dumps(fault), flush=True)


if __name__ == "__main__":
    main()
