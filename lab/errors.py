"""Errors of the lab, each with an exit code that `lab --help` documents."""


class LabError(Exception):
    """An error with a message for a person: what is wrong, the value seen, what to do."""

    exit_code = 1


class NotRoot(LabError):
    """Namespaces, taps and file systems with other owners need root."""

    exit_code = 3


class MissingProgram(LabError):
    """A Debian package that the lab requires is not installed."""

    exit_code = 4


class NoMemory(LabError):
    """The hosts need more memory than is available."""

    exit_code = 5


class NoSpace(LabError):
    """The disks need more space than is available."""

    exit_code = 6


class AlreadyUp(LabError):
    """Every host is running already."""

    exit_code = 7


class NotUp(LabError):
    """The lab, or the named host, is not running."""

    exit_code = 8


class BadInventory(LabError):
    """The inventory describes no valid lab."""

    exit_code = 9


class Busy(LabError):
    """Another `lab` command is changing the same instance."""

    exit_code = 10


class Unsupported(LabError):
    """This machine cannot run a host of that kind."""

    exit_code = 11
