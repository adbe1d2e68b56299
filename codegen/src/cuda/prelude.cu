// What all kernels share. It includes nothing, so that NVRTC needs no headers; a C++ compiler for a CPU takes the same
// text after definitions of its own (`threadIdx`, `__syncthreads`, …).
//
// Kernels keep to rules under which any number of threads and blocks gives the same results, one thread of one block
// included: loops over threads and blocks are strided; lanes meet only in the functions below; barriers are reached by
// all threads; 16-bit floats are storage, and arithmetic is in `float`.

#ifdef __CUDA_ARCH__
#define SHARED(type, name, count) __shared__ type name[count]
#define DYNAMIC_SHARED(type, name) \
    extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
    type *name = reinterpret_cast<type *>(dynamic_shared)
#define UNROLL _Pragma("unroll")
#endif

typedef long long i64;
typedef unsigned long long u64;

struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };

// Neighbouring elements, read at once.
template <class T, int COUNT, int BYTES> struct alignas(BYTES) Pack { T e[COUNT]; };

#define INFINITE (__int_as_float(0x7f800000))
#define NOT_A_NUMBER (__int_as_float(0x7fc00000))

#ifdef __CUDA_ARCH__
__device__ __forceinline__ float wide(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ __forceinline__ f16 narrow_f16(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
#else
__device__ __forceinline__ float wide(f16 x) {
    unsigned sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31u, fraction = x.bits & 0x3ffu;
    if (exponent == 31) return __int_as_float(sign | 0x7f800000u | (fraction << 13));
    if (exponent != 0) return __int_as_float(sign | ((exponent + 112u) << 23) | (fraction << 13));
    float magnitude = fraction * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
}
__device__ __forceinline__ f16 narrow_f16(float x) {
    unsigned bits = __float_as_int(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    f16 y;
    if (magnitude > 0x7f800000u) {
        y.bits = sign | 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {
        y.bits = sign | 0x7c00u;
    } else if (magnitude < 0x38800000u) {
        // Adding a half of 2^-23 leaves what fits in units of 2^-24, rounded to even.
        float rounded = __int_as_float(magnitude) + 0.5f;
        y.bits = sign | (unsigned short)(__float_as_int(rounded) - 0x3f000000);
    } else {
        unsigned kept = magnitude - 0x38000000u;
        y.bits = sign | (unsigned short)((kept + 0xfffu + ((kept >> 13) & 1u)) >> 13);
    }
    return y;
}
#endif
__device__ __forceinline__ float wide(bf16 x) { return __int_as_float((int)((unsigned)x.bits << 16)); }
__device__ __forceinline__ bf16 narrow_bf16(float x) {
    unsigned bits = __float_as_int(x);
    bf16 y;
    y.bits = (bits & 0x7fffffffu) > 0x7f800000u ? (unsigned short)((bits >> 16) | 0x40u)
                                               : (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    return y;
}
__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ double wide(double x) { return x; }
__device__ __forceinline__ i64 wide(signed char x) { return x; }
__device__ __forceinline__ i64 wide(short x) { return x; }
__device__ __forceinline__ i64 wide(int x) { return x; }
__device__ __forceinline__ i64 wide(i64 x) { return x; }
__device__ __forceinline__ i64 wide(unsigned char x) { return x; }
__device__ __forceinline__ i64 wide(unsigned short x) { return x; }
__device__ __forceinline__ i64 wide(unsigned x) { return x; }
__device__ __forceinline__ u64 wide(u64 x) { return x; }

__device__ __forceinline__ void put(f16 *to, float x) { *to = narrow_f16(x); }
__device__ __forceinline__ void put(bf16 *to, float x) { *to = narrow_bf16(x); }
__device__ __forceinline__ void put(float *to, float x) { *to = x; }
__device__ __forceinline__ void put(double *to, double x) { *to = x; }
__device__ __forceinline__ void put(signed char *to, i64 x) { *to = (signed char)x; }
__device__ __forceinline__ void put(short *to, i64 x) { *to = (short)x; }
__device__ __forceinline__ void put(int *to, i64 x) { *to = (int)x; }
__device__ __forceinline__ void put(i64 *to, i64 x) { *to = x; }
__device__ __forceinline__ void put(unsigned char *to, i64 x) { *to = (unsigned char)x; }
__device__ __forceinline__ void put(unsigned short *to, i64 x) { *to = (unsigned short)x; }
__device__ __forceinline__ void put(unsigned *to, i64 x) { *to = (unsigned)x; }
__device__ __forceinline__ void put(u64 *to, u64 x) { *to = x; }

__device__ __forceinline__ float as_f16(float x) { return wide(narrow_f16(x)); }
__device__ __forceinline__ float as_bf16(float x) { return wide(narrow_bf16(x)); }

// Element `i` of packed integers, the first in the lowest bits.
__device__ __forceinline__ i64 packed_u4(const unsigned char *from, i64 i) { return (from[i >> 1] >> ((i & 1) * 4)) & 15; }
__device__ __forceinline__ i64 packed_i4(const unsigned char *from, i64 i) { return (packed_u4(from, i) ^ 8) - 8; }
__device__ __forceinline__ i64 packed_u2(const unsigned char *from, i64 i) { return (from[i >> 2] >> ((i & 3) * 2)) & 3; }
__device__ __forceinline__ i64 packed_i2(const unsigned char *from, i64 i) { return (packed_u2(from, i) ^ 2) - 2; }

// The index within the last of several dims, which is taken from `rest`.
__device__ __forceinline__ i64 split(i64 &rest, i64 extent) {
    if (((u64)rest | (u64)extent) >> 32 == 0) {
        unsigned whole = (unsigned)rest / (unsigned)extent, part = (unsigned)rest - whole * (unsigned)extent;
        rest = whole;
        return part;
    }
    i64 whole = rest / extent, part = rest - whole * extent;
    rest = whole;
    return part;
}

template <class T> __device__ __forceinline__ T maximum(T a, T b) { return a > b || a != a ? a : b; }
template <class T> __device__ __forceinline__ T minimum(T a, T b) { return a < b || a != a ? a : b; }
template <class T> __device__ __forceinline__ T sign(T x) { return x > 0 ? T(1) : x < 0 ? T(-1) : x == 0 ? T(0) : x; }
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
__device__ __forceinline__ float power(float a, float b) { return b == 2.0f ? a * a : b == 3.0f ? a * a * a : powf(a, b); }
__device__ __forceinline__ double power(double a, double b) { return pow(a, b); }
__device__ __forceinline__ bool infinite(float x) { return fabsf(x) == INFINITE; }
__device__ __forceinline__ bool infinite(double x) { return fabs(x) == (double)INFINITE; }
__device__ __forceinline__ float modulo(float a, float b) {
    float rest = fmodf(a, b);
    return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}
__device__ __forceinline__ double modulo(double a, double b) {
    double rest = fmod(a, b);
    return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}

// Integers in the order of numbers; not a number is above all, and both zeros are one.
#define LARGEST 0x7fffffffffffffffLL
__device__ __forceinline__ i64 sort_key(i64 x) { return x; }
__device__ __forceinline__ i64 sort_key(float x) {
    int bits = __float_as_int(x);
    return x != x ? LARGEST : bits < 0 ? -(i64)(bits & 0x7fffffff) : bits;
}
__device__ __forceinline__ i64 sort_key(double x) {
    i64 bits = __double_as_longlong(x);
    return x != x ? LARGEST : bits < 0 ? -(bits & LARGEST) : bits;
}

// Integers wrap.
__device__ __forceinline__ i64 add(i64 a, i64 b) { return (i64)((u64)a + (u64)b); }
__device__ __forceinline__ i64 subtract(i64 a, i64 b) { return (i64)((u64)a - (u64)b); }
__device__ __forceinline__ i64 multiply(i64 a, i64 b) { return (i64)((u64)a * (u64)b); }
__device__ __forceinline__ u64 add(u64 a, u64 b) { return a + b; }
__device__ __forceinline__ u64 subtract(u64 a, u64 b) { return a - b; }
__device__ __forceinline__ u64 multiply(u64 a, u64 b) { return a * b; }
__device__ __forceinline__ float add(float a, float b) { return a + b; }
__device__ __forceinline__ float multiply(float a, float b) { return a * b; }
__device__ __forceinline__ double add(double a, double b) { return a + b; }
__device__ __forceinline__ double multiply(double a, double b) { return a * b; }

// Floats to integers as x86-64 does it: the least integer where the value does not fit.
__device__ __forceinline__ i64 to_32_bits(double x) {
    return x > -2147483649.0 && x < 2147483648.0 ? (i64)x : -2147483647LL - 1;
}
__device__ __forceinline__ i64 to_64_bits(double x) {
    return x >= -9223372036854775808.0 && x < 9223372036854775808.0 ? (i64)x : (i64)(1ULL << 63);
}
__device__ __forceinline__ u64 to_u64(double x) {
    if (x >= 9223372036854775808.0) return x < 18446744073709551616.0 ? (u64)x : 0;
    return (u64)to_64_bits(x);
}

// Notes what went wrong, for whoever looks at the four words after the run.
__device__ __forceinline__ void note_fault(i64 *fault, i64 code, i64 step, i64 index, i64 extent) {
    fault[1] = step;
    fault[2] = index;
    fault[3] = extent;
    fault[0] = code;
}
// The place that an index stands for; negative ones count from the end. An index out of range is noted.
__device__ __forceinline__ i64 resolve(i64 index, i64 extent, i64 *fault, i64 step) {
    i64 place = index < 0 ? index + extent : index;
    if (place >= 0 && place < extent) return place;
    note_fault(fault, 1, step, index, extent);
    return 0;
}
__device__ __forceinline__ i64 divide(i64 a, i64 b, i64 *fault, i64 step) {
    if (b == 0) { note_fault(fault, 2, step, a, b); return 0; }
    return b == -1 ? (i64)(0 - (u64)a) : a / b;
}
__device__ __forceinline__ i64 remainder_of(i64 a, i64 b, i64 *fault, i64 step) {
    if (b == 0) { note_fault(fault, 2, step, a, b); return 0; }
    return b == -1 ? 0 : a % b;
}
__device__ __forceinline__ i64 modulo(i64 a, i64 b, i64 *fault, i64 step) {
    i64 rest = remainder_of(a, b, fault, step);
    return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}

struct Add { template <class T> __device__ __forceinline__ T operator()(T a, T b) const { return add(a, b); } };
struct Multiply { template <class T> __device__ __forceinline__ T operator()(T a, T b) const { return multiply(a, b); } };
struct Maximum { template <class T> __device__ __forceinline__ T operator()(T a, T b) const { return maximum(a, b); } };
struct Minimum { template <class T> __device__ __forceinline__ T operator()(T a, T b) const { return minimum(a, b); } };

// Every lane's `x` combined, in every lane. A block has whole warps, or one thread.
template <class T, class Op> __device__ __forceinline__ T warp_reduce(T x, Op op) {
    if (blockDim.x == 1) return x;
    for (int step = 16; step > 0; step /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
// Every thread's `x` combined, the same in every thread.
template <class T, class Op> __device__ __forceinline__ T block_reduce(T x, Op op) {
    SHARED(T, partial, 32);
    if (blockDim.x == 1) return x;
    x = warp_reduce(x, op);
    // What an earlier call left there has been read.
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    T all = partial[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; warp++) all = op(all, partial[warp]);
    return all;
}

// The element of a dim that a padded place shows.
__device__ __forceinline__ i64 pad_edge(i64 place, i64 extent) { return place < 0 ? 0 : place >= extent ? extent - 1 : place; }
__device__ __forceinline__ i64 pad_wrap(i64 place, i64 extent) { return ((place % extent) + extent) % extent; }
__device__ __forceinline__ i64 pad_reflect(i64 place, i64 extent) {
    if (extent == 1) return 0;
    i64 phase = pad_wrap(place, 2 * (extent - 1));
    return phase < extent ? phase : 2 * (extent - 1) - phase;
}
