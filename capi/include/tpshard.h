/* tpshard: running sharded ONNX models from C.
 *
 * A session runs a folder that `tpshard MODEL --tp N -o DIR` wrote. With default options all ranks run in this process,
 * each on threads of its own; it can also be one rank of a job of processes. Link with -ltpshard.
 *
 * Errors. Functions that can fail return a tpshard_status: 0, or the number that the command `tpshard` would exit with.
 * tpshard_last_error() then says what is wrong and what to do, for people. Arguments that must not be NULL and are give
 * TPSHARD_USAGE. Nothing is printed, no signal handler is set, and the process is never ended.
 *
 * Ownership. What a function takes is borrowed for the call; nothing of it is kept. What it gives belongs to the
 * library: pointers from a session are valid until tpshard_close, pointers from results until tpshard_results_free.
 * Sessions and results are the only things to be given back, each once. Out parameters are set to NULL or 0 before
 * anything else is done, and to their value only on success.
 *
 * Threads. A session may be used by several threads; its calls wait for each other. tpshard_close and
 * tpshard_results_free must be the last use of what they are given. After fork() only the parent may use a session.
 */
#ifndef TPSHARD_H
#define TPSHARD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The codes are the exit codes of the command. */
typedef enum tpshard_status {
    TPSHARD_OK = 0,
    TPSHARD_INTERNAL = 1,  /* a mistake in tpshard */
    TPSHARD_USAGE = 2,     /* wrong arguments or inputs */
    TPSHARD_MODEL = 3,     /* the model is invalid or not supported; never returned by this interface today */
    TPSHARD_MISMATCH = 4,  /* the folder's programs or weights are not what they should be */
    TPSHARD_RESOURCES = 5, /* files, memory, room for state */
    TPSHARD_RANK = 6       /* a rank or a collective failed, or the session ended with an earlier error */
} tpshard_status;

/* Element types, with the numbers of ONNX's TensorProto.DataType. Types below 8 bits are packed, the first element in
 * the lowest bits. Bytes are in little-endian order. */
typedef enum tpshard_dtype {
    TPSHARD_FLOAT32 = 1,
    TPSHARD_UINT8 = 2,
    TPSHARD_INT8 = 3,
    TPSHARD_UINT16 = 4,
    TPSHARD_INT16 = 5,
    TPSHARD_INT32 = 6,
    TPSHARD_INT64 = 7,
    TPSHARD_BOOL = 9,
    TPSHARD_FLOAT16 = 10,
    TPSHARD_FLOAT64 = 11,
    TPSHARD_UINT32 = 12,
    TPSHARD_UINT64 = 13,
    TPSHARD_BFLOAT16 = 16,
    TPSHARD_FLOAT8E4M3FN = 17,
    TPSHARD_FLOAT8E4M3FNUZ = 18,
    TPSHARD_FLOAT8E5M2 = 19,
    TPSHARD_FLOAT8E5M2FNUZ = 20,
    TPSHARD_UINT4 = 21,
    TPSHARD_INT4 = 22,
    TPSHARD_FLOAT4E2M1 = 23,
    TPSHARD_FLOAT8E8M0 = 24,
    TPSHARD_UINT2 = 25,
    TPSHARD_INT2 = 26
} tpshard_dtype;

typedef struct tpshard_session tpshard_session;
typedef struct tpshard_results tpshard_results;

/* How a session is opened. All zero but `size` is a good default. */
typedef struct tpshard_options {
    uint64_t size;           /* sizeof(tpshard_options) */
    int32_t world_size;      /* 0: all ranks in this process. N: this process is one of N, all on this machine.
                                -1: as torchrun, mpirun or srun say */
    int32_t rank;            /* which one, if world_size is N; TPSHARD_RENDEZVOUS then names the job */
    uint32_t threads;        /* threads that compute, per rank; 0: the cores, shared between the ranks */
    uint32_t timeout_seconds;/* how long a rank without progress is waited for; 0: as long as it lives, and 30 s for
                                processes to appear */
    uint64_t memory_limit;   /* most bytes per rank that a run may take besides the weights; 0: what is available */
    uint64_t slots;          /* sequences whose state stays with the ranks, for tpshard_step; 0: none */
    uint64_t capacity;       /* entries (tokens) each of them has room for */
} tpshard_options;

/* An input or output of the model. */
typedef struct tpshard_port {
    const char *name;
    int32_t dtype;           /* tpshard_dtype */
    int32_t ndim;
    const int64_t *shape;    /* -1 where an extent is open */
    const char *const *dims; /* the extents as text: "batch", "past + seq", "8" */
    int32_t state;           /* 1 if it is state, which tpshard_step neither takes nor gives */
} tpshard_port;

/* A named tensor, row-major. */
typedef struct tpshard_tensor {
    const char *name;
    int32_t dtype;           /* tpshard_dtype */
    int32_t ndim;
    const int64_t *shape;    /* ndim extents; may be NULL if ndim is 0 */
    const void *data;        /* may be NULL if bytes is 0; of any alignment in inputs, aligned in results */
    uint64_t bytes;
} tpshard_tensor;

/* The version of the library, such as "0.1.0". Static. */
const char *tpshard_version(void);

/* Why the last call of this thread failed; "" if it did not. Valid until this thread's next call, never NULL. */
const char *tpshard_last_error(void);

/* Opens a folder: maps the programs, loads the weights, brings the ranks together. `options` may be NULL. */
tpshard_status tpshard_open(const char *folder, const tpshard_options *options, tpshard_session **session);

/* Ends the session on all ranks and frees it, even if this returns an error. On ranks other than 0 it first follows
 * (tpshard_follow). NULL is nothing to do. */
tpshard_status tpshard_close(tpshard_session *session);

/* The rank that this process is, 0 if all ranks are in it; and how many ranks there are. -1 if `session` is NULL. */
int32_t tpshard_rank(const tpshard_session *session);
int32_t tpshard_world_size(const tpshard_session *session);

/* On ranks other than 0: does what rank 0 asks until it closes the session. All other calls are rank 0's. */
tpshard_status tpshard_follow(tpshard_session *session);

/* Inputs and outputs in the order of the model. The counts are 0 if `session` is NULL. */
uint64_t tpshard_input_count(const tpshard_session *session);
tpshard_status tpshard_input(const tpshard_session *session, uint64_t index, tpshard_port *input);
uint64_t tpshard_output_count(const tpshard_session *session);
tpshard_status tpshard_output(const tpshard_session *session, uint64_t index, tpshard_port *output);

/* Runs the model once. All inputs are given, state among them; all outputs are in `results`. */
tpshard_status tpshard_run(tpshard_session *session, const tpshard_tensor *inputs, uint64_t input_count,
                           tpshard_results **results);

/* Runs one step for slots, whose state stays with the ranks: state inputs are not given, state outputs not returned.
 * The slots may hold different numbers of entries. Inputs and outputs have a row per slot, in the order of `slots`;
 * dims that depend on what slots hold, such as that of an attention mask over past and new entries, are those of the
 * longest slot: of an input, shorter slots take the leading entries, of an output, the others are zero. After an error
 * all slots are as before, unless the session has ended with it (TPSHARD_RANK). */
tpshard_status tpshard_step(tpshard_session *session, const uint64_t *slots, uint64_t slot_count,
                            const tpshard_tensor *inputs, uint64_t input_count, tpshard_results **results);

/* Slots: sequences whose state stays with the ranks. A new one is empty; a fork is a copy. Truncating keeps the first
 * `length` entries. A dropped slot is no more, and its number is not given again. */
tpshard_status tpshard_slot_new(tpshard_session *session, uint64_t *slot);
tpshard_status tpshard_slot_fork(tpshard_session *session, uint64_t from, uint64_t *slot);
tpshard_status tpshard_slot_truncate(tpshard_session *session, uint64_t slot, uint64_t length);
tpshard_status tpshard_slot_drop(tpshard_session *session, uint64_t slot);
tpshard_status tpshard_slot_length(tpshard_session *session, uint64_t slot, uint64_t *length);

/* A slot as a safetensors file of whole logical tensors: it loads at any number of ranks of the same model. */
tpshard_status tpshard_slot_save(tpshard_session *session, uint64_t slot, const char *path);
tpshard_status tpshard_slot_load(tpshard_session *session, const char *path, uint64_t *slot);

/* Results, in the order of the model's outputs. What is written into `tensor` points into `results`. */
uint64_t tpshard_results_count(const tpshard_results *results);
tpshard_status tpshard_results_get(const tpshard_results *results, uint64_t index, tpshard_tensor *tensor);
tpshard_status tpshard_results_find(const tpshard_results *results, const char *name, tpshard_tensor *tensor);

/* NULL is nothing to do. */
void tpshard_results_free(tpshard_results *results);

#ifdef __cplusplus
}
#endif

#endif
