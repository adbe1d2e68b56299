/* What the C interface promises, besides what its examples show.
 *
 *     c_api errors DIR1 DIR2 FILE   every wrong argument is an error; a slot saved in DIR1 goes on in DIR2
 *     c_api rank DIR N RANK         one rank of a job of processes; rank 0 steps once
 */
#include "tpshard.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPECT(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s; last error: %s\n", __FILE__, __LINE__, #condition, tpshard_last_error()); \
            exit(100); \
        } \
    } while (0)

/* A call that fails with a code and with a message that has a word. */
#define FAILS(code, word, call) \
    do { \
        EXPECT((call) == (code)); \
        EXPECT(strstr(tpshard_last_error(), (word))); \
    } while (0)

static const int64_t token[1] = {7};
static const int64_t ones[64] = {
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
};

/* A step of one slot by one token, behind `past` others; the logits go to `logits`. */
static int step(tpshard_session *session, uint64_t slot, int64_t past, float *logits)
{
    const int64_t one[2] = {1, 1}, all[2] = {1, past + 1};
    const tpshard_tensor inputs[3] = {
        {"input_ids", TPSHARD_INT64, 2, one, token, 8},
        {"position_ids", TPSHARD_INT64, 2, one, &past, 8},
        {"attention_mask", TPSHARD_INT64, 2, all, ones, 8 * (uint64_t)(past + 1)},
    };
    tpshard_results *results = (tpshard_results *)1;
    int code = tpshard_step(session, &slot, 1, inputs, 3, &results);
    if (code != TPSHARD_OK) {
        EXPECT(results == NULL);
        return code;
    }
    tpshard_tensor found;
    EXPECT(tpshard_results_count(results) == 1);
    EXPECT(tpshard_results_find(results, "logits", &found) == TPSHARD_OK);
    EXPECT(found.dtype == TPSHARD_FLOAT32 && found.ndim == 3 && found.shape[2] == 512 && found.bytes == 4 * 512);
    if (logits)
        memcpy(logits, found.data, found.bytes);
    FAILS(TPSHARD_USAGE, "logits", tpshard_results_find(results, "typo", &found));
    FAILS(TPSHARD_USAGE, "no result 1", tpshard_results_get(results, 1, &found));
    FAILS(TPSHARD_USAGE, "NULL", tpshard_results_get(results, 0, NULL));
    FAILS(TPSHARD_USAGE, "NULL", tpshard_results_find(results, NULL, &found));
    tpshard_results_free(results);
    return TPSHARD_OK;
}

static void null_and_ports(tpshard_session *session)
{
    tpshard_port port;
    tpshard_results *results;
    uint64_t number;
    EXPECT(tpshard_close(NULL) == TPSHARD_OK);
    tpshard_results_free(NULL);
    EXPECT(tpshard_rank(NULL) == -1 && tpshard_world_size(NULL) == -1);
    EXPECT(tpshard_input_count(NULL) == 0 && tpshard_output_count(NULL) == 0 && tpshard_results_count(NULL) == 0);
    FAILS(TPSHARD_USAGE, "session is NULL", tpshard_input(NULL, 0, &port));
    FAILS(TPSHARD_USAGE, "session is NULL", tpshard_output(NULL, 0, &port));
    FAILS(TPSHARD_USAGE, "session is NULL", tpshard_run(NULL, NULL, 0, &results));
    FAILS(TPSHARD_USAGE, "session is NULL", tpshard_step(NULL, NULL, 0, NULL, 0, &results));
    FAILS(TPSHARD_USAGE, "session is NULL", tpshard_follow(NULL));
    FAILS(TPSHARD_USAGE, "session is NULL", tpshard_slot_new(NULL, &number));
    FAILS(TPSHARD_USAGE, "session is NULL", tpshard_slot_fork(NULL, 0, &number));
    FAILS(TPSHARD_USAGE, "session is NULL", tpshard_slot_truncate(NULL, 0, 0));
    FAILS(TPSHARD_USAGE, "session is NULL", tpshard_slot_drop(NULL, 0));
    FAILS(TPSHARD_USAGE, "session is NULL", tpshard_slot_length(NULL, 0, &number));
    FAILS(TPSHARD_USAGE, "session is NULL", tpshard_slot_save(NULL, 0, "x"));
    FAILS(TPSHARD_USAGE, "session is NULL", tpshard_slot_load(NULL, "x", &number));
    FAILS(TPSHARD_USAGE, "results is NULL", tpshard_run(session, NULL, 0, NULL));
    FAILS(TPSHARD_USAGE, "slot is NULL", tpshard_slot_new(session, NULL));
    FAILS(TPSHARD_USAGE, "path is NULL", tpshard_slot_load(session, NULL, &number));
    FAILS(TPSHARD_USAGE, "input is NULL", tpshard_input(session, 0, NULL));
    FAILS(TPSHARD_USAGE, "rank 0", tpshard_follow(session));

    EXPECT(tpshard_input_count(session) == 11 && tpshard_output_count(session) == 9);
    EXPECT(tpshard_input(session, 0, &port) == TPSHARD_OK);
    EXPECT(strcmp(tpshard_last_error(), "") == 0);
    EXPECT(strcmp(port.name, "input_ids") == 0 && port.dtype == TPSHARD_INT64 && port.ndim == 2 && !port.state);
    EXPECT(port.shape[0] == -1 && strcmp(port.dims[0], "batch") == 0 && strcmp(port.dims[1], "seq") == 0);
    EXPECT(tpshard_input(session, 3, &port) == TPSHARD_OK);
    EXPECT(port.state && port.ndim == 4 && port.shape[1] == 4 && strcmp(port.dims[3], "8") == 0);
    EXPECT(tpshard_output(session, 0, &port) == TPSHARD_OK);
    EXPECT(strcmp(port.name, "logits") == 0 && !port.state && port.shape[2] == 512);
    FAILS(TPSHARD_USAGE, "no input 11", tpshard_input(session, 11, &port));
    FAILS(TPSHARD_USAGE, "no output 9", tpshard_output(session, 9, &port));
}

static void opening(const char *folder)
{
    tpshard_session *session = (tpshard_session *)1;
    FAILS(TPSHARD_USAGE, "folder is NULL", tpshard_open(NULL, NULL, &session));
    EXPECT(session == NULL);
    FAILS(TPSHARD_USAGE, "session is NULL", tpshard_open(folder, NULL, NULL));
    FAILS(TPSHARD_RESOURCES, "help: ", tpshard_open("/nowhere", NULL, &session));
    tpshard_options options = {0};
    FAILS(TPSHARD_USAGE, "sizeof", tpshard_open(folder, &options, &session));
    options.size = sizeof options;
    options.slots = 2;
    FAILS(TPSHARD_USAGE, "give both", tpshard_open(folder, &options, &session));
    options.slots = 0;
    options.rank = 1;
    FAILS(TPSHARD_USAGE, "world_size", tpshard_open(folder, &options, &session));
    options.world_size = 7;
    FAILS(TPSHARD_USAGE, "7", tpshard_open(folder, &options, &session));
    options.world_size = -2;
    FAILS(TPSHARD_USAGE, "world_size is -2", tpshard_open(folder, &options, &session));
    struct {
        tpshard_options known;
        uint64_t later;
    } more = {{.size = sizeof more}, 1};
    FAILS(TPSHARD_USAGE, "does not know", tpshard_open(folder, &more.known, &session));
    more.later = 0;
    EXPECT(tpshard_open(folder, &more.known, &session) == TPSHARD_OK);
    uint64_t slot;
    FAILS(TPSHARD_USAGE, "keeps no state", tpshard_slot_new(session, &slot));
    EXPECT(tpshard_close(session) == TPSHARD_OK);
}

static void wrong_inputs(tpshard_session *session)
{
    const int64_t one[2] = {1, 1}, negative[2] = {1, -1}, huge[3] = {INT64_MAX, INT64_MAX, 8};
    tpshard_results *results;
    tpshard_tensor input = {"input_ids", TPSHARD_INT64, 2, one, token, 8};
#define WRONG(word) FAILS(TPSHARD_USAGE, word, tpshard_run(session, &input, 1, &results))
    WRONG("missing");
    FAILS(TPSHARD_USAGE, "inputs is NULL", tpshard_run(session, NULL, 1, &results));
    FAILS(TPSHARD_USAGE, "memory", tpshard_run(session, &input, UINT64_MAX, &results));
    input.bytes = 7;
    WRONG("takes 8 bytes, 7 are given");
    input.bytes = 8;
    input.data = NULL;
    WRONG("`input_ids`: data is NULL");
    input.data = token;
    input.dtype = 8;
    WRONG("8 is no element type");
    input.dtype = TPSHARD_INT64;
    input.shape = negative;
    WRONG("negative");
    input.shape = huge;
    input.ndim = 3;
    WRONG("memory");
    input.ndim = -1;
    WRONG("ndim is -1");
    input.ndim = 2;
    input.shape = NULL;
    WRONG("shape is NULL");
    input.shape = one;
    input.name = NULL;
    WRONG("name of input 0 is NULL");
    input.name = "\xff";
    WRONG("UTF-8");
    input.name = "typo";
    WRONG("`typo`");
    input.name = "input_ids";
    input.dtype = TPSHARD_FLOAT64;
    WRONG("f64");
    tpshard_tensor twice[2] = {{"input_ids", TPSHARD_INT64, 2, one, token, 8}, {"input_ids", TPSHARD_INT64, 2, one, token, 8}};
    FAILS(TPSHARD_USAGE, "given twice", tpshard_run(session, twice, 2, &results));
}

static void slots(tpshard_session *session, const char *other, const char *file)
{
    uint64_t a, b, c, length;
    float first[512], again[512];
    FAILS(TPSHARD_USAGE, "no slot 5", tpshard_slot_drop(session, 5));
    FAILS(TPSHARD_USAGE, "no slot 5", step(session, 5, 0, NULL));
    EXPECT(tpshard_slot_new(session, &a) == TPSHARD_OK);
    EXPECT(tpshard_slot_length(session, a, &length) == TPSHARD_OK && length == 0);
    EXPECT(tpshard_slot_fork(session, a, &b) == TPSHARD_OK && b != a);
    EXPECT(tpshard_slot_drop(session, b) == TPSHARD_OK);
    FAILS(TPSHARD_USAGE, "no slot", tpshard_slot_length(session, b, &length));
    EXPECT(tpshard_slot_truncate(session, a, 0) == TPSHARD_OK);
    for (int64_t past = 0; past < 4; past++)
        EXPECT(step(session, a, past, first) == TPSHARD_OK);
    FAILS(TPSHARD_RESOURCES, "capacity is 4", step(session, a, 4, NULL));
    EXPECT(tpshard_slot_fork(session, a, &b) == TPSHARD_OK);
    FAILS(TPSHARD_RESOURCES, "in use", tpshard_slot_fork(session, a, &c));
    EXPECT(tpshard_slot_drop(session, a) == TPSHARD_OK);
    EXPECT(tpshard_slot_truncate(session, b, 3) == TPSHARD_OK);
    FAILS(TPSHARD_RESOURCES, "holds 3", tpshard_slot_truncate(session, b, 4));
    FAILS(TPSHARD_RESOURCES, "cannot be written", tpshard_slot_save(session, b, "/nowhere/slot"));
    EXPECT(tpshard_slot_save(session, b, file) == TPSHARD_OK);
    EXPECT(step(session, b, 3, again) == TPSHARD_OK);
    EXPECT(memcmp(first, again, sizeof first) == 0);
    FAILS(TPSHARD_RESOURCES, "help: ", tpshard_slot_load(session, "/nowhere/slot", &c));

    /* The other folder has another number of ranks. */
    tpshard_options options = {.size = sizeof options, .slots = 1, .capacity = 4};
    tpshard_session *there;
    EXPECT(tpshard_open(other, &options, &there) == TPSHARD_OK);
    EXPECT(tpshard_world_size(there) != tpshard_world_size(session));
    EXPECT(tpshard_slot_load(there, file, &c) == TPSHARD_OK);
    EXPECT(tpshard_slot_length(there, c, &length) == TPSHARD_OK && length == 3);
    EXPECT(step(there, c, 3, again) == TPSHARD_OK);
    for (int i = 0; i < 512; i++)
        EXPECT(fabsf(first[i] - again[i]) < 1e-4f);
    EXPECT(tpshard_close(there) == TPSHARD_OK);
}

static int rank(const char *folder, const char *world_size, const char *rank)
{
    tpshard_options options = {.size = sizeof options, .slots = 1, .capacity = 4, .timeout_seconds = 20};
    tpshard_session *session;
    options.world_size = atoi(world_size);
    options.rank = atoi(rank);
    EXPECT(tpshard_open(folder, &options, &session) == TPSHARD_OK);
    if (tpshard_rank(session) != 0) {
        uint64_t slot;
        FAILS(TPSHARD_USAGE, "tpshard_follow", tpshard_slot_new(session, &slot));
        EXPECT(tpshard_follow(session) == TPSHARD_OK);
    } else {
        uint64_t slot;
        float logits[512];
        EXPECT(tpshard_slot_new(session, &slot) == TPSHARD_OK);
        EXPECT(step(session, slot, 0, logits) == TPSHARD_OK);
        for (int i = 0; i < 512; i++)
            printf("%.6g\n", logits[i]);
    }
    return tpshard_close(session);
}

int main(int argc, char **argv)
{
    if (argc == 5 && strcmp(argv[1], "rank") == 0)
        return rank(argv[2], argv[3], argv[4]);
    EXPECT(argc == 5);
    tpshard_options options = {.size = sizeof options, .slots = 2, .capacity = 4, .threads = 1};
    tpshard_session *session;
    EXPECT(strlen(tpshard_version()) >= 5);
    opening(argv[2]);
    EXPECT(tpshard_open(argv[2], &options, &session) == TPSHARD_OK);
    null_and_ports(session);
    wrong_inputs(session);
    slots(session, argv[3], argv[4]);
    EXPECT(tpshard_close(session) == TPSHARD_OK);
    return 0;
}
