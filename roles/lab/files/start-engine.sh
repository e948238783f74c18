#!/bin/bash
# Starts a Docker engine on this machine and waits until it answers, with systemd or without.
set -euo pipefail

if [ -d /run/systemd/system ]; then
  systemctl enable --now docker
else
  # A killed engine leaves its pid file, and perhaps its containerd, behind.
  if [ -f /run/docker.pid ] && ! grep -qs dockerd "/proc/$(cat /run/docker.pid)/comm"; then
    rm -f /run/docker.pid
  fi
  setsid nohup dockerd >/var/log/dockerd.log 2>&1 </dev/null &
fi

for _ in $(seq 120); do
  docker version >/dev/null 2>&1 && exit 0
  sleep 0.5
done
echo "The Docker engine does not answer after 60 s: see /var/log/dockerd.log or 'journalctl -u docker'." >&2
exit 1
