/* Continues several prompts at once with a sharded decoder, the most probable token each time.
 *
 *     generate DIR TOKENS ID,ID,... [ID,ID,...]...
 *
 * Every prompt is a slot, whose keys and values stay with the ranks. A prompt is read in one step of its own; then all
 * slots step together, whatever their lengths. Prints the tokens of each prompt on a line. The model has the inputs
 * that Hugging Face's exporters give decoders: input_ids, attention_mask, position_ids.
 */
#include "tpshard.h"

#include <stdio.h>
#include <stdlib.h>

enum { MOST_PROMPTS = 16, MOST_TOKENS = 1024 };

static uint64_t slots[MOST_PROMPTS];
static uint64_t lengths[MOST_PROMPTS]; /* what the slots hold */
static int64_t prompts[MOST_PROMPTS][MOST_TOKENS];
static int64_t next[MOST_PROMPTS];

/* Steps `rows` slots from `first` on, each by `width` tokens; the most probable tokens go to `next`. */
static int step(tpshard_session *session, uint64_t first, uint64_t rows, uint64_t width, const int64_t *tokens)
{
    static int64_t positions[MOST_PROMPTS * MOST_TOKENS], mask[MOST_PROMPTS * MOST_TOKENS];
    uint64_t longest = 0;
    for (uint64_t row = 0; row < rows; row++) {
        uint64_t past = lengths[first + row];
        for (uint64_t i = 0; i < width; i++)
            positions[row * width + i] = (int64_t)(past + i);
        if (past + width > longest)
            longest = past + width;
    }
    for (uint64_t i = 0; i < rows * longest; i++)
        mask[i] = 1; /* shorter slots take the leading entries */

    const int64_t new_shape[2] = {(int64_t)rows, (int64_t)width};
    const int64_t all_shape[2] = {(int64_t)rows, (int64_t)longest};
    const tpshard_tensor inputs[3] = {
        {"input_ids", TPSHARD_INT64, 2, new_shape, tokens, rows * width * sizeof(int64_t)},
        {"position_ids", TPSHARD_INT64, 2, new_shape, positions, rows * width * sizeof(int64_t)},
        {"attention_mask", TPSHARD_INT64, 2, all_shape, mask, rows * longest * sizeof(int64_t)},
    };
    tpshard_results *results;
    int code = tpshard_step(session, &slots[first], rows, inputs, 3, &results);
    if (code != TPSHARD_OK)
        return code;
    tpshard_tensor logits;
    code = tpshard_results_find(results, "logits", &logits);
    if (code == TPSHARD_OK && logits.dtype == TPSHARD_FLOAT32 && logits.ndim == 3) {
        const float *values = logits.data;
        uint64_t vocabulary = (uint64_t)logits.shape[2];
        for (uint64_t row = 0; row < rows; row++) {
            const float *last = values + (row * width + width - 1) * vocabulary;
            uint64_t best = 0;
            for (uint64_t i = 1; i < vocabulary; i++)
                if (last[i] > last[best])
                    best = i;
            next[first + row] = (int64_t)best;
            lengths[first + row] += width;
        }
    }
    tpshard_results_free(results);
    return code;
}

int main(int argc, char **argv)
{
    static int64_t found[MOST_PROMPTS][MOST_TOKENS];
    uint64_t widths[MOST_PROMPTS] = {0};
    uint64_t count = argc > 3 ? (uint64_t)argc - 3 : 0;
    uint64_t most = argc > 2 ? strtoull(argv[2], NULL, 10) : 0;
    uint64_t capacity = 0;

    if (count == 0 || count > MOST_PROMPTS || most == 0 || most > MOST_TOKENS / 2) {
        fprintf(stderr, "usage: generate DIR TOKENS ID,ID,... [ID,ID,...]...\n");
        return TPSHARD_USAGE;
    }
    for (uint64_t p = 0; p < count; p++) {
        char *word = argv[3 + p];
        while (*word && widths[p] < MOST_TOKENS / 2) {
            prompts[p][widths[p]++] = strtoll(word, &word, 10);
            word += *word != '\0';
        }
        if (widths[p] > capacity)
            capacity = widths[p];
    }

    tpshard_options options = {.size = sizeof options, .slots = count, .capacity = capacity + most};
    tpshard_session *session;
    int code = tpshard_open(argv[1], &options, &session);
    for (uint64_t p = 0; p < count && code == TPSHARD_OK; p++) {
        code = tpshard_slot_new(session, &slots[p]);
        if (code == TPSHARD_OK)
            code = step(session, p, 1, widths[p], prompts[p]);
    }
    for (uint64_t t = 0; t < most && code == TPSHARD_OK; t++) {
        for (uint64_t p = 0; p < count; p++)
            found[p][t] = next[p];
        if (t + 1 < most)
            code = step(session, 0, count, 1, next);
    }
    if (code != TPSHARD_OK)
        fprintf(stderr, "error: %s\n", tpshard_last_error());
    for (uint64_t p = 0; p < count && code == TPSHARD_OK; p++)
        for (uint64_t t = 0; t < most; t++)
            printf("%lld%c", (long long)found[p][t], t + 1 < most ? ' ' : '\n');
    int closed = tpshard_close(session);
    return code != TPSHARD_OK ? code : closed;
}
