// Kernels for decoding on CPUs with AVX-512: what lies between the matrix products of a Llama-like block, attention of
// one new token per row over the cache, and the drawing of tokens. native.py compiles this file on first use and calls
// it by ctypes; llama.py and sampling.py have the same operations in plain torch, and the tests hold one against the
// other.
//
// Storage is FP32, FP16 or BF16; arithmetic is FP32. Values are rounded to storage exactly where the library's modules
// round them, so the only freedom taken is the order of additions.
#include <omp.h>
#include <sys/mman.h>

#include <vector>

#include "simd.h"

using namespace tenbit;

namespace {

// ---- norms, rotary embedding, SiLU

// out = round(weight * round(x / rms(x))); d is a multiple of 16. `in` may be `out`.
template <int T> void norm_row(const typename Store<T>::type* in, const typename Store<T>::type* weight,
                               typename Store<T>::type* out, int64_t d, float eps) {
    using S = Store<T>;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < d; i += 16) {
        const __m512 x = S::load(in + i);
        squares = _mm512_fmadd_ps(x, x, squares);
    }
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / (float)d + eps));
    for (int64_t i = 0; i < d; i += 16)
        S::store(out + i, _mm512_mul_ps(S::load(weight + i), S::round(_mm512_mul_ps(S::load(in + i), scale))));
}

// x += y where y is given, then out = norm(x). Rows of d.
template <int T> void add_norm(void* x_, const void* y_, const void* weight, void* out_, int64_t n, int64_t d,
                               float eps) {
    using S = Store<T>;
    using E = typename S::type;
    E *x = (E*)x_, *out = (E*)out_;
    const E* y = (const E*)y_;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n; ++r) {
        if (y)
            for (int64_t i = r * d; i < (r + 1) * d; i += 16)
                S::store(x + i, _mm512_add_ps(S::load(x + i), S::load(y + i)));
        norm_row<T>(x + r * d, (const E*)weight, out + r * d, d, eps);
    }
}

// out = round(round(silu(gate)) * up), rows [gate, up] of 2 f.
template <int T> void silu_mul(const void* in_, void* out_, int64_t n, int64_t f) {
    using S = Store<T>;
    using E = typename S::type;
    const __m512 one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n; ++r) {
        const E* in = (const E*)in_ + r * 2 * f;
        E* out = (E*)out_ + r * f;
        for (int64_t i = 0; i < f; i += 16) {
            const __m512 gate = S::load(in + i);
            const __m512 silu = _mm512_div_ps(gate, _mm512_add_ps(one, exp_ps(_mm512_sub_ps(zero, gate))));
            S::store(out + i, _mm512_mul_ps(S::round(silu), S::load(in + f + i)));
        }
    }
}

// In place on the queries and keys of rows [q, k, v]: norm per head where a weight is given, then rotation.
template <int T> void rotate(void* qkv_, int64_t n, int64_t heads, int64_t kv_heads, int64_t d, const void* q_norm,
                             const void* k_norm, float eps, const void* cos_, const void* sin_,
                             const int64_t* position) {
    using S = Store<T>;
    using E = typename S::type;
    const int64_t half = d / 2;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n; ++r) {
        const E *cos = (const E*)cos_ + position[r] * d, *sin = (const E*)sin_ + position[r] * d;
        E* x = (E*)qkv_ + r * (heads + 2 * kv_heads) * d;
        for (int64_t h = 0; h < heads + kv_heads; ++h, x += d) {
            const E* weight = (const E*)(h < heads ? q_norm : k_norm);
            if (weight) norm_row<T>(x, weight, x, d, eps);
            for (int64_t i = 0; i < half; i += 16) {
                const __mmask16 m = lanes(half - i);
                const __m512 a = S::load(x + i, m), b = S::load(x + half + i, m);
                const __m512 first = _mm512_sub_ps(S::round(_mm512_mul_ps(a, S::load(cos + i, m))),
                                                   S::round(_mm512_mul_ps(b, S::load(sin + i, m))));
                const __m512 second = _mm512_add_ps(S::round(_mm512_mul_ps(b, S::load(cos + half + i, m))),
                                                    S::round(_mm512_mul_ps(a, S::load(sin + half + i, m))));
                S::store(x + i, m, first);
                S::store(x + half + i, m, second);
            }
        }
    }
}

// ---- attention of one new token per row over the cache

// G query heads that share a key head; head_dim = 16 * D. Scores, softmax, weighted sum of values; all FP32.
// Keys are read in blocks of 16 positions, the last of which may reach beyond `length` (capacity is a multiple of 16);
// what lies there does not count. The cache streams from memory: while keys are read, values are fetched, and while
// values are read, the keys at `next`.
template <int T, int D, int G>
void attend_heads(const typename Store<T>::type* q, const typename Store<T>::type* keys,
                  const typename Store<T>::type* values, const typename Store<T>::type* next, int64_t length,
                  float scale, float* scores, typename Store<T>::type* out) {
    using S = Store<T>;
    using E = typename S::type;
    constexpr int kLines = D * 16 * sizeof(E) / 64 ? D * 16 * sizeof(E) / 64 : 1;
    const int64_t stride = (length + 15) / 16 * 16;
    __m512 query[G][D], high[G];
    for (int g = 0; g < G; ++g) {
        high[g] = _mm512_set1_ps(-INFINITY);
        for (int i = 0; i < D; ++i) query[g][i] = S::load(q + (g * D + i) * 16);
    }
    for (int64_t s = 0; s < length; s += 16) {
        __m512 quarter[G][4];
        for (int j = 0; j < 4; ++j) {
            const E* key = keys + (s + 4 * j) * D * 16;
            __m512 part[G][4];
#pragma GCC unroll 4
            for (int m = 0; m < 4; ++m) {
                for (int line = 0; line < kLines; ++line)
                    _mm_prefetch((const char*)(values + (s + 4 * j + m) * D * 16) + 64 * line, _MM_HINT_T0);
#pragma GCC unroll 16
                for (int i = 0; i < D; ++i) {
                    const __m512 k = S::load(key + (m * D + i) * 16);
#pragma GCC unroll 2
                    for (int g = 0; g < G; ++g)
                        part[g][m] = i ? _mm512_fmadd_ps(query[g][i], k, part[g][m]) : _mm512_mul_ps(query[g][i], k);
                }
            }
#pragma GCC unroll 2
            for (int g = 0; g < G; ++g) quarter[g][j] = sums4(part[g]);
        }
        for (int g = 0; g < G; ++g) {
            const __m512 dot = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), lanes(length - s), sums16(quarter[g]),
                                                  _mm512_set1_ps(scale));
            high[g] = _mm512_max_ps(high[g], dot);
            _mm512_storeu_ps(scores + g * stride + s, dot);
        }
    }
    __m512 total[G];
    for (int g = 0; g < G; ++g) {
        const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(high[g]));
        total[g] = _mm512_setzero_ps();
        for (int64_t s = 0; s < stride; s += 16) {
            const __m512 e = exp_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + g * stride + s), top));
            total[g] = _mm512_add_ps(total[g], e);
            _mm512_storeu_ps(scores + g * stride + s, e);
        }
    }
    __m512 sum[G][D];
    for (int g = 0; g < G; ++g)
        for (int i = 0; i < D; ++i) sum[g][i] = _mm512_setzero_ps();
    for (int64_t s = 0; s < length; ++s) {
        __m512 weight[G];
        for (int g = 0; g < G; ++g) weight[g] = _mm512_set1_ps(scores[g * stride + s]);
        for (int line = 0; line < kLines; ++line)
            _mm_prefetch((const char*)(next + s * D * 16) + 64 * line, _MM_HINT_T0);
#pragma GCC unroll 16
        for (int i = 0; i < D; ++i) {
            const __m512 v = S::load(values + (s * D + i) * 16);
            for (int g = 0; g < G; ++g) sum[g][i] = _mm512_fmadd_ps(weight[g], v, sum[g][i]);
        }
    }
    for (int g = 0; g < G; ++g) {
        const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total[g]));
        for (int i = 0; i < D; ++i) S::store(out + (g * D + i) * 16, _mm512_mul_ps(sum[g][i], inverse));
    }
}

// Stores each row's key and value at its position, then attends to positions up to it.
// qkv [n, heads + 2 kv_heads, 16 D]; keys, values [rows, kv_heads, capacity, 16 D], capacity a multiple of 16;
// out [n, heads, 16 D].
template <int T, int D>
void attend(const void* qkv_, void* keys_, void* values_, const int64_t* position, void* out_, int64_t n,
            int64_t heads, int64_t kv_heads, int64_t capacity) {
    using E = typename Store<T>::type;
    const int64_t d = 16 * D, group = heads / kv_heads;
    const float scale = 1.0f / std::sqrt((float)d);
#pragma omp parallel
    {
        std::vector<float> scores;
#pragma omp for schedule(dynamic, 4)
        for (int64_t task = 0; task < n * kv_heads; ++task) {
            const int64_t r = task / kv_heads, h = task % kv_heads, length = position[r] + 1;
            const E* row = (const E*)qkv_ + r * (heads + 2 * kv_heads) * d;
            E* keys = (E*)keys_ + (r * kv_heads + h) * capacity * d;
            E* values = (E*)values_ + (r * kv_heads + h) * capacity * d;
            std::memcpy(keys + position[r] * d, row + (heads + h) * d, d * sizeof(E));
            std::memcpy(values + position[r] * d, row + (heads + kv_heads + h) * d, d * sizeof(E));
            scores.resize(2 * ((length + 15) / 16 * 16));
            E* out = (E*)out_ + (r * heads + h * group) * d;
            const E* q = row + h * group * d;
            int64_t g = 0;
            for (; g + 2 <= group; g += 2) {
                const E* next = g + 2 < group ? keys : keys + capacity * d;
                attend_heads<T, D, 2>(q + g * d, keys, values, next, length, scale, scores.data(), out + g * d);
            }
            if (g < group)
                attend_heads<T, D, 1>(q + g * d, keys, values, keys + capacity * d, length, scale, scores.data(),
                                      out + g * d);
        }
    }
}

// ---- drawing a token

// As sampling.draw without truncation: token and log mu of each row of logits [n, v]; NaN where one is not finite.
template <int T> void draw(const void* logits_, const float* uniform, float temperature, int64_t n, int64_t v,
                           int64_t* tokens, float* logp) {
    using S = Store<T>;
    using E = typename S::type;
    constexpr int64_t kBlock = 256;
    const __m512 inverse = _mm512_set1_ps(1.0f / temperature), floor = _mm512_set1_ps(-INFINITY);
#pragma omp parallel
    {
        std::vector<double> sums((v + kBlock - 1) / kBlock);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < n; ++r) {
            const E* x = (const E*)logits_ + r * v;
            // 16 logits from i; beyond the end -inf.
            const auto at = [&](int64_t i) {
                if (i + 16 <= v) return S::load(x + i);
                return _mm512_mask_mov_ps(floor, lanes(v - i), S::load(x + i, lanes(v - i)));
            };
            __m512 high = floor;
            __mmask16 finite = 0xffff;
            for (int64_t i = 0; i < v; i += 16) {
                const __m512 s = at(i);
                high = _mm512_max_ps(high, s);
                // Not finite: NaN, +inf or -inf.
                finite &= (__mmask16)~_mm512_mask_fpclass_ps_mask(lanes(v - i), s, 0x99);
            }
            if (finite != 0xffff) {
                tokens[r] = 0, logp[r] = NAN;
                continue;
            }
            const float top_one = _mm512_reduce_max_ps(high);
            const __m512 top = _mm512_set1_ps(top_one);
            const auto weights = [&](int64_t i) { return exp_ps(_mm512_mul_ps(_mm512_sub_ps(at(i), top), inverse)); };
            double total = 0.0;
            for (int64_t b = 0; b < (int64_t)sums.size(); ++b) {
                __m512 sum = _mm512_setzero_ps();
                for (int64_t i = b * kBlock; i < std::min(v, (b + 1) * kBlock); i += 16)
                    sum = _mm512_add_ps(sum, weights(i));
                sums[b] = _mm512_reduce_add_ps(sum);
                total += sums[b];
            }
            // The first token whose cumulated weight exceeds the target. One of weight 0 never does.
            const double target = (double)uniform[r] * total;
            double below = 0.0;
            int64_t b = 0, last_block = 0;
            for (; b < (int64_t)sums.size(); ++b) {
                if (sums[b] > 0.0) last_block = b;
                if (below + sums[b] > target) break;
                below += sums[b];
            }
            if (b == (int64_t)sums.size()) b = last_block;
            int64_t token = -1;
            bool found = false;
            for (int64_t i = b * kBlock; i < std::min(v, (b + 1) * kBlock) && !found; i += 16) {
                alignas(64) float e[16];
                _mm512_store_ps(e, weights(i));
                for (int64_t j = 0; j < std::min<int64_t>(16, v - i) && !found; ++j) {
                    if (e[j] <= 0.0f) continue;
                    below += e[j];
                    token = i + j;
                    found = below > target;
                }
            }
            tokens[r] = token;
            logp[r] = (S::one(x[token]) - top_one) / temperature - (float)std::log(total);
        }
    }
}

}  // namespace

// ---- what native.py calls. Pointers are to contiguous memory; sizes are int64.

#define BY_DTYPE(call_f32, call_f16, call_bf16) \
    switch (dtype) {                            \
        case kF32: call_f32; break;             \
        case kF16: call_f16; break;             \
        case kBF16: call_bf16; break;           \
    }

extern "C" {

// Asks for large pages for memory that is about to be used for the first time.
void tb_large_pages(void* memory, int64_t bytes) {
    const uintptr_t page = 4096, first = ((uintptr_t)memory + page - 1) / page * page;
    const uintptr_t last = ((uintptr_t)memory + bytes) / page * page;
    if (last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);
}

void tb_add_norm(int dtype, void* x, const void* y, const void* weight, void* out, int64_t n, int64_t d, float eps) {
    BY_DTYPE(add_norm<kF32>(x, y, weight, out, n, d, eps), add_norm<kF16>(x, y, weight, out, n, d, eps),
             add_norm<kBF16>(x, y, weight, out, n, d, eps))
}

void tb_silu_mul(int dtype, const void* in, void* out, int64_t n, int64_t f) {
    BY_DTYPE(silu_mul<kF32>(in, out, n, f), silu_mul<kF16>(in, out, n, f), silu_mul<kBF16>(in, out, n, f))
}

void tb_rotate(int dtype, void* qkv, int64_t n, int64_t heads, int64_t kv_heads, int64_t d, const void* q_norm,
               const void* k_norm, float eps, const void* cos, const void* sin, const int64_t* position) {
#define CALL(T) rotate<T>(qkv, n, heads, kv_heads, d, q_norm, k_norm, eps, cos, sin, position)
    BY_DTYPE(CALL(kF32), CALL(kF16), CALL(kBF16))
#undef CALL
}

// Returns 0, or 1 for a head_dim that was not compiled.
int tb_attend(int dtype, const void* qkv, void* keys, void* values, const int64_t* position, void* out, int64_t n,
              int64_t heads, int64_t kv_heads, int64_t d, int64_t capacity) {
#define CALL(T, D) attend<T, D>(qkv, keys, values, position, out, n, heads, kv_heads, capacity)
#define CASE(D) \
    case 16 * D: BY_DTYPE(CALL(kF32, D), CALL(kF16, D), CALL(kBF16, D)) return 0;
    switch (d) { CASE(1) CASE(2) CASE(4) CASE(5) CASE(6) CASE(8) CASE(16) }
    return 1;
#undef CASE
#undef CALL
}

void tb_draw(int dtype, const void* logits, const float* uniform, float temperature, int64_t n, int64_t v,
             int64_t* tokens, float* logp) {
#define CALL(T) draw<T>(logits, uniform, temperature, n, v, tokens, logp)
    BY_DTYPE(CALL(kF32), CALL(kF16), CALL(kBF16))
#undef CALL
}

}  // extern "C"
