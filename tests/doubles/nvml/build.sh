#!/bin/sh
# build.sh FOLDER: compiles the stand-ins into it, for LD_LIBRARY_PATH; the fabric manager's lies beside them.
set -eu
cd "$(dirname "$0")"
build() {
	library=$1
	shift
	gcc-14 -Wall -Wextra -O1 -fPIC -shared "-Wl,-soname,$library" -Wl,-Bsymbolic -o "$folder/$library" "$@" -lpthread
}
folder=$1
build libnvidia-ml.so.1 -fvisibility=hidden mocknvml.c stubs.c
build libcuda.so.1 mockcuda.c
cp fabric-manager "$folder"
