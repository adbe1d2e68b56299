/* Decodes in a loop for a while: the outputs must stay the same to the bit, and the memory must not grow.
 *
 *     cargo build --release -p tpshard-capi
 *     cc -std=c11 -O1 -Icapi/include bench/soak.c -o target/soak -Ltarget/release -ltpshard
 *     LD_LIBRARY_PATH=target/release target/soak DIR SECONDS
 *
 * A round: slots of different lengths join one after another, step together, and leave in another order. Every round feeds
 * the same tokens, so that all logits of all rounds have one hash. After a tenth of the time the resident memory of the
 * process, in which all ranks run as threads, is taken; it may not be exceeded by more than 1 % and 1 MiB. Prints a line
 * every thirty seconds. Exit code 1 if outputs or memory drift.
 */
#define _POSIX_C_SOURCE 200809L
#include "tpshard.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { SLOTS = 4, TOKENS = 24, LONGEST = 48, CAPACITY = LONGEST + TOKENS };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double resident(void)
{
    long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (!file || fscanf(file, "%*s %ld", &pages) != 1)
        pages = 0;
    if (file)
        fclose(file);
    return (double)pages * (double)sysconf(_SC_PAGESIZE) / (1 << 20);
}

/* FNV-1a. */
static uint64_t hashed(uint64_t hash, const void *data, uint64_t bytes)
{
    for (const unsigned char *byte = data; bytes > 0; bytes--)
        hash = (hash ^ *byte++) * 1099511628211u;
    return hash;
}

static int step(tpshard_session *session, const uint64_t *slots, const uint64_t *lengths, uint64_t rows, uint64_t width,
                uint64_t *hash)
{
    static int64_t ids[SLOTS * CAPACITY], positions[SLOTS * CAPACITY], mask[SLOTS * CAPACITY];
    uint64_t longest = 0;
    for (uint64_t row = 0; row < rows; row++) {
        for (uint64_t i = 0; i < width; i++) {
            ids[row * width + i] = (int64_t)((lengths[row] + i * 7 + row) % 200);
            positions[row * width + i] = (int64_t)(lengths[row] + i);
        }
        if (lengths[row] + width > longest)
            longest = lengths[row] + width;
    }
    for (uint64_t i = 0; i < rows * longest; i++)
        mask[i] = 1;
    const int64_t new_shape[2] = {(int64_t)rows, (int64_t)width};
    const int64_t all_shape[2] = {(int64_t)rows, (int64_t)longest};
    const tpshard_tensor inputs[3] = {
        {"input_ids", TPSHARD_INT64, 2, new_shape, ids, rows * width * sizeof(int64_t)},
        {"position_ids", TPSHARD_INT64, 2, new_shape, positions, rows * width * sizeof(int64_t)},
        {"attention_mask", TPSHARD_INT64, 2, all_shape, mask, rows * longest * sizeof(int64_t)},
    };
    tpshard_results *results;
    int code = tpshard_step(session, slots, rows, inputs, 3, &results);
    if (code != TPSHARD_OK)
        return code;
    tpshard_tensor logits;
    code = tpshard_results_find(results, "logits", &logits);
    if (code == TPSHARD_OK)
        *hash = hashed(*hash, logits.data, logits.bytes);
    tpshard_results_free(results);
    return code;
}

static int round_of(tpshard_session *session, uint64_t *hash)
{
    uint64_t slots[SLOTS], lengths[SLOTS];
    *hash = 14695981039346656037u;
    int code = TPSHARD_OK;
    for (uint64_t s = 0; s < SLOTS && code == TPSHARD_OK; s++) {
        code = tpshard_slot_new(session, &slots[s]);
        lengths[s] = 0;
        uint64_t width = LONGEST - 11 * s;
        if (code == TPSHARD_OK)
            code = step(session, &slots[s], &lengths[s], 1, width, hash);
        lengths[s] = width;
    }
    for (uint64_t t = 0; t < TOKENS && code == TPSHARD_OK; t++) {
        code = step(session, slots, lengths, SLOTS, 1, hash);
        for (uint64_t s = 0; s < SLOTS; s++)
            lengths[s]++;
    }
    for (uint64_t s = 0; s < SLOTS && code == TPSHARD_OK; s++)
        code = tpshard_slot_drop(session, slots[(s * 3 + 1) % SLOTS]);
    return code;
}

int main(int argc, char **argv)
{
    double seconds = argc > 2 ? atof(argv[2]) : 0;
    if (argc != 3 || seconds <= 0) {
        fprintf(stderr, "usage: soak DIR SECONDS\n");
        return TPSHARD_USAGE;
    }
    tpshard_options options = {.size = sizeof options, .slots = SLOTS, .capacity = CAPACITY};
    tpshard_session *session;
    int code = tpshard_open(argv[1], &options, &session);
    uint64_t first = 0, rounds = 0;
    double start = now(), told = start, settled = 0, most = 0;
    int drifted = 0;
    while (code == TPSHARD_OK && !drifted && now() - start < seconds) {
        uint64_t hash;
        code = round_of(session, &hash);
        if (code != TPSHARD_OK)
            break;
        first = rounds++ == 0 ? hash : first;
        drifted = hash != first;
        double held = resident();
        if (settled == 0 && now() - start > seconds / 10)
            settled = held;
        if (settled > 0 && held > most)
            most = held;
        if (now() - told >= 30) {
            told = now();
            printf("%5.0f s  %8llu rounds  %8.1f MiB  outputs %016llx\n", told - start, (unsigned long long)rounds, held,
                   (unsigned long long)hash);
            fflush(stdout);
        }
    }
    if (code != TPSHARD_OK) {
        fprintf(stderr, "error: %s\n", tpshard_last_error());
        return code;
    }
    int grown = most > settled * 1.01 + 1;
    printf("%s: %llu rounds of %d tokens in %.0f s, %.1f MiB after a tenth of it, %.1f MiB at most since\n",
           drifted ? "OUTPUTS DRIFTED" : grown ? "MEMORY GREW" : "steady", (unsigned long long)rounds, SLOTS * TOKENS,
           now() - start, settled, most);
    int closed = tpshard_close(session);
    return drifted || grown ? 1 : closed;
}
