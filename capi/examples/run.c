/* Runs a sharded model once, on raw tensors from files.
 *
 *     run DIR NAME:EXTENTS:FILE... OUT_DIR
 *
 * such as `run out input_ids:1x4:ids.bin mask:1x4:mask.bin results`. A file holds row-major elements of the type that
 * the input has; it may be left out for an input without elements. Every output goes to OUT_DIR/NAME.bin.
 */
#include "tpshard.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_INPUTS = 256, MOST_DIMS = 8 };

struct input {
    char name[256];
    int64_t shape[MOST_DIMS];
};

static void fail(const char *what)
{
    fprintf(stderr, "error: %s: %s\n", what, tpshard_last_error());
}

/* The whole file, which the caller frees. */
static void *read_file(const char *path, uint64_t *bytes)
{
    FILE *file = fopen(path, "rb");
    void *data = NULL;
    *bytes = 0;
    if (file && fseek(file, 0, SEEK_END) == 0) {
        long length = ftell(file);
        rewind(file);
        if (length >= 0 && (data = malloc((size_t)length + 1)) && fread(data, 1, (size_t)length, file) == (size_t)length)
            *bytes = (uint64_t)length;
        else
            free(data), data = NULL;
    }
    if (file)
        fclose(file);
    return data;
}

/* The type that the model wants for an input; 0 if it has none of that name. */
static int32_t dtype_of(const tpshard_session *session, const char *name)
{
    for (uint64_t i = 0; i < tpshard_input_count(session); i++) {
        tpshard_port port;
        if (tpshard_input(session, i, &port) == TPSHARD_OK && strcmp(port.name, name) == 0)
            return port.dtype;
    }
    return 0;
}

/* NAME:EXTENTS:FILE, where names may hold colons and EXTENTS may be empty for a scalar. */
static int read_input(const tpshard_session *session, const char *word, struct input *input, tpshard_tensor *tensor)
{
    const char *file = strrchr(word, ':');
    const char *extents = file;
    while (extents && extents > word && extents[-1] != ':')
        extents--;
    if (!file || extents <= word || (size_t)(extents - word) > sizeof input->name)
        return 0;
    memcpy(input->name, word, (size_t)(extents - word) - 1);
    input->name[extents - word - 1] = '\0';
    memset(tensor, 0, sizeof *tensor);
    while (extents < file && tensor->ndim < MOST_DIMS) {
        char *end;
        input->shape[tensor->ndim++] = strtoll(extents, &end, 10);
        extents = end + (*end == 'x');
        if (end == extents)
            break;
    }
    tensor->name = input->name;
    tensor->shape = input->shape;
    tensor->dtype = dtype_of(session, input->name);
    tensor->data = read_file(file + 1, &tensor->bytes);
    return 1;
}

static int write_results(const tpshard_results *results, const char *folder)
{
    for (uint64_t i = 0; i < tpshard_results_count(results); i++) {
        tpshard_tensor tensor;
        char path[4096];
        if (tpshard_results_get(results, i, &tensor) != TPSHARD_OK)
            return 0;
        snprintf(path, sizeof path, "%s/%s.bin", folder, tensor.name);
        FILE *file = fopen(path, "wb");
        if (!file || fwrite(tensor.data, 1, tensor.bytes, file) != tensor.bytes || fclose(file) != 0) {
            fprintf(stderr, "error: %s cannot be written\n", path);
            return 0;
        }
        printf("%s: %d dims, %llu bytes\n", tensor.name, (int)tensor.ndim, (unsigned long long)tensor.bytes);
    }
    return 1;
}

int main(int argc, char **argv)
{
    static struct input names[MOST_INPUTS];
    static tpshard_tensor inputs[MOST_INPUTS];
    tpshard_session *session = NULL;
    tpshard_results *results = NULL;
    uint64_t count = 0;
    int code = TPSHARD_USAGE;

    if (argc < 3 || argc - 3 > MOST_INPUTS) {
        fprintf(stderr, "usage: run DIR NAME:EXTENTS:FILE... OUT_DIR\n");
        return code;
    }
    if ((code = tpshard_open(argv[1], NULL, &session)) != TPSHARD_OK) {
        fail(argv[1]);
        return code;
    }
    for (int i = 2; i + 1 < argc; i++) {
        if (!read_input(session, argv[i], &names[count], &inputs[count])) {
            fprintf(stderr, "error: %s is not NAME:EXTENTS:FILE\n", argv[i]);
            code = TPSHARD_USAGE;
            goto end;
        }
        count++;
    }
    if ((code = tpshard_run(session, inputs, count, &results)) != TPSHARD_OK)
        fail("run");
    else if (!write_results(results, argv[argc - 1]))
        code = TPSHARD_RESOURCES;
end:
    tpshard_results_free(results);
    for (uint64_t i = 0; i < count; i++)
        free((void *)inputs[i].data);
    int closed = tpshard_close(session);
    return code != TPSHARD_OK ? code : closed;
}
