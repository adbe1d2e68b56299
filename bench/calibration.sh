#!/bin/sh
# How honest the cost model is on this machine: calibrates it, shards models with the profile, measures what was built,
# and prints four tables:
#
#   1. collectives and steps, predicted beside measured, and how many are within 25 %;
#   2. for every model the plan that was chosen for two ranks beside plans that were forced by pins at random;
#   3. for every model and number of ranks whether sharding pays, as predicted and as measured;
#   4. for every model the number of ranks that is best, as predicted and as measured.
#
#   bench/calibration.sh [--forced N] [--ranks LIST] [--seed N] MODEL.onnx[@DIM=N,...]...
#
#   --forced N    forced plans of every model (default 0); weights and layouts are drawn from --seed (default 1)
#   --ranks LIST  numbers of ranks (default 1,2); the largest is what is calibrated for
#
# All numbers of ranks use the whole machine: one rank runs with all cores, several share them, and on a machine with
# fewer cores than ranks they take turns. A model that lacks the dims behind @ is planned at its defaults.
#
# TPSHARD names the executable (default: tpshard). PROFILE=FILE keeps the profile, or takes it if it is there already.
# MEASURED=FILE keeps the raw samples. BEFORE and AFTER are commands around what has to run undisturbed. No test runs
# this: times are no verdicts on a machine that does other work as well.
set -eu

tpshard=${TPSHARD:-tpshard}
ranks=1,2
forced=0
seed=1
while [ $# -gt 0 ]; do
    case $1 in
        --ranks) ranks=$2; shift 2 ;;
        --forced) forced=$2; shift 2 ;;
        --seed) seed=$2; shift 2 ;;
        --*) echo "unknown flag $1" >&2; exit 2 ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || { echo "usage: $0 [--forced N] [--ranks LIST] [--seed N] MODEL.onnx[@DIM=N,...]..." >&2; exit 2; }
most=$(echo "$ranks" | tr , '\n' | sort -n | tail -1)
[ "$most" -ge 2 ] || { echo "--ranks: nothing is shared by one rank" >&2; exit 2; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
undisturbed() {
    ${BEFORE:-true}
    "$@" || { ${AFTER:-true}; return 1; }
    ${AFTER:-true}
}

profile=${PROFILE:-$scratch/profile.txt}
if [ ! -s "$profile" ]; then
    undisturbed "$tpshard" calibrate --quiet --ranks "$most" -o "$profile" > "$scratch/table.txt"
    sed -n '1,5p' "$scratch/table.txt"
fi

# shard FOLDER RANKS MODEL DIMS PINS
shard() {
    pin=${5:+--pin "$5"}
    # shellcheck disable=SC2086  # $pin is two words or none.
    "$tpshard" shard "$3" --tp "$2" --profile "$profile" --memory free ${4:+--dim "$4"} $pin -o "$1" --quiet \
        > /dev/null 2> "$scratch/error.txt"
}

# What distinguishes plans: where weights lie and what is exchanged.
plan_of() {
    sed -n '/^weights and state/,$p' "$1/plan.txt" | cksum
}

for model in "$@"; do
    file=${model%%@*}
    dims=
    case $model in *@*) dims=${model#*@} ;; esac
    name=$(basename "$(dirname "$file")")
    mkdir -p "$scratch/$name"
    for count in $(echo "$ranks" | tr , ' '); do
        shard "$scratch/$name/$count-chosen" "$count" "$file" "$dims" "" || {
            dims=
            shard "$scratch/$name/$count-chosen" "$count" "$file" "" "" || { cat "$scratch/error.txt" >&2; exit 1; }
        }
    done
    [ "$forced" -gt 0 ] || continue
    [ -d "$scratch/$name/2-chosen" ] || shard "$scratch/$name/2-chosen" 2 "$file" "$dims" ""
    # Names of the weights with at least two dims, as the file of all ranks' weights has them.
    grep -ao 'init(\\*"[^"\\]*\\*", f32, \[[0-9]*, [0-9, ]*\])' "$scratch/$name/1-chosen/rank0.safetensors" |
        sed 's/^init(\\*"//; s/\\*", f32.*//' | sort -u > "$scratch/weights.txt"
    plan_of "$scratch/$name/2-chosen" > "$scratch/plans.txt"
    made=0
    draw=0
    while [ "$made" -lt "$forced" ] && [ "$draw" -lt $((forced * 6)) ]; do
        draw=$((draw + 1))
        # From one pin on a few weights to one on all.
        awk -v seed=$((seed * 1000 + draw)) '
            BEGIN { srand(seed); rand(); share = rand() * rand(); split("R S(0) S(1)", layouts, " ") }
            { name[NR] = $0 }
            END {
                always = 1 + int(rand() * NR)
                for (i = 1; i <= NR; i++)
                    if (rand() < share || i == always) print "tensor " name[i] " = " layouts[1 + int(rand() * 3)]
            }' "$scratch/weights.txt" > "$scratch/pins.txt"
        folder=$scratch/$name/2-forced$draw
        shard "$folder" 2 "$file" "$dims" "$scratch/pins.txt" || continue
        plan=$(plan_of "$folder")
        if grep -qF "$plan" "$scratch/plans.txt"; then
            rm -rf "$folder"
        else
            echo "$plan" >> "$scratch/plans.txt"
            made=$((made + 1))
        fi
    done
done

# A few models at a time, so that those of one model are measured close to each other.
: > "$scratch/measured.txt"
for folder in "$scratch"/*/1-chosen "$scratch"/*/2-chosen; do
    [ -d "$folder" ] && dirname "$folder"
done | sort -u > "$scratch/models.txt"
measure() {
    while read -r folder; do
        "$tpshard" calibrate --quick --profile "$profile" --against "$folder"/*-* < /dev/null |
            sed "s|$scratch/||" | tee -a "$scratch/measured.txt" > "$scratch/last.txt"
    done < "$scratch/models.txt"
}
undisturbed measure
[ -z "${MEASURED:-}" ] || cp "$scratch/measured.txt" "$MEASURED"
grep -E '^(collective|all|reduce|shm)' "$scratch/last.txt"
echo

awk '
    function within(x, y) { return y > 0 && x / y <= 1.25 && x / y >= 0.75 }
    # ranks, predicted, measured, noise, ratio, folder
    $6 ~ /-chosen$|-forced[0-9]+$/ {
        split($6, path, "/"); model = path[1]
        split(path[2], parts, "-"); count = parts[1]
        noise = $4; sub("%", "", noise); noise /= 100
        if (parts[2] == "chosen") {
            if (!(model in seen)) { seen[model] = 1; models[++n] = model }
            predicted[model, count] = $2; measured[model, count] = $3; spread[model, count] = noise
            if (!(count in counted)) { counted[count] = 1; counts[++m] = count }
        } else {
            forced[model]++
            close_forced += within($2, $3)
            all_forced++
            if (!(model in best) || $3 < best[model]) { best[model] = $3; best_noise[model] = noise }
        }
    }
    END {
        printf "%-28s%6s%14s%14s%7s%7s\n", "step of", "ranks", "predicted us", "measured us", "noise", "ratio"
        for (i = 1; i <= n; i++) for (j = 1; j <= m; j++) {
            p = predicted[models[i], counts[j]]; t = measured[models[i], counts[j]]
            printf "%-28s%6d%14.1f%14.1f%6.0f%%%7.2f%s\n", models[i], counts[j], p, t, 100 * spread[models[i], counts[j]], p / t, within(p, t) ? "" : "  *"
            all++; close_steps += within(p, t); of[counts[j]]++; near[counts[j]] += within(p, t)
        }
        printf "steps: %d of %d within 25 %%", close_steps, all
        for (j = 1; j <= m; j++) printf ", %d of %d on %d", near[counts[j]], of[counts[j]], counts[j]
        printf "\n"
        if (all_forced) {
            printf "steps of forced plans: %d of %d within 25 %%\n\n", close_forced, all_forced
            printf "%-28s%7s%13s%13s%11s\n", "two ranks", "forced", "chosen us", "best us", "ratio"
            for (i = 1; i <= n; i++) {
                t = measured[models[i], 2]; b = best[models[i]]
                if (!b) continue
                ratio = t / (b < t ? b : t); rows++
                ok = ratio <= 1.05
                tie = !ok && ratio <= 1.05 + spread[models[i], 2] + best_noise[models[i]]
                good += ok; ties += tie
                printf "%-28s%7d%13.1f%13.1f%11.3f%s\n", models[i], forced[models[i]], t, b, ratio, ok ? "" : tie ? "  within noise" : "  *"
            }
            printf "chosen: %d of %d within 5 %% of the best, %d more within noise\n", good, rows, ties
        }
        printf "\n%-28s%6s%18s%18s\n", "one rank or several", "ranks", "predicted", "measured"
        for (i = 1; i <= n; i++) for (j = 1; j <= m; j++) {
            if (counts[j] == 1) continue
            p = predicted[models[i], counts[j]] / predicted[models[i], 1]
            t = measured[models[i], counts[j]] / measured[models[i], 1]
            same = (p >= 1) == (t >= 1)
            gap = t > 1 ? t - 1 : 1 - t
            tie = !same && gap <= spread[models[i], counts[j]] + spread[models[i], 1]
            verdicts++; right += same; tied += tie
            printf "%-28s%6d%9.2f %8s%9.2f %8s%s\n", models[i], counts[j], p, (p >= 1 ? "no" : "shard"), t, (t >= 1 ? "no" : "shard"), same ? "" : tie ? "  tie" : "  *"
        }
        printf "verdicts: %d of %d right, %d more are ties within the noise of both\n", right, verdicts, tied
        printf "\n%-28s%18s%18s%12s\n", "best number of ranks", "predicted", "measured", "loss"
        for (i = 1; i <= n; i++) {
            bp = bm = counts[1]
            for (j = 1; j <= m; j++) {
                if (predicted[models[i], counts[j]] < predicted[models[i], bp]) bp = counts[j]
                if (measured[models[i], counts[j]] < measured[models[i], bm]) bm = counts[j]
            }
            hits += bp == bm
            printf "%-28s%18d%18d%11.1f%%\n", models[i], bp, bm, 100 * (measured[models[i], bp] / measured[models[i], bm] - 1)
        }
        printf "best numbers: %d of %d\n", hits, n
    }' "$scratch/measured.txt"
