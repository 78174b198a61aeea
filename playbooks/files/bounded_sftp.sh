#!/bin/sh
# bounded_sftp.sh WORD...: `sftp WORD...`, killed where a file that it writes here gets longer than LLMKEEP_SFTP_BYTES (1 GiB).
exec prlimit --core=0 --fsize="${LLMKEEP_SFTP_BYTES:-1073741824}" sftp "$@"
