"""Entries of the routing table."""

from dataclasses import dataclass

from pydantic import BaseModel

from llmserve.asgi import App


@dataclass(frozen=True)
class Route:
    """A path and its handler for each method. A path that ends in '/' covers everything below it."""

    path: str
    methods: dict[str, App]
    public: bool = False
    hot: type[BaseModel] | None = (
        None  # model of its body; such a route records its intent itself, with model and prompt
    )
    answer: type[BaseModel] | None = None  # model of the response, for routes outside FastAPI

    @property
    def pattern(self) -> str:
        """The path as the policy names it."""
        return f"{self.path}*" if self.path.endswith("/") else self.path


@dataclass(frozen=True)
class PlainRoute:
    """A route in the OpenAPI document; `body` is None where there is none and no API key is needed."""

    path: str
    methods: list[str]
    body: type[BaseModel] | None
    answer: type[BaseModel]
