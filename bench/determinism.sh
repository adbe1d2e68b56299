#!/bin/sh
# Outputs at `--determinism tp` have the same bits for every number of ranks: shards every model of a folder for 1, 2, 3, 4
# and 8 ranks, runs it, and prints one line per model and input with the hash of the outputs.
#
#   bench/determinism.sh FOLDER > hashes.txt        # FOLDER/*/model.onnx, with inputs.npz and inputs_alt.npz beside it
#   bench/determinism.sh FOLDER | diff - bench/determinism.txt
#
# A model whose outputs differ between numbers of ranks gets a line with DIFFERENT instead, and the script ends with 1.
# TPSHARD names the executable (default: tpshard).
set -eu

tpshard=${TPSHARD:-tpshard}
[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
status=0
for model in "$1"/*/model.onnx; do
    folder=$(dirname "$model")
    name=$(basename "$folder")
    for ranks in 1 2 3 4 8; do
        "$tpshard" shard "$model" --tp $ranks --determinism tp -o "$scratch/out" --quiet > /dev/null 2> "$scratch/log.txt" ||
            { cat "$scratch/log.txt" >&2; exit 1; }
        for inputs in "$folder"/inputs.npz "$folder"/inputs_alt.npz; do
            [ -f "$inputs" ] || continue
            "$tpshard" run "$scratch/out" --inputs "$inputs" --outputs "$scratch/got.npz" --quiet > /dev/null \
                2> "$scratch/log.txt" || { cat "$scratch/log.txt" >&2; exit 1; }
            hash=$(sha256sum < "$scratch/got.npz" | cut -c1-16)
            rm -f "$scratch/got.npz"
            echo "$hash" >> "$scratch/$(basename "$inputs" .npz)"
        done
        rm -rf "$scratch/out"
    done
    for hashes in "$scratch"/inputs "$scratch"/inputs_alt; do
        [ -f "$hashes" ] || continue
        case $(sort -u "$hashes" | wc -l) in
            1) echo "$name $(basename "$hashes") $(head -1 "$hashes")" ;;
            *) echo "$name $(basename "$hashes") DIFFERENT"; status=1 ;;
        esac
        rm -f "$hashes"
    done
done
exit $status
