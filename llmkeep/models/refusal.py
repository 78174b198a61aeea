"""Why a model is refused, as an exit code of `llmkeep model add`."""

from llmkeep.errors import Refused

UNFIT, HUB, DAMAGED, LICENCE, SPACE = 1, 3, 4, 5, 6


class ModelRefused(Refused):
    """A model is not taken in. `resumable`: the next run can continue with what was copied."""

    def __init__(self, code: int, message: str, resumable: bool = False) -> None:
        super().__init__(code, message)
        self.resumable = resumable or code in (HUB, SPACE)
