"""Disposable hosts on this machine that can be rebooted, powered off and disconnected.

`inventory.py` reads the hosts, `machine.py` is the interface of a host, `container.py` and `user_mode.py` are its two kinds,
and `image.py` and `kernel.py` build the images they start from. `network.py` is the namespace without an uplink, `sink.py`
the gateway that answers nothing and records everything, `instance.py` all hosts together, `forward.py` a port of 127.0.0.1
to the edge, `demo.py` the operator's steps, `steps.py` the progress output. `cli.py` has the commands and their exit codes.
"""
