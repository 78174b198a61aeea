"""One line of the routing table."""

from dataclasses import dataclass

from pydantic import BaseModel

from llmserve.asgi import App


@dataclass(frozen=True)
class Route:
    """A path and who answers which method there. A path that ends in '/' stands for everything below it."""

    path: str
    methods: dict[str, App]
    public: bool = False
    hot: type[BaseModel] | None = None  # its body's model; such a route knows model and prompt
    answer: type[BaseModel] | None = None  # of a route that FastAPI does not know

    @property
    def pattern(self) -> str:
        """The path as policy names it."""
        return f"{self.path}*" if self.path.endswith("/") else self.path


@dataclass(frozen=True)
class PlainRoute:
    """A route as it is described: its body's model is None where there is none and nobody needs a key."""

    path: str
    methods: list[str]
    body: type[BaseModel] | None
    answer: type[BaseModel]
