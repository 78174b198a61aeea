"""The exit codes of llm-train, and the error that carries one."""

DONE = 0
FAILED = 1
USAGE = 2  # wrong arguments, job file or data set
NO_FIT = 3  # the job does not fit in memory
ALTERED = 4  # a model, data set or checkpoint does not match its manifest
STOPPED = 5  # stopped by a signal; saved, and can be resumed
UNHEALTHY = 6  # loss or gradients are beyond recovery: NaN, loss scale collapsed
NO_SPACE = 7  # too little free disk space
NOT_BETTER = 8  # compare says hold or reject


class Refusal(Exception):
    """llm-train cannot continue. The message says what is wrong, the value seen and what to do; `code` is the exit code."""

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(message)
        self.code = code
