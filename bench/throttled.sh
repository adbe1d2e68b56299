#!/bin/sh
# A rank that loads slowly is no false alarm: starts a folder many times, each time with one rank whose weights come slower
# than the others wait for a rank that does nothing, and counts the starts that fail.
#
#   bench/throttled.sh [--starts N] [--rank R] [--slow S] [--timeout S] [--by disk|pulse] FOLDER [FLAG...]
#
#   --starts N    how often (default 100)
#   --rank R      the slow one (default 1)
#   --slow S      seconds that its weights take (default 8)
#   --timeout S   seconds after which a rank that does nothing is given up (default 2)
#   --by disk     what it reads from the disk is throttled by a control group, and its weights are put out of the page
#                 cache before: only for root, and with weights of many times what the disk reads ahead
#   --by pulse    it is stopped but for a moment of every tenth of a second (default: disk where that can be done)
#
# The other flags are those of a rank program, such as --inputs FILE. Ranks are started by hand, so that nothing else keeps
# them waiting. A start fails if any rank ends with another code than zero, or if the outputs differ from those of the first
# start. Prints a line for each start that fails and one for all, with the starts that took longer than the timeout, as they
# should. Ends with 1 if any failed.
set -eu

starts=100
slow_rank=1
slow=8
timeout=2
by=
while [ $# -gt 0 ]; do
    case $1 in
        --starts) starts=$2; shift 2 ;;
        --rank) slow_rank=$2; shift 2 ;;
        --slow) slow=$2; shift 2 ;;
        --timeout) timeout=$2; shift 2 ;;
        --by) by=$2; shift 2 ;;
        --*) echo "unknown flag $1" >&2; exit 2 ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || { echo "usage: $0 [--starts N] [--rank R] [--slow S] [--timeout S] [--by disk|pulse] FOLDER [FLAG...]" >&2; exit 2; }
folder=$1
shift
ranks=0
while [ -x "$folder/rank$ranks" ]; do ranks=$((ranks + 1)); done
weights=$folder/rank$slow_rank.safetensors
[ "$ranks" -gt 1 ] && [ -f "$weights" ] || { echo "$folder: no ranks, or no weights of rank $slow_rank" >&2; exit 2; }

scratch=$(mktemp -d)
group=/sys/fs/cgroup/blkio/tpshard-throttled-$$
limit=blkio.throttle.read_bps_device
if [ -f /sys/fs/cgroup/cgroup.controllers ]; then
    group=/sys/fs/cgroup/tpshard-throttled-$$
    limit=io.max
fi
trap 'rm -rf "$scratch"; [ ! -d "$group" ] || rmdir "$group"' EXIT

# A control group in which the weights take as long as they should; false if there can be none.
throttle() {
    bytes=$(stat -c %s "$weights")
    device=$(stat -c %d "$weights")
    device=$((device >> 8 & 4095)):$((device & 255))
    mkdir "$group" 2> /dev/null || return 1
    rate=$((bytes / slow + 1))
    [ $limit = io.max ] && rate="rbps=$rate"
    { echo "$device $rate" > "$group/$limit"; } 2> /dev/null
}
case $by in
    pulse) ;;
    disk) throttle || { echo "$group: no control group can be made there" >&2; exit 2; } ;;
    '') if throttle; then by=disk; else by=pulse; fi ;;
    *) echo "--by $by: disk or pulse" >&2; exit 2 ;;
esac

alive() {
    kill -0 "$1" 2> /dev/null && ! grep -q ') Z ' "/proc/$1/stat" 2> /dev/null
}

# Lets a process do next to nothing, from when it has met the others until its time is over. Everything is looked at while
# it is stopped; it goes on only for as long as the shell takes from one line to the next.
pulse() {
    end=
    while kill -STOP "$1" 2> /dev/null && alive "$1"; do
        pause=0
        if [ -n "$end" ]; then
            sleep 0.1
            [ "$(date +%s)" -lt "$end" ] || break
        elif grep -q memfd:tpshard "/proc/$1/maps" 2> /dev/null; then
            end=$(($(date +%s) + slow))
        else
            pause=0.003
        fi
        kill -CONT "$1" 2> /dev/null || break
        [ $pause = 0 ] || sleep $pause
    done
    kill -CONT "$1" 2> /dev/null || true
}

# start NUMBER FLAG...: one start; what is wrong with it is said.
start() {
    number=$1
    shift
    [ $by = pulse ] || dd if="$weights" iflag=nocache count=0 2> /dev/null
    pids=
    rank=0
    while [ "$rank" -lt "$ranks" ]; do
        (
            [ $by = disk ] && [ "$rank" = "$slow_rank" ] && sh -c 'echo "$PPID"' > "$group/cgroup.procs"
            export RANK="$rank" LOCAL_RANK="$rank" WORLD_SIZE="$ranks" LOCAL_WORLD_SIZE="$ranks"
            export MASTER_ADDR=localhost MASTER_PORT="$((20000 + ($$ + number) % 20000))" TPSHARD_TIMEOUT="$timeout"
            exec "$folder/rank$rank" --outputs "$scratch/got.npz" "$@" > /dev/null 2> "$scratch/error$rank.txt"
        ) &
        pids="$pids $!"
        [ "$rank" != "$slow_rank" ] || slow_pid=$!
        rank=$((rank + 1))
    done
    began=$(date +%s)
    [ $by = disk ] || pulse "$slow_pid"
    wrong=
    rank=0
    for pid in $pids; do
        wait "$pid" || wrong="$wrong rank $rank ended with $?: $(grep -m 1 error "$scratch/error$rank.txt" || true);"
        rank=$((rank + 1))
    done
    took=$(($(date +%s) - began))
    if [ -z "$wrong" ]; then
        hash=$(cksum < "$scratch/got.npz")
        [ "${expected:=$hash}" = "$hash" ] || wrong="the outputs are not those of the first start"
        [ "$took" -le "$timeout" ] || longer=$((longer + 1))
    fi
    rm -f "$scratch/got.npz"
    [ -z "$wrong" ] || { echo "start $number: $wrong"; return 1; }
}

failed=0
longer=0
number=1
while [ "$number" -le "$starts" ]; do
    start "$number" "$@" || failed=$((failed + 1))
    number=$((number + 1))
done
echo "$starts starts of $ranks ranks, rank $slow_rank slow by $by: $failed failed, $longer took longer than $timeout s"
[ "$failed" -eq 0 ]
