#!/bin/sh
# served-tokens.sh SOCKET PROVIDER: the sorted names of the tokens served at SOCKET, as softhsm-tls, which may open it, sees them.
P11_KIT_SERVER_ADDRESS="unix:path=$1" setpriv --reuid=softhsm-tls --regid=softhsm --clear-groups \
  p11-kit list-tokens --provider "$2" pkcs11: | sed -n 's/^token: //p' | sort
