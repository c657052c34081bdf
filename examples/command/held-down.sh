#!/bin/sh
# One heavy program after the other, each held down by one line. As root: examples/command/held-down.sh
set -u
RCON=${RCON:-rcon}

echo "== a loop that would take a whole CPU, for two seconds at 20 % of one"
$RCON run --cpu 20% --timeout 2s --json - -- sh -c 'while :; do :; done' | grep cpu_seconds

echo "== a program that takes more memory than it may"
$RCON run --memory 32M --swap 0 -- sh -c 'x=$(head -c 200M /dev/zero | tr "\0" x)'
echo "exit status $?"

echo "== the same, with a limit that grows"
$RCON run --memory 32M --expand 2x --up-to 1G -- sh -c 'x=$(head -c 60M /dev/zero | tr "\0" x); echo "${#x} bytes"'

echo "== a process that runs already, held down and let go"
sh -c 'while :; do :; done' &
pid=$!
$RCON attach --cpu 10% --group example-loop $pid
grep -c taken/example-loop /proc/$pid/cgroup >/dev/null && echo "in its group"
$RCON attach --release example-loop
grep taken /proc/$pid/cgroup || echo "back where it was"
kill $pid
