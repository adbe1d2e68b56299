extern "C" __global__ void __launch_bounds__(32) rms_norm_f32(const float *x, const float *scale, float *y, float r1, i64 n0, i64 n1) {
    for (i64 row = blockIdx.x; row < n0; row += gridDim.x) {
        i64 from = row * n1;
        i64 to = row * n1;
        float squares = 0;
        for (i64 j = threadIdx.x; j < n1; j += blockDim.x) {
            float d = wide(x[from + j]);
            squares += d * d;
        }
        squares = block_reduce(squares, Add());
        float factor = 1 / sqrtf(squares / n1 + r1);
        for (i64 j = threadIdx.x; j < n1; j += blockDim.x) {
            put(y + (to + j), (wide(x[from + j])) * factor * wide(scale[j]));
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) product_parts_f32(const float *left, const float *right, float *y, i64 n0, i64 n1, i64 n2) {
    SHARED(float, partial, 8 * 32 * 4);
    unsigned lanes = blockDim.x < 32 ? 1 : 32;
    unsigned lane = threadIdx.x % lanes, warp = threadIdx.x / lanes, warps = blockDim.x / lanes;
    for (i64 base = blockIdx.x * (i64)lanes * 4; base < n0; base += gridDim.x * (i64)lanes * 4) {
        i64 column = base + lane * 4;
        float sums_of[4][4] = {};
        for (i64 k = blockIdx.y * warps + warp; k < n1; k += gridDim.y * warps) {
            float w[4] = {};
            const float *from = right + (k * n0 + column);
            if (column + 4 <= n0 && (u64)from % 16 == 0) {
                Pack<float, 4, 16> pack = *reinterpret_cast<const Pack<float, 4, 16> *>(from);
                UNROLL
                for (int j = 0; j < 4; j++) w[j] = wide(pack.e[j]);
            } else {
                UNROLL
                for (int j = 0; j < 4; j++) if (column + j < n0) w[j] = wide(from[j]);
            }
            UNROLL
            for (int m = 0; m < 4; m++) {
                if (m < n2) {
                    float x = wide(left[0 + m * n1 + k]);
                    UNROLL
                    for (int j = 0; j < 4; j++) sums_of[m][j] += x * w[j];
                }
            }
        }
        UNROLL
        for (int m = 0; m < 4; m++) {
            if (m < n2) {
                __syncthreads();
                UNROLL
                for (int j = 0; j < 4; j++) partial[(warp * lanes + lane) * 4 + j] = sums_of[m][j];
                __syncthreads();
                for (i64 c = threadIdx.x; c < lanes * 4 && base + c < n0; c += blockDim.x) {
                    float sum = 0;
                    for (unsigned other = 0; other < warps; other++) sum += partial[other * lanes * 4 + c];
                    i64 o = base + c;
                    put(y + (0 + m * n0 + o), sum);
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) product_f32(const float *left, const float *right, float *y, i64 n0, i64 n1, i64 n2, i64 n3) {
    SHARED(float, left_tile, 16 * 65);
    SHARED(float, right_tile, 16 * 65);
    for (i64 batch = blockIdx.z; batch < n3; batch += gridDim.z) {
        i64 left_batch = 0;
        i64 right_batch = 0;
        i64 y_batch = 0;
        for (i64 row0 = blockIdx.y * 64LL; row0 < n0; row0 += gridDim.y * 64LL) {
            for (i64 column0 = blockIdx.x * 64LL; column0 < n1; column0 += gridDim.x * 64LL) {
                for (unsigned t = threadIdx.x; t < 256; t += blockDim.x) {
                    i64 row = row0 + t / 16, column = column0 + t % 16;
                    if (blockDim.x == 1 && (row >= n0 || column >= n1)) continue;
                    float sums[4][4] = {};
                    for (i64 k0 = 0; k0 < n2; k0 += 16) {
                        __syncthreads();
                        for (unsigned e = threadIdx.x; e < 1024; e += blockDim.x) {
                            unsigned p = e / 16, q = e % 16;
                            i64 o = row0 + p, k = k0 + q;
                            float x = 0;
                            if (o < n0 && k < n2) {
                                x = wide(left[left_batch + o * n2 + k]);
                            }
                            left_tile[q * 65 + p] = x;
                        }
                        for (unsigned e = threadIdx.x; e < 1024; e += blockDim.x) {
                            unsigned p = e % 64, q = e / 64;
                            i64 o = column0 + p, k = k0 + q;
                            float x = 0;
                            if (o < n1 && k < n2) {
                                x = wide(right[right_batch + o + k * n1]);
                            }
                            right_tile[q * 65 + p] = x;
                        }
                        __syncthreads();
                        UNROLL
                        for (int q = 0; q < 16; q++) {
                            UNROLL
                            for (int m = 0; m < 4; m++) {
                                UNROLL
                                for (int n = 0; n < 4; n++) {
                                    sums[m][n] += left_tile[q * 65 + t / 16 + 16 * m] * right_tile[q * 65 + t % 16 + 16 * n];
                                }
                            }
                        }
                    }
                    UNROLL
                    for (int m = 0; m < 4; m++) {
                        UNROLL
                        for (int n = 0; n < 4; n++) {
                            i64 r = row + 16 * m, c = column + 16 * n;
                            if (r < n0 && c < n1) {
                                put(y + (y_batch + r * n1 + c), sums[m][n]);
                            }
                        }
                    }
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) sigmoid_mul_f32(const float *a0, float *y, i64 n0) {
    for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < n0; i += gridDim.x * (i64)blockDim.x) {
        float x1 = wide(a0[i]);
        float x2 = sigmoid(x1);
        float x3 = x1 * x2;
        put(y + i, x3);
    }
}

extern "C" __global__ void __launch_bounds__(256) add_f32(const float *a0, const float *a1, float *y, i64 n0) {
    for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < n0; i += gridDim.x * (i64)blockDim.x) {
        float x1 = wide(a0[i]);
        float x2 = wide(a1[i]);
        float x3 = x1 + x2;
        put(y + i, x3);
    }
}
