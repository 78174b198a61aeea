"""JSON between ranks. torch's own collectives of objects unpickle what a peer sends, which runs its code here."""

import json
import sys
from collections.abc import Callable
from typing import Any

from llmtrain.exits import Refusal

MOST = 64 << 20  # bytes of a rank's value


def process_group() -> Any:
    """torch.distributed if it is initialized, else None. A process that has not imported it cannot have initialized it."""
    distributed = sys.modules.get("torch.distributed")
    return (
        distributed if distributed and distributed.is_available() and distributed.is_initialized() else None
    )


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, by rank, after a round trip through JSON: tuples are lists. All ranks call it; without a
    process group, there is one rank. Raises ValueError for more than MOST bytes, and if a peer's bytes are not JSON."""
    content = json.dumps(value).encode()
    group = process_group()
    if group is None:
        return [json.loads(content)]
    import torch

    device = torch.device("cuda", torch.cuda.current_device()) if group.get_backend() == "nccl" else "cpu"
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(group.get_world_size())]
    group.all_gather(sizes, torch.tensor([len(content)], device=device))
    lengths = [int(size) for size in sizes]
    for rank, length in enumerate(lengths):
        if not 0 < length <= MOST:
            raise ValueError(
                f"rank {rank} announces {length} bytes, but at most {MOST} are accepted: check its host"
            )
    longest = max(lengths)
    mine = torch.frombuffer(bytearray(content.ljust(longest)), dtype=torch.uint8).to(device)
    parts = [torch.empty_like(mine) for _ in lengths]
    group.all_gather(parts, mine)
    values = []
    for rank, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        try:
            values.append(json.loads(part[:length].cpu().numpy().tobytes()))
        except ValueError as error:
            raise ValueError(f"rank {rank} sent invalid JSON ({error}): check its host") from None
    return values


def together[T](work: Callable[[], T]) -> T:
    """Do `work` on each rank. If one raises Refusal, all do, so that no rank waits for it."""
    problem: tuple[str, int] | None = None
    value: Any = None
    try:
        value = work()
    except Refusal as refusal:
        problem = str(refusal), refusal.code
    for each in gathered(problem):
        if each:
            raise Refusal(*each)
    return value  # type: ignore[no-any-return]
