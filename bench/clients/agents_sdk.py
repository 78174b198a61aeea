"""The OpenAI Agents SDK: chat completions, and the Responses API, its default."""

import asyncio
from typing import Any

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
)
from openai import AsyncOpenAI
from steps import FOLLOW_UP, QUESTION, TOKENS, TOOL_QUESTION, Server, Town, check_weather_loop, run, weather


def agent(server: Server, model: Any = OpenAIChatCompletionsModel, **more: Any) -> Any:
    client = AsyncOpenAI(base_url=server.base_url, api_key=server.key, max_retries=0)
    settings = ModelSettings(
        temperature=0, max_tokens=TOKENS, tool_choice="required" if "tools" in more else None
    )
    chosen = model(model=server.model, openai_client=client)
    return Agent(
        name="Assistant", instructions="Answer briefly.", model=chosen, model_settings=settings, **more
    )


def answer(server: Server) -> None:
    assert Runner.run_sync(agent(server), QUESTION).final_output


def stream(server: Server) -> None:
    async def read() -> str:
        result = Runner.run_streamed(agent(server), QUESTION)
        return "".join([event.data.delta async for event in result.stream_events() if is_text(event)])

    assert asyncio.run(read())


def is_text(event: Any) -> bool:
    return event.type == "raw_response_event" and event.data.type == "response.output_text.delta"


def second_turn(server: Server) -> None:
    first = Runner.run_sync(agent(server), QUESTION)
    turns = [*first.to_input_list(), {"role": "user", "content": FOLLOW_UP}]
    assert Runner.run_sync(agent(server), turns).final_output


def tool_loop(server: Server) -> None:
    calling = agent(server, tools=[function_tool(weather)])
    check_weather_loop(Runner.run_sync(calling, TOOL_QUESTION).final_output)


def structured_output(server: Server) -> None:
    assert isinstance(Runner.run_sync(agent(server, output_type=Town), QUESTION).final_output, Town)


def responses(server: Server) -> None:
    calling = agent(server, OpenAIResponsesModel, tools=[function_tool(weather)])
    check_weather_loop(Runner.run_sync(calling, TOOL_QUESTION).final_output)


if __name__ == "__main__":
    run(["openai-agents"], answer, stream, second_turn, tool_loop, structured_output, responses)
