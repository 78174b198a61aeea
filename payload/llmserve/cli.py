"""llm-serve: gateway, engines, API keys, ratings and the audit record.

Exit codes: 0 success, 1 failure, 2 wrong usage or configuration, 3 unknown key, 4 a model that differs from its
manifest. `audit verify` and `audit show` use those of llm-audit: 3 the record was altered, 4 there is no record.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llmcore import logs
from llmcore.config import ConfigError, load
from llmcore.manifest import ManifestError, verify_model
from llmproof import cli as audit_cli
from llmserve.access import api_keys_cli
from llmserve.access.api_keys import KeyFileError
from llmserve.access.oidc import read_jwks
from llmserve.documents import cli as documents_cli
from llmserve.engine import vllm
from llmserve.engine.sandbox import unix_sockets_only
from llmserve.engine.unsupported_models import refuse
from llmserve.feedback import cli as feedback_cli
from llmserve.settings import Adapter, EmbedModel, EngineConfig, GatewayConfig, LocalModel


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="llm-serve", description="Serve a language model: gateway, engines, API keys."
    )
    commands = top.add_subparsers(dest="command", required=True)
    gateway = commands.add_parser("gateway", help="serve clients, in front of engines")
    gateway.add_argument("--config", type=Path, required=True, help="gateway.yaml")
    gateway.add_argument(
        "--pepper-file",
        type=Path,
        help="read the pepper from here, not from the systemd credential llm-gateway.pepper",
    )
    gateway.set_defaults(run=run_gateway_command)
    engine = commands.add_parser("engine", help="run one model behind a UNIX socket")
    engine.add_argument(
        "--name",
        required=True,
        help="the model's name as clients request it; `name` in the file takes precedence",
    )
    engine.add_argument("--config", type=Path, required=True, help="engine-NAME.yaml")
    engine.set_defaults(run=run_engine_command)
    check = commands.add_parser("check", help="validate a configuration file; prints nothing if it is valid")
    check.add_argument("kind", choices=["gateway", "engine", "documents", "jwks"])
    check.add_argument("config", type=Path)
    check.set_defaults(run=check_command)
    fit = commands.add_parser(
        "fit", help="estimate from config.json alone whether a model fits in memory; exit 1 if it does not"
    )
    fit.add_argument("--model", type=Path, required=True, help="model directory")
    fit.add_argument(
        "--memory", required=True, help="memory of one GPU, or of the host, such as 24G (G is 2^30 bytes)"
    )
    fit.add_argument(
        "--gpus",
        type=int,
        default=1,
        help="number of GPUs that share the model (tensor parallelism); with --hosts: of each host",
    )
    fit.add_argument(
        "--hosts", type=int, help="choose how vLLM divides the model over the GPUs of this many hosts"
    )
    fit.add_argument(
        "--concurrency", type=int, default=1, help="with --hosts: concurrent requests (default: 1)"
    )
    fit.add_argument(
        "--batched-tokens",
        type=int,
        default=8192,
        help="with --hosts: vLLM's max_num_batched_tokens (default: 8192)",
    )
    fit.add_argument(
        "--tensor-parallel", type=int, help="with --hosts: GPUs that share each layer (default: the best)"
    )
    fit.add_argument(
        "--pipeline-parallel",
        type=int,
        help="with --hosts: groups of GPUs that share the layers (default: the best)",
    )
    fit.add_argument("--context", type=int, help="tokens per request (default: the model's maximum)")
    fit.add_argument(
        "--quantization",
        choices=["none", "int8", "nf4", "fp8", "int4"],
        help="check this quantization only (default: all of them): int8 and nf4 by bitsandbytes on one host, fp8 and int4 by "
        "vLLM with --hosts",
    )
    fit.add_argument("--json", action="store_true")
    fit.set_defaults(run=fit_command)
    merge = commands.add_parser(
        "merge", help="merge a LoRA adapter into a model; writes the new weights and their manifest"
    )
    merge.add_argument("--model", type=Path, required=True, help="model directory")
    merge.add_argument("--manifest", type=Path, required=True)
    merge.add_argument("--adapter", type=Path, required=True, help="adapter directory")
    merge.add_argument("--adapter-manifest", type=Path, required=True)
    merge.add_argument("--into", type=Path, required=True, help="output directory, which must not exist")
    merge.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="dtype of the merged weights"
    )
    merge.set_defaults(run=merge_command)
    developer = commands.add_parser("run", help="run everything on 127.0.0.1 with a throw-away key")
    developer.add_argument("--engine", choices=["echo", "naive", "continuous"], default="echo")
    developer.add_argument("--model", type=Path, help="model directory; required by all engines but echo")
    developer.add_argument("--port", type=int, default=8000, help="TCP port; 0 picks a free one")
    developer.add_argument(
        "--redis", metavar="URL", help="Redis for the answer cache; without it nothing is cached"
    )
    developer.set_defaults(run=run_developer_command)
    api_keys_cli.add_commands(commands)
    feedback_cli.add_commands(commands)
    documents_cli.add_commands(commands)
    audit = commands.add_parser("audit", help="verify or read the audit record; same as llm-audit")
    audit_cli.add_commands(audit.add_subparsers(required=True, metavar="COMMAND"))
    return top


def run_gateway_command(options: argparse.Namespace) -> int:
    import uvloop

    from llmserve.gateway.process import run_gateway

    config = load(options.config, GatewayConfig)
    logs.configure(config.log_level)
    uvloop.run(run_gateway(config, api_keys_cli.gateway_pepper(options.pepper_file)))
    return 0


def run_engine_command(options: argparse.Namespace) -> int:
    import uvloop

    from llmserve.engine.server import Driver, serve

    config = load(options.config, EngineConfig)
    logs.configure(config.log_level)
    driver: Driver
    if config.model.driver == "vllm":
        vllm.require_program(config.model)
        vllm.require_gpus(config.model)
        verify_model(config.model.path, config.model.manifest)
        vllm.become(config.name or options.name, config.socket, config.drain_seconds, config.model)
    if config.model.driver == "echo":
        from llmserve.engine.echo import EchoDriver

        unix_sockets_only()
        driver = EchoDriver(config.model)
    else:
        # Imported only now: nothing that could open the model runs before it has been verified.
        revision, adapters = verified(config.model)
        if options.name in adapters:
            raise ConfigError(
                f"the model and one of its adapters are both named '{options.name}': rename the adapter"
            )
        unix_sockets_only()
        if config.model.threads:
            # OpenBLAS, which multiplies in float32, takes no number from torch, and reads this one when it is loaded.
            os.environ["OPENBLAS_NUM_THREADS"] = str(config.model.threads)
        if config.model.driver == "naive":
            from llmserve.engine.naive import NaiveDriver

            driver = NaiveDriver(config.model, revision, adapters)
        elif config.model.driver == "embed":
            from llmserve.engine.embed import EmbedDriver

            driver = EmbedDriver(config.model, revision)
        else:
            from llmserve.engine.continuous import ContinuousDriver

            driver = ContinuousDriver(config.model, revision)
    mode = int(config.socket_mode, 8)
    name = config.name or options.name
    patience = config.stall_seconds, config.drain_seconds
    code: int = uvloop.run(serve(name, driver, config.socket, mode, *patience))
    return code


def verified(model: LocalModel | EmbedModel) -> tuple[str, dict[str, str]]:
    """Revision of the model, including anything merged into it, and of each adapter by name; raises ManifestError."""
    revision = verify_model(model.path, model.manifest)
    if isinstance(model, EmbedModel):
        return revision, {}
    if model.merged:
        revision += "+" + verify_model(model.merged.path, model.merged.manifest)
    return revision, {name: verify_model(each.path, each.manifest) for name, each in model.adapters.items()}


def merge_command(options: argparse.Namespace) -> int:
    adapter = Adapter(path=options.adapter, manifest=options.adapter_manifest)
    model = LocalModel(path=options.model, manifest=options.manifest, dtype=options.dtype, merged=adapter)
    revision, _ = verified(model)
    from llmserve.engine.adapters import save_merged

    print(save_merged(model, revision, options.into))
    return 0


def check_command(options: argparse.Namespace) -> int:
    if options.kind == "jwks":
        read_jwks(options.config)
    elif options.kind == "gateway":
        load(options.config, GatewayConfig)
    elif options.kind == "documents":
        from llmserve.documents.intake import IntakeConfig

        load(options.config, IntakeConfig)
    else:
        refuse(load(options.config, EngineConfig))
    return 0


def fit_command(options: argparse.Namespace) -> int:
    if options.hosts is None:
        from llmserve.engine.memory_fit import report

        arguments = options.model, options.memory, options.gpus, options.context, options.quantization
        text, fits = report(*arguments, options.json)
    else:
        from llmserve.engine import parallel_report

        text, fits = parallel_report.report(
            options.model,
            options.hosts,
            options.gpus,
            options.memory,
            options.context,
            options.concurrency,
            options.batched_tokens,
            options.quantization,
            options.tensor_parallel,
            options.pipeline_parallel,
            options.json,
        )
    print(text)
    return 0 if fits else 1


def run_developer_command(options: argparse.Namespace) -> int:
    from llmserve.local_run import run_all

    return run_all(options.engine, options.model, options.port, options.redis)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run llm-serve; returns the exit code (see the module's docstring)."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except ConfigError as error:
        print(f"llm-serve: {error}", file=sys.stderr)
        return 2
    except ManifestError as error:
        print(f"llm-serve: {error}", file=sys.stderr)
        return 4
    except (KeyFileError, OSError) as error:
        print(f"llm-serve: {error}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
