"""The questions that are asked of each service, as checks of module role_checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

EXPOSURE = 15  # tenths, as `systemd-analyze security --threshold` takes it
NO_CAPABILITIES = "0" * 16


def with_service_checks(
    checks: list[dict[str, Any]], exposure: str = "", restrictions: str = ""
) -> list[dict[str, Any]]:
    """The checks, each entry with `service` replaced by its questions (roles/_common/meta/argument_specs.yml).

    `exposure` and `restrictions` are the shell programs that ask for a unit's exposure and a process' restrictions.
    """
    expanded_checks: list[dict[str, Any]] = []
    for check in checks:
        expanded_checks += questions(check, exposure, restrictions) if "service" in check else [check]
    return expanded_checks


def questions(service: dict[str, Any], exposure: str, restrictions: str) -> list[dict[str, Any]]:
    """What is asked of one service. Its ids begin with its name, which is its role's, or ROLE.PART."""
    name, subject, units = service["service"], service["title"], service["units"]
    prefix = name + ("_" if "." in name else ".")
    checks: list[dict[str, Any]] = [
        {
            "id": "runs",
            "title": f"Each unit of {subject} is active",
            "argv": ["systemctl", "is-active", *units],
            "stdout": "\n".join(["active"] * len(units)),
        },
        {
            "id": "returns_after_a_reboot",
            "title": f"Each unit of {subject} is enabled at boot",
            "argv": ["systemctl", "is-enabled", *units],
            "stdout": "\n".join(["enabled"] * len(units)),
        },
    ]
    if memory := service.get("memory"):
        checks.append(
            {
                "id": "memory_is_bounded",
                "title": f"The memory of {subject} is bounded as declared",
                "limit": "MemoryMax",
                "units": memory if isinstance(memory, dict) else dict.fromkeys(units, memory),
            }
        )
    if filtered := service.get("filtered", units):
        checks.append(
            {
                "id": "addresses_are_filtered",
                "title": f"The addresses of {subject} are filtered",
                "limit": "IPAddressDeny",
                "units": dict.fromkeys(filtered, "any"),
            }
        )
    if tenths := service.get("exposure", EXPOSURE):
        limits = tenths if isinstance(tenths, dict) else dict.fromkeys(units, tenths)
        checks.append(
            {
                "id": "units_are_hardened",
                "title": f"Each unit of {subject} is hardened",
                "argv": [
                    "sh",
                    "-c",
                    exposure,
                    "check",
                    *(f"{unit}={limit}" for unit, limit in limits.items()),
                ],
            }
        )
    capabilities = service.get("capabilities", NO_CAPABILITIES)
    masks = capabilities if isinstance(capabilities, dict) else dict.fromkeys(units, capabilities)
    checks.append(
        {
            "id": "restrictions_hold",
            "title": f"Capabilities, no_new_privs and seccomp of {subject} hold",
            "argv": ["sh", "-c", restrictions, "check", *masks],
            "stdout": "\n".join(f"CapBnd: {mask} NoNewPrivs: 1 Seccomp: 2" for mask in masks.values()),
        }
    )
    return [{**check, "id": prefix + check["id"]} for check in checks]


class FilterModule:
    """What Ansible asks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"with_service_checks": with_service_checks}
