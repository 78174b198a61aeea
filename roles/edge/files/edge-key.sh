#!/bin/sh
# edge-key ready: before nginx starts. Exit 1 where the PIN must not be shown to the token; each worker would show it.
# edge-key watch: asks the edge for its certificate every EDGE_WATCH_SECONDS. What a worker of nginx had of the HSM is lost for good when the HSM
# goes away, so when the edge does not answer and the HSM does, nginx gets new workers; connections that are open stay open.
# Its settings come by the units: EDGE_* of edge-key.env, OPENSSL_CONF and, where a relay leads to the HSM, P11_KIT_SERVER_ADDRESS.
umask 007
refused=/var/lib/llmkeep-edge/pin-refused

# 0: the key can be used. 1: the HSM or the way to it is away. 2: the PIN must not be shown. One login at most.
look() {
  shown=$(timeout 10 p11-kit list-tokens --provider "$EDGE_HSM_MODULE" "$EDGE_TOKEN_URI" 2>&1)
  case $shown in
    *'token: '*) ;;
    *) echo "the HSM shows no token $EDGE_TOKEN, so no handshake can be signed; see docs/operate/hsm.md, absent. $shown"; return 1 ;;
  esac
  sealed=$(sha256sum < "$CREDENTIALS_DIRECTORY/$EDGE_CREDENTIAL-sealed")
  if [ "$sealed" = "$(cat "$refused" 2> /dev/null)" ]; then
    echo "the token $EDGE_TOKEN refused this PIN before, and is not shown it again; see docs/operate/hsm.md, pin_wrong"
    return 2
  fi
  if flags=$(echo "$shown" | grep -oE 'user-pin-(count-low|final-try|locked|to-be-changed)'); then
    echo "the token $EDGE_TOKEN says $(echo "$flags" | paste --serial --delimiters ' ') so no login was tried; see docs/operate/hsm.md, pin_held_back"
    return 2
  fi
  length=$(wc -c < "$CREDENTIALS_DIRECTORY/$EDGE_CREDENTIAL")
  if [ "$length" -gt 31 ]; then  # the provider cuts the rest off, and the token would count a wrong login
    echo "the PIN has $length characters and OpenSSL's provider reads 31, so no login was tried; set a shorter one at the HSM and seal it"
    return 2
  fi
  said=$(timeout 10 openssl pkey -in "$EDGE_KEY" -pubout -out /dev/null 2>&1 < /dev/null) && return 0
  case $said in
    *'Enter PIN for '*)  # the provider asks a person once the PIN that it was given is refused
      echo "$sealed" > "$refused"
      sync "$refused"
      echo "the token $EDGE_TOKEN does not take the PIN, which was tried once; see docs/operate/hsm.md, pin_wrong"
      return 2 ;;
  esac
  echo "the key $EDGE_KEY_LABEL of the token $EDGE_TOKEN cannot be used; see docs/operate/hsm.md. $said"
  return 1
}

fingerprint() { openssl x509 -noout -fingerprint -sha256 2> /dev/null; }

served() {
  seen=$(OPENSSL_CONF=/dev/null timeout 8 openssl s_client -connect "$EDGE_ADDRESS" -servername "$EDGE_NAME" -tls1_3 \
    -CAfile /etc/llmkeep/pki/root.pem -verify_return_error -verify_hostname "$EDGE_NAME" < /dev/null 2> /dev/null | fingerprint)
  [ -n "$seen" ] && [ "$seen" = "$(fingerprint < "$EDGE_CERTIFICATE")" ]
}

case $1 in
  ready)
    look
    [ $? -ne 2 ] ;;
  watch)
    while sleep "$EDGE_WATCH_SECONDS"; do
      if served || ! systemctl --quiet is-active nginx.service; then continue; fi
      look
      case $? in
        0) echo "the edge did not show its certificate and the HSM answers: nginx takes the key anew"
           systemctl reload nginx.service ;;
        # A worker that waits for an answer gets its error.
        1) [ -z "$P11_KIT_SERVER_ADDRESS" ] || systemctl try-restart llmkeep-edge-hsm.service ;;
        2) sleep 60 ;;
      esac
    done ;;
esac
