"""vllm-check CONFIG: whether the vLLM of this Python accepts a configuration file. No model is loaded, and no GPU used.

Exit 0: its own parser accepts every option. Exit 1: a sentence on stderr names the model and the option. Exit 3: this vLLM
could not be asked.
"""

import contextlib
import difflib
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

QUIET = {
    "VLLM_CONFIGURE_LOGGING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


class WrongOption(Exception):
    """An option that vLLM does not accept, as a sentence without its model."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides libraries' output during their import from the operator."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def serve() -> tuple[Any, Any]:
    """The command `vllm serve` and its parser, as vLLM's own program makes them."""
    module = importlib.import_module("vllm.entrypoints.cli.serve")
    command = module.cmd_init()[0]
    return command, command.subparser_init(module.FlexibleArgumentParser(prog="vllm").add_subparsers())


def refuse(config: dict[str, Any], command: Any, parser: Any) -> None:
    """WrongOption at the first option that vLLM does not know, would ignore or cannot read, or that requires another one."""

    def error(message: str) -> NoReturn:
        raise WrongOption(message)

    def leave(*_: object) -> NoReturn:
        raise WrongOption("it would print something and end, instead of serving")

    parser.error, parser.exit = error, leave
    known = (
        parser._option_string_actions
    )  # argparse has no other list, and itself takes any beginning of a name
    for name, value in config.items():
        if f"--{name}" not in known:
            close = difflib.get_close_matches(f"--{name}", known, 1, 0.75)
            raise WrongOption(f"{name} is no option of it" + (f", {close[0][2:]} is" if close else ""))
        switch = known[f"--{name}"].nargs == 0
        if switch and not isinstance(value, bool):
            raise WrongOption(f"{name} is {value!r}: it takes true or false")
        if isinstance(value, bool) and not switch:
            raise WrongOption(f"{name} is {value!r}: it takes a value")
        if value is False and f"--no-{name}" not in known:
            raise WrongOption(f"{name} is False, which it cannot be told: leave it out")
        parser.parse_args(words(name, value))
    try:
        command.validate(parser.parse_args([word for item in config.items() for word in words(*item)]))
    except (TypeError, ValueError) as problem:
        raise WrongOption(str(problem).removeprefix("Error: ")) from problem


def words(name: str, value: Any) -> list[str]:
    """The arguments that vLLM derives from an entry of its configuration file."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)] if value else []
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


def divides(config: dict[str, Any]) -> None:
    """WrongOption if GPUs cannot share the model's heads or layers evenly enough, which vLLM reports only while it loads."""
    model = json.loads(Path(config["model"], "config.json").read_text())
    model = model.get("text_config", model)
    tensor, pipeline = config["tensor-parallel-size"], config["pipeline-parallel-size"]
    heads, layers = model.get("num_attention_heads"), model.get("num_hidden_layers")
    if heads and heads % tensor:
        raise WrongOption(
            f"tensor-parallel-size is {tensor}, and its {heads} attention heads are no multiple of it"
        )
    if layers and layers < pipeline:
        raise WrongOption(f"pipeline-parallel-size is {pipeline}, and it has {layers} layers")


def main() -> int:
    config = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    name = config["served-model-name"]
    os.environ.update(QUIET)
    try:
        with quiet():
            command, parser = serve()
            version = importlib.import_module("vllm").__version__
    except Exception as problem:  # whatever an import can raise
        print(f"{name}: vLLM could not be asked: {type(problem).__name__}: {problem}", file=sys.stderr)
        return 3
    try:
        divides(config)
        refuse(config, command, parser)
    except WrongOption as wrong:
        print(f"the model {name}: vLLM {version} refuses its options: {wrong}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
