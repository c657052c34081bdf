#!/bin/sh
# Three layers of privilege, without root: a user, a job of theirs, and a helper that the job does not trust.
# Each may do less than the one that started it, and none can take more for itself.
#
#   sh examples/capcon/layers.sh
#
# Needs capcon in PATH and a kernel with Landlock. Any user will do.
set -eu

script=$(realpath "$0")
layer=${1:-user}

try() { # FOLDER: may this layer write there?
	if (echo "$layer" >"$1/file") 2>/dev/null; then answer=yes; else answer=no; fi
	printf '%-8s writes to %-12s %s\n' "$layer" "$1" "$answer"
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
	# Asking for more than one has gives nothing.
	capcon run --no-new-privs --read-only / --write / -- sh "$script" greedy
	;;
esac
