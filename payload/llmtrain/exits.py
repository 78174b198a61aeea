"""What llm-train's exit codes mean, and the error that carries one."""

DONE = 0
FAILED = 1
USAGE = 2  # wrong usage, job file or data set
NO_FIT = 3  # the plan says that it does not fit
ALTERED = 4  # a model, data set or checkpoint that is not what its manifest says
STOPPED = 5  # a signal: saved, and to be resumed
UNHEALTHY = 6  # loss or gradients went where no resuming helps: NaN, scale collapsed
NO_SPACE = 7  # the disk is too full for what would be written
NOT_BETTER = 8  # compare: hold or reject


class Refusal(Exception):
    """Why llm-train does not go on: what is wrong, the value seen, what to do; and the exit code."""

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(message)
        self.code = code
