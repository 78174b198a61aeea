#!/bin/sh
# Both nginx of this host read their configurations: the edge's and the one of what the estate sees.
nginx -t -q && nginx -t -q -c /etc/nginx/inside.conf
