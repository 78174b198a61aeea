#!/bin/sh
# The PKCS#11 modules that p11-kit enables for this program, a line each.
p11-kit list-modules | sed -n 's/^module: //p'
