#!/bin/sh
# Three layers of rights, without root: a user, a job of that user, and a helper that the job does not trust.
# Each layer has fewer rights than the layer that started it, and none can gain more.
#
#   sh examples/capcon/layers.sh
#
# Needs capcon in PATH and a kernel with Landlock. Any user can run it.
set -eu

script=$(realpath "$0")
layer=${1:-user}

try() { # FOLDER: print whether this layer may write there
	if (echo "$layer" >"$1/file") 2>/dev/null; then result=yes; else result=no; fi
	printf '%-8s writes to %-12s %s\n' "$layer" "$1" "$result"
}

if [ "$layer" = user ]; then
	folder=$(mktemp -d)
	trap 'rm -r "$folder"' EXIT
	cd "$folder"
	mkdir -p job/scratch
fi

try .
try job
try job/scratch

case $layer in
user)
	capcon run --drop-all --no-new-privs --read-only / --write job -- sh "$script" job
	;;
job)
	capcon run --no-new-privs --read-only / --write job/scratch -- sh "$script" helper
	# Requesting more than the layer has gives nothing.
	capcon run --no-new-privs --read-only / --write / -- sh "$script" greedy
	;;
esac
