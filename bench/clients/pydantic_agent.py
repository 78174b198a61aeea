"""pydantic-ai: agents on chat completions and on the Responses API."""

import asyncio
from typing import Any

from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from steps import FOLLOW_UP, QUESTION, TOKENS, TOOL_QUESTION, Server, Town, check_weather_loop, run, weather


def agent(server: Server, model: Any = OpenAIChatModel, **more: Any) -> Any:
    def settings(context: Any) -> Any:
        """A call is required in the first step of an agent that has tools."""
        first = "required" if context.run_step == 1 else "none"
        return {"temperature": 0, "max_tokens": TOKENS, **({"tool_choice": first} if "tools" in more else {})}

    provider = OpenAIProvider(base_url=server.base_url, api_key=server.key)
    return Agent(model(server.model, provider=provider), model_settings=settings, **more)


def answer(server: Server) -> None:
    assert agent(server).run_sync(QUESTION).output


def stream(server: Server) -> None:
    async def read() -> str:
        async with agent(server).run_stream(QUESTION) as result:
            return "".join([text async for text in result.stream_text(delta=True)])

    assert asyncio.run(read())


def second_turn(server: Server) -> None:
    first = agent(server).run_sync(QUESTION)
    assert agent(server).run_sync(FOLLOW_UP, message_history=first.new_messages()).output


def tool_loop(server: Server, model: Any = OpenAIChatModel) -> None:
    check_weather_loop(agent(server, model, tools=[weather]).run_sync(TOOL_QUESTION).output)


def structured_output(server: Server) -> None:
    """By a call, its default, and by a JSON schema."""
    for output in Town, NativeOutput(Town):
        assert isinstance(agent(server, output_type=output).run_sync(QUESTION).output, Town)


def responses(server: Server) -> None:
    tool_loop(server, OpenAIResponsesModel)


if __name__ == "__main__":
    run(["pydantic-ai-slim"], answer, stream, second_turn, tool_loop, structured_output, responses)
