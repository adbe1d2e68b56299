#!/bin/sh
# Calibrates this machine, shards models with the profile, and prints predicted beside measured times of their steps
# and of collectives measured anew.
#
#   bench/calibration.sh [--ranks N] [--dim DIM=N,...] MODEL.onnx...
#
# TPSHARD names the executable (default: tpshard). Nothing is left behind but what is printed; the profile itself is
# kept with PROFILE=FILE. No test runs this: times are no verdicts on a machine that does other work as well.
set -eu

tpshard=${TPSHARD:-tpshard}
ranks=2
dims=
while [ $# -gt 0 ]; do
    case $1 in
        --ranks) ranks=$2; shift 2 ;;
        --dim) dims=$2; shift 2 ;;
        --*) echo "unknown flag $1" >&2; exit 2 ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || { echo "usage: $0 [--ranks N] [--dim DIM=N,...] MODEL.onnx..." >&2; exit 2; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
profile=${PROFILE:-$scratch/profile.txt}
"$tpshard" calibrate --quiet --ranks "$ranks" -o "$profile" > "$scratch/table.txt"
sed -n '1,5p' "$scratch/table.txt"

number=0
for model in "$@"; do
    number=$((number + 1))
    folder=$scratch/$number-$(basename "$(dirname "$model")")
    # A model that lacks the dims is planned at its defaults.
    "$tpshard" shard "$model" --tp "$ranks" --profile "$profile" ${dims:+--dim "$dims"} -o "$folder" --quiet \
        > /dev/null 2>&1 ||
        "$tpshard" shard "$model" --tp "$ranks" --profile "$profile" -o "$folder" --quiet > /dev/null
done
"$tpshard" calibrate --profile "$profile" --against "$scratch"/[0-9]*-* | sed "s|$scratch/||"
