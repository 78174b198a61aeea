"""A node's part of a job: torchrun's agent starts a process per GPU, and restarts all of them when one dies.

The agent runs in a thread. The main thread passes SIGTERM on to the processes, which finish their step and save; torchrun's
own handler would kill them after 30 s, in the middle of a large save.
"""

import fcntl
import importlib
import io
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import threading
import types
from dataclasses import dataclass
from typing import Any

from llmtrain.exits import FAILED, STOPPED, Refusal

SIOCGIFADDR = 0x8915  # an interface's address: linux/sockios.h
JOIN_SECONDS = 24 * 3600  # how long a node waits for the others, some of which may have to reboot


@dataclass(frozen=True)
class Nodes:
    """The hosts of a job, and the rank of this one."""

    count: int = 1
    rank: int = 0
    rendezvous: str = ""  # HOST:PORT where node 0 listens
    restarts: int = 3  # of a node's processes, before the job fails


def agree_on_address(nodes: Nodes) -> str:
    """This host's address on the route to node 0. Makes gloo and NCCL use its interface unless the environment sets one:
    otherwise they use the address of the host name, which on Debian is 127.0.1.1. Raises Refusal.
    """
    host, _, port = nodes.rendezvous.rpartition(":")
    if not host or not port.isdecimal():
        raise Refusal(
            f"--rendezvous is {nodes.rendezvous!r}: specify HOST:PORT of the node with --node-rank 0"
        )
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, int(port), socket.AF_INET, socket.SOCK_DGRAM)[
            0
        ]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            own: str = probe.getsockname()[0]
            names = [name for _, name in socket.if_nameindex() if interface_address(probe, name) == own]
    except OSError as error:
        raise Refusal(f"--rendezvous {nodes.rendezvous}: {error.strerror}; check name and route") from error
    for name in names[:1]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    return own


def interface_address(probe: socket.socket, name: str) -> str:
    """The IPv4 address of a network interface; "" where it has none."""
    try:
        answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
    except OSError:
        return ""
    return socket.inet_ntoa(answer[20:24])


def do_without_libuv() -> None:
    """Make torch's rendezvous work if torch was built without libuv, as in Debian.

    Otherwise the agent and its processes ask for a store that needs libuv, regardless of USE_LIBUV, and fail. Does nothing
    if torch has libuv.
    """
    import torch.distributed as distributed

    try:
        distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False, use_libuv=True)
    except RuntimeError as error:
        if "libuv" not in str(error):
            raise
    else:
        return

    with_libuv = distributed.TCPStore.__init__

    def without_libuv(self: Any, *arguments: Any, **kwargs: Any) -> None:
        with_libuv(self, *arguments, **{**kwargs, "use_libuv": False})

    store = types.new_class(
        "TCPStore", (distributed.TCPStore,), {}, lambda body: body.update(__init__=without_libuv)
    )
    # import_module, because the attribute torch.distributed.rendezvous is a function.
    for module in (
        "torch.distributed",
        "torch.distributed.rendezvous",
        "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    ):
        importlib.import_module(module).TCPStore = store  # type: ignore[attr-defined]


class RendezvousState(pickle.Unpickler):
    """Reads the state that the hosts of a job share through the store of node 0. torchrun pickles it."""

    def find_class(self, module: str, name: str) -> Any:
        """The types of such a state; raises UnpicklingError for anything else, which could run code."""
        rendezvous = "torch.distributed.elastic.rendezvous.dynamic_rendezvous"
        types_of_state = {
            (rendezvous, "_RendezvousState"),
            (rendezvous, "_NodeDesc"),
            ("datetime", "datetime"),
        }
        if (module, name) not in types_of_state | {("datetime", "timezone"), ("datetime", "timedelta")}:
            raise pickle.UnpicklingError(f"the state of the rendezvous has a {module}.{name}: check node 0")
        return super().find_class(module, name)


def refuse_code_in_the_rendezvous() -> None:
    """Make torchrun's agent read the state of the rendezvous only with RendezvousState."""
    module: Any = importlib.import_module("torch.distributed.elastic.rendezvous.dynamic_rendezvous")
    module.pickle = types.SimpleNamespace(
        dumps=pickle.dumps,
        loads=lambda state: RendezvousState(io.BytesIO(state)).load(),
        PickleError=pickle.PickleError,
    )


def launch(name: str, nodes: Nodes, processes: int, *arguments: Any) -> int:
    """Run `train(*arguments)` in each process of this node; restart all from the last checkpoint when one dies.

    Returns the exit code on which all ranks agree. Raises Refusal if processes died more often than `nodes.restarts`.
    """
    own = agree_on_address(nodes) if nodes.count > 1 else "127.0.0.1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    # One warns that it installs no signal handlers, which we do; the other that node 0 exited first.
    for name_of_logger in "multiprocessing.api", "rendezvous.dynamic_rendezvous":
        logging.getLogger(f"torch.distributed.elastic.{name_of_logger}").setLevel(logging.ERROR)
    # torch 2.6 keeps one store across restarts, where restarted processes find the addresses of dead ones.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    do_without_libuv()
    refuse_code_in_the_rendezvous()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=processes,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint=nodes.rendezvous or "127.0.0.1:0",
        rdzv_configs={"is_host": nodes.rank == 0, "join_timeout": JOIN_SECONDS},
        local_addr=own,
        max_restarts=nodes.restarts,
        monitor_interval=1,
        start_method="spawn",
    )
    results: dict[int, int] = {}
    problems: list[Exception] = []

    def agent() -> None:
        # The processes inherit the mask: SIGTERM stays pending until they can handle it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            results.update(elastic_launch(config, worker)(os.getpid(), *arguments))
        except Exception as error:
            problems.append(error)

    def hand_on(number: int, _: Any) -> None:
        children = multiprocessing.active_children()
        if not children:
            raise Refusal("stopped while waiting for the other nodes: nothing to save", STOPPED)
        for child in children:
            child.terminate()

    before = {each: signal.signal(each, hand_on) for each in (signal.SIGTERM, signal.SIGINT)}
    thread = threading.Thread(target=agent, name="torchrun", daemon=True)
    thread.start()
    thread.join()
    for each, handler in before.items():
        signal.signal(each, handler)
    if not problems:
        return next(iter(results.values()))
    if isinstance(problems[0], ChildFailedError):
        rank, failure = problems[0].get_first_failure()
        raise Refusal(
            f"a process of this node died more than {nodes.restarts} times, the last of rank {rank} with exit code "
            f"{failure.exitcode}: its error is above; the checkpoints are intact, run the same command to resume",
            FAILED,
        )
    raise Refusal(
        f"torchrun failed: {type(problems[0]).__name__}: {problems[0]}; is node 0 up, and {nodes.rendezvous or 'loopback'} "
        "reachable? Run the same command to resume",
        FAILED,
    )


def worker(agent: int, *arguments: Any) -> int:
    """The entry point of each process; `agent` is the process id of torchrun's agent."""
    do_without_libuv()
    from llmtrain.run.train import train

    code = train(*arguments)
    for each in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # everything is saved; at exit Python would restore the handlers that terminate
        signal.signal(each, signal.SIG_IGN)
    if os.getppid() != agent:  # the agent was killed: torch would wait forever for it to read the result
        os._exit(code)
    return code
