"""Throw-away hosts on this machine, which reboot, lose power and have their cables cut.

`inventory.py` reads which hosts there are, `machine.py` says what every host can do; `container.py` and `user_mode.py` are
the two kinds of them, `image.py` and `kernel.py` make what those start from. `network.py` is the namespace without an
uplink, `sink.py` the gateway that answers nothing and records everything, `instance.py` all hosts together, `forward.py` a
port of 127.0.0.1 to the edge, `demo.py` the hands of an operator, `steps.py` what a person is told meanwhile. `cli.py` says
what can be asked of it, and with which exit codes.
"""
