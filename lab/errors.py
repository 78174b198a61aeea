"""What the lab refuses, each with an exit code that is written down in `lab --help`."""


class LabError(Exception):
    """Something went wrong that the message explains: what is wrong, the value seen, what to do."""

    exit_code = 1


class NotRoot(LabError):
    """Namespaces, taps and file systems with foreign owners need root."""

    exit_code = 3


class MissingProgram(LabError):
    """A Debian package that the lab stands on is not installed."""

    exit_code = 4


class NoMemory(LabError):
    """The hosts would not fit into the memory that is free."""

    exit_code = 5


class NoSpace(LabError):
    """The disks would not fit into the space that is free."""

    exit_code = 6


class AlreadyUp(LabError):
    """Every host runs already."""

    exit_code = 7


class NotUp(LabError):
    """The lab, or the host that was named, does not run."""

    exit_code = 8


class BadInventory(LabError):
    """The inventory describes no lab that could be built."""

    exit_code = 9


class Busy(LabError):
    """Another `lab` command is changing the same instance."""

    exit_code = 10


class Unsupported(LabError):
    """This machine lacks what a host of that kind stands on."""

    exit_code = 11
