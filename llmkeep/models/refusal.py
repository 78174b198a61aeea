"""Why a model is refused, as an exit code of `llmkeep model add`."""

from llmkeep.errors import LlmkeepError

UNFIT, HUB, DAMAGED, LICENCE, SPACE = 1, 3, 4, 5, 6


class ModelRefused(LlmkeepError):
    """The message says what is wrong, the value seen, and the way out. `code` is the exit code.

    `resumable`: the next run can continue with what was copied.

    """

    def __init__(self, code: int, message: str, resumable: bool = False) -> None:
        super().__init__(message)
        self.code, self.resumable = code, resumable or code in (HUB, SPACE)
