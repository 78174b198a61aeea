"""Units as files with their properties, which stand-ins for systemctl show."""

from pathlib import Path


def unit(
    folder: Path, name: str, active: str = "active", enabled: str = "enabled", reread: str = "no"
) -> None:
    (folder / name).write_text(
        f"Id={name}\nLoadState=loaded\nActiveState={active}\nUnitFileState={enabled}\nNeedDaemonReload={reread}\n"
    )
