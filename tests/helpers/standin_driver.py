"""The kernel module of ten lines that stands in for NVIDIA's driver, as dkms packages it."""

# Of a kernel without CONFIG_MODULE_SIG_HASH, for which dkms signs nothing and makes no key: it compiles, and links nothing.
HEADERS_MAKEFILE = "modules:\n\tgcc-14 -std=gnu17 -ffreestanding -c $(M)/standin.c -o $(M)/standin.ko\n"


def source(version: str) -> str:
    """Its code, for real headers."""
    return f"""#include <linux/module.h>
static int __init standin_start(void) {{ return 0; }}
static void __exit standin_end(void) {{ }}
module_init(standin_start);
module_exit(standin_end);
MODULE_LICENSE("GPL");
MODULE_VERSION("{version}");
"""


def dkms_conf(version: str) -> str:
    """Its dkms.conf."""
    return f"""PACKAGE_NAME="standin"
PACKAGE_VERSION="{version}"
BUILT_MODULE_NAME[0]="standin"
DEST_MODULE_LOCATION[0]="/updates/dkms"
MAKE[0]="make -C $kernel_source_dir M=$dkms_tree/standin/{version}/build modules"
"""
