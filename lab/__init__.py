"""Throw-away hosts on this machine: real Linux kernels that reboot, lose power and have their cables cut.

`inventory.py` reads which hosts there are, `image.py` makes the bare Debian they start from, `network.py` the
namespace without an uplink, `sink.py` the gateway that answers nothing and records everything, `host.py` one
machine, `instance.py` all of them together, `forward.py` a port of 127.0.0.1 to the edge, `demo.py` the hands
of an operator. `cli.py` says what can be asked of it, and with which exit codes.
"""
