"""LangChain: ChatOpenAI, and an agent that calls tools (`create_agent`)."""

from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from steps import FOLLOW_UP, QUESTION, TOKENS, TOOL_QUESTION, Server, Town, check_weather_loop, run, weather


def chat(server: Server, **more: Any) -> Any:
    return ChatOpenAI(
        model=server.model,
        base_url=server.base_url,
        api_key=server.key,
        temperature=0,
        max_tokens=TOKENS,
        max_retries=0,
        **more,
    )


def answer(server: Server) -> None:
    assert chat(server).invoke(QUESTION).text


def stream(server: Server) -> None:
    assert "".join(chunk.text for chunk in chat(server).stream(QUESTION))


def second_turn(server: Server) -> None:
    model = chat(server)
    question = HumanMessage(QUESTION)
    assert model.invoke([question, model.invoke([question]), HumanMessage(FOLLOW_UP)]).text


@wrap_model_call
def call_first(request: Any, handler: Any) -> Any:
    """Require a call until there is a result; vLLM holds only a `strict` one to its schema."""
    results = [message for message in request.messages if isinstance(message, ToolMessage)]
    choice = "none" if results else "any"
    return handler(request.override(tool_choice=choice, model_settings={"strict": True}))


def tool_loop(server: Server, **more: Any) -> None:
    agent = create_agent(chat(server, **more), tools=[weather], middleware=[call_first])
    state = agent.invoke({"messages": [{"role": "user", "content": TOOL_QUESTION}]})
    check_weather_loop(state["messages"][-1].text)


def structured_output(server: Server) -> None:
    assert isinstance(chat(server).with_structured_output(Town).invoke(QUESTION), Town)


def responses(server: Server) -> None:
    tool_loop(server, use_responses_api=True)


if __name__ == "__main__":
    run(
        ["langchain", "langchain-openai"],
        answer,
        stream,
        second_turn,
        tool_loop,
        structured_output,
        responses,
    )
