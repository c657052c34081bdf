#!/bin/sh
# Limit one program after the other, each with one line. Run as root: examples/command/held-down.sh
set -u
RCON=${RCON:-rcon}

echo "== an endless loop, limited to 20 % of a CPU for two seconds"
$RCON run --cpu 20% --timeout 2s --json - -- sh -c 'while :; do :; done' | grep cpu_seconds

echo "== an endless loop that saves its work when its time is over"
$RCON run --timeout 1s --grace 5s -- sh -c 'trap "echo saved; exit" TERM; while :; do sleep 0.1; done'

echo "== a program that needs more memory than its limit"
$RCON run --memory 32M --swap 0 -- dd if=/dev/zero of=/dev/null bs=200M count=1 status=none
echo "exit status $?"

echo "== the same with a limit that expands"
$RCON run --memory 32M --expand 2x --up-to 1G -- dd if=/dev/zero of=/dev/null bs=60M count=1 status=none &&
    echo "it finished"

echo "== two programs that need more than their shared limit together"
share="$RCON run --in held-down-$$ --memory 64M --swap 0 --"
$share sh -c "dd if=/dev/zero bs=1M count=40 status=none >/dev/shm/held-down-$$; sleep 3" &
sleep 2
$share dd if=/dev/zero of=/dev/null bs=40M count=1 status=none
echo "status $? of the second"
wait
rm /dev/shm/held-down-$$

echo "== a process that already runs: limit it, then release it"
sh -c 'while :; do :; done' &
pid=$!
$RCON attach --cpu 10% --group loop-$pid $pid
grep -q attached/loop-$pid /proc/$pid/cgroup && echo "in its group"
$RCON attach --release loop-$pid
grep attached/ /proc/$pid/cgroup || echo "back where it was"
kill $pid
