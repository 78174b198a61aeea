"""GPU hosts: cards, driver builds, signatures of kernel modules, and which kernel boots next."""
