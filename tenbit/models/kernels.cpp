// What lies between the matrix products of a Llama-like block, forward and backward, for CPUs with AVX-512: residual
// add and RMSNorm, norms per head and rotary embedding, SiLU times gate, sums over rows. kernels.py compiles this
// file on first use and calls it by ctypes.
//
// Storage is FP32, FP16 or BF16; arithmetic is FP32. Forward, values are rounded to storage exactly where the library's
// modules round them; backward, once, when a gradient is stored. Sums over rows (gradients of weights) are taken in
// parts whose number depends on the number of rows only, so results do not depend on the number of threads.
#include <omp.h>

#include <vector>

#include "simd.h"

using namespace tenbit;

namespace {

inline __m512 zero() { return _mm512_setzero_ps(); }
inline __m512 all(float x) { return _mm512_set1_ps(x); }

int64_t parts_of(int64_t n) { return std::min<int64_t>(64, std::max<int64_t>(1, n / 32)); }

// FP32 sums [parts, d], and their total in storage.
struct Sums {
    int64_t parts, d;
    std::vector<float> memory;
    Sums(int64_t parts, int64_t d, bool wanted) : parts(parts), d(d), memory(wanted ? parts * d : 0) {}
    float* part(int64_t p) { return memory.empty() ? nullptr : memory.data() + p * d; }
    template <int T> void total(typename Store<T>::type* out) {
        if (memory.empty()) return;
        for (int64_t i = 0; i < d; i += 16) {
            const __mmask16 m = lanes(d - i);
            __m512 sum = zero();
            for (int64_t p = 0; p < parts; ++p) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(m, part(p) + i));
            Store<T>::store(out + i, m, sum);
        }
    }
};

inline void add_to(float* sum, __mmask16 m, __m512 v) {
    _mm512_mask_storeu_ps(sum, m, _mm512_add_ps(_mm512_maskz_loadu_ps(m, sum), v));
}

// ---- RMSNorm

// out = round(weight * round(x / rms(x))); the result is 1 / rms(x).
template <int T> float norm_row(const typename Store<T>::type* x, const typename Store<T>::type* weight,
                                typename Store<T>::type* out, int64_t d, float eps) {
    using S = Store<T>;
    __m512 squares = zero();
    for (int64_t i = 0; i < d; i += 16) {
        const __m512 v = S::load(x + i, lanes(d - i));
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const float inverse = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / (float)d + eps);
    for (int64_t i = 0; i < d; i += 16) {
        const __mmask16 m = lanes(d - i);
        const __m512 normed = S::round(_mm512_mul_ps(S::load(x + i, m), all(inverse)));
        S::store(out + i, m, _mm512_mul_ps(S::load(weight + i, m), normed));
    }
    return inverse;
}

// With h = x / rms(x) and the gradient g of weight * h:
// dx = (g weight - h mean(g weight h)) / rms(x), plus `add` where given; `sum` += g h. G is the storage of g.
template <int T, int G>
void norm_row_grad(const typename Store<G>::type* g, const typename Store<T>::type* x,
                   const typename Store<T>::type* weight, const typename Store<T>::type* add, float inverse,
                   typename Store<T>::type* dx, float* sum, int64_t d) {
    using S = Store<T>;
    __m512 dots = zero();
    for (int64_t i = 0; i < d; i += 16) {
        const __mmask16 m = lanes(d - i);
        const __m512 gw = _mm512_mul_ps(Store<G>::load(g + i, m), S::load(weight + i, m));
        dots = _mm512_fmadd_ps(gw, S::load(x + i, m), dots);
    }
    const __m512 scale = all(inverse), mean = all(_mm512_reduce_add_ps(dots) * inverse / (float)d);
    for (int64_t i = 0; i < d; i += 16) {
        const __mmask16 m = lanes(d - i);
        const __m512 gradient = Store<G>::load(g + i, m), h = _mm512_mul_ps(S::load(x + i, m), scale);
        if (sum) add_to(sum + i, m, _mm512_mul_ps(gradient, S::round(h)));
        __m512 out = _mm512_mul_ps(_mm512_fnmadd_ps(h, mean, _mm512_mul_ps(gradient, S::load(weight + i, m))), scale);
        if (add) out = _mm512_add_ps(out, S::load(add + i, m));
        S::store(dx + i, m, out);
    }
}

// sum = x + y where y is given, else x itself; out = norm(sum). Rows of d.
template <int T> void add_norm(const void* x_, const void* y_, const void* weight, void* sum_, void* out_,
                               float* inverse, int64_t n, int64_t d, float eps) {
    using S = Store<T>;
    using E = typename S::type;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n; ++r) {
        const E* x = (const E*)x_ + r * d;
        if (y_) {
            const E* y = (const E*)y_ + r * d;
            E* sum = (E*)sum_ + r * d;
            for (int64_t i = 0; i < d; i += 16) {
                const __mmask16 m = lanes(d - i);
                S::store(sum + i, m, _mm512_add_ps(S::load(x + i, m), S::load(y + i, m)));
            }
            x = sum;
        }
        inverse[r] = norm_row<T>(x, (const E*)weight, (E*)out_ + r * d, d, eps);
    }
}

template <int T> void norm_grad(const void* g, const void* x, const void* weight, const void* add, const float* inverse,
                                void* dx, void* dweight, int64_t n, int64_t d) {
    using E = typename Store<T>::type;
    Sums sums(parts_of(n), d, dweight);
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < sums.parts; ++p)
        for (int64_t r = p * n / sums.parts; r < (p + 1) * n / sums.parts; ++r)
            norm_row_grad<T, T>((const E*)g + r * d, (const E*)x + r * d, (const E*)weight,
                                add ? (const E*)add + r * d : nullptr, inverse[r], (E*)dx + r * d, sums.part(p), d);
    sums.total<T>((E*)dweight);
}

// ---- norms per head and rotary embedding

struct Heads {
    int64_t queries, keys, d, length, per_row;  // per_row: cos and sin are given per sequence, not once for all
    int64_t turned() const { return queries + keys; }
    int64_t width() const { return (queries + 2 * keys) * d; }
    int64_t at(int64_t r) const { return (per_row ? r : r % length) * d; }
};

constexpr int64_t kMaxHead = 512;

// Rows [q, k, v] -> rows [q, k] normed where a weight is given, then rotated. `inverse` [n, turned].
template <int T> void rotate(const void* qkv, const Heads& of, const void* q_norm, const void* k_norm, float eps,
                             const void* cos_, const void* sin_, void* out_, float* inverse, int64_t n) {
    using S = Store<T>;
    using E = typename S::type;
    const int64_t d = of.d, half = d / 2;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n; ++r) {
        const E *cos = (const E*)cos_ + of.at(r), *sin = (const E*)sin_ + of.at(r);
        const E* x = (const E*)qkv + r * of.width();
        E* out = (E*)out_ + r * of.turned() * d;
        E normed[kMaxHead];
        for (int64_t h = 0; h < of.turned(); ++h, x += d, out += d) {
            const E* weight = (const E*)(h < of.queries ? q_norm : k_norm);
            if (weight) inverse[r * of.turned() + h] = norm_row<T>(x, weight, normed, d, eps);
            const E* in = weight ? normed : x;
            for (int64_t i = 0; i < half; i += 16) {
                const __mmask16 m = lanes(half - i);
                const __m512 a = S::load(in + i, m), b = S::load(in + half + i, m);
                S::store(out + i, m, _mm512_sub_ps(S::round(_mm512_mul_ps(a, S::load(cos + i, m))),
                                                   S::round(_mm512_mul_ps(b, S::load(sin + i, m)))));
                S::store(out + half + i, m, _mm512_add_ps(S::round(_mm512_mul_ps(b, S::load(cos + half + i, m))),
                                                          S::round(_mm512_mul_ps(a, S::load(sin + half + i, m)))));
            }
        }
    }
}

// FP32 gradients of q [n, queries, d], k and v [n, keys, d] -> that of rows [q, k, v], and of the norms' weights.
template <int T>
void rotate_grad(const float* dq, const float* dk, const float* dv, const void* qkv, const Heads& of,
                 const void* q_norm, const void* k_norm, const float* inverse, const void* cos_, const void* sin_,
                 void* dqkv, void* dq_norm, void* dk_norm, int64_t n) {
    using S = Store<T>;
    using E = typename S::type;
    const int64_t d = of.d, half = d / 2;
    Sums q_sums(parts_of(n), d, dq_norm), k_sums(parts_of(n), d, dk_norm);
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < q_sums.parts; ++p)
        for (int64_t r = p * n / q_sums.parts; r < (p + 1) * n / q_sums.parts; ++r) {
            const E *cos = (const E*)cos_ + of.at(r), *sin = (const E*)sin_ + of.at(r);
            const E* x = (const E*)qkv + r * of.width();
            E* out = (E*)dqkv + r * of.width();
            float back[kMaxHead];
            for (int64_t h = 0; h < of.turned(); ++h, x += d, out += d) {
                const bool query = h < of.queries;
                const float* g = query ? dq + (r * of.queries + h) * d : dk + (r * of.keys + h - of.queries) * d;
                for (int64_t i = 0; i < half; i += 16) {
                    const __mmask16 m = lanes(half - i);
                    const __m512 a = _mm512_maskz_loadu_ps(m, g + i), b = _mm512_maskz_loadu_ps(m, g + half + i);
                    const __m512 first = _mm512_fmadd_ps(a, S::load(cos + i, m), _mm512_mul_ps(b, S::load(sin + half + i, m)));
                    const __m512 second = _mm512_fmsub_ps(b, S::load(cos + half + i, m), _mm512_mul_ps(a, S::load(sin + i, m)));
                    _mm512_mask_storeu_ps(back + i, m, first);
                    _mm512_mask_storeu_ps(back + half + i, m, second);
                }
                const E* weight = (const E*)(query ? q_norm : k_norm);
                if (weight)
                    norm_row_grad<T, kF32>(back, x, weight, nullptr, inverse[r * of.turned() + h], out,
                                           (query ? q_sums : k_sums).part(p), d);
                else
                    for (int64_t i = 0; i < d; i += 16)
                        S::store(out + i, lanes(d - i), _mm512_maskz_loadu_ps(lanes(d - i), back + i));
            }
            const float* g = dv + r * of.keys * d;
            for (int64_t i = 0; i < of.keys * d; i += 16)
                S::store(out + i, lanes(of.keys * d - i), _mm512_maskz_loadu_ps(lanes(of.keys * d - i), g + i));
        }
    q_sums.total<T>((E*)dq_norm);
    k_sums.total<T>((E*)dk_norm);
}

// ---- SiLU times gate

inline __m512 sigmoid(__m512 x) {
    return _mm512_div_ps(all(1.0f), _mm512_add_ps(all(1.0f), exp_ps(_mm512_sub_ps(zero(), x))));
}

// out = round(round(silu(gate)) * up), rows [gate, up] of 2 f.
template <int T> void silu_mul(const void* in_, void* out_, int64_t n, int64_t f) {
    using S = Store<T>;
    using E = typename S::type;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n; ++r) {
        const E* in = (const E*)in_ + r * 2 * f;
        E* out = (E*)out_ + r * f;
        for (int64_t i = 0; i < f; i += 16) {
            const __mmask16 m = lanes(f - i);
            const __m512 gate = S::load(in + i, m);
            const __m512 silu = _mm512_div_ps(gate, _mm512_add_ps(all(1.0f), exp_ps(_mm512_sub_ps(zero(), gate))));
            S::store(out + i, m, _mm512_mul_ps(S::round(silu), S::load(in + f + i, m)));
        }
    }
}

template <int T> void silu_mul_grad(const void* g_, const void* in_, void* din_, int64_t n, int64_t f) {
    using S = Store<T>;
    using E = typename S::type;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n; ++r) {
        const E *g = (const E*)g_ + r * f, *in = (const E*)in_ + r * 2 * f;
        E* din = (E*)din_ + r * 2 * f;
        for (int64_t i = 0; i < f; i += 16) {
            const __mmask16 m = lanes(f - i);
            const __m512 gate = S::load(in + i, m), up = S::load(in + f + i, m), gradient = S::load(g + i, m);
            const __m512 s = sigmoid(gate), silu = _mm512_mul_ps(gate, s);
            const __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(all(1.0f), s), s);
            S::store(din + i, m, _mm512_mul_ps(_mm512_mul_ps(gradient, up), slope));
            S::store(din + f + i, m, _mm512_mul_ps(gradient, S::round(silu)));
        }
    }
}

// ---- sums over rows

template <int T> void row_sum(const void* x_, void* out, int64_t n, int64_t d) {
    using S = Store<T>;
    using E = typename S::type;
    Sums sums(parts_of(n), d, true);
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < sums.parts; ++p)
        for (int64_t r = p * n / sums.parts; r < (p + 1) * n / sums.parts; ++r)
            for (int64_t i = 0; i < d; i += 16)
                add_to(sums.part(p) + i, lanes(d - i), S::load((const E*)x_ + r * d + i, lanes(d - i)));
    sums.total<T>((E*)out);
}

}  // namespace

#define BY_DTYPE(call)                                   \
    if (dtype == kF16) { constexpr int T = kF16; call; } \
    else if (dtype == kBF16) { constexpr int T = kBF16; call; } \
    else { constexpr int T = kF32; call; }

extern "C" {

void tb_add_norm(int dtype, const void* x, const void* y, const void* weight, void* sum, void* out, float* inverse,
                 int64_t n, int64_t d, float eps) {
    BY_DTYPE((add_norm<T>(x, y, weight, sum, out, inverse, n, d, eps)))
}

void tb_norm_grad(int dtype, const void* g, const void* x, const void* weight, const void* add, const float* inverse,
                  void* dx, void* dweight, int64_t n, int64_t d) {
    BY_DTYPE((norm_grad<T>(g, x, weight, add, inverse, dx, dweight, n, d)))
}

void tb_rotate(int dtype, const void* qkv, const int64_t* sizes, const void* q_norm, const void* k_norm, float eps,
               const void* cos, const void* sin, void* out, float* inverse, int64_t n) {
    const Heads of{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    BY_DTYPE((rotate<T>(qkv, of, q_norm, k_norm, eps, cos, sin, out, inverse, n)))
}

void tb_rotate_grad(int dtype, const float* dq, const float* dk, const float* dv, const void* qkv,
                    const int64_t* sizes, const void* q_norm, const void* k_norm, const float* inverse,
                    const void* cos, const void* sin, void* dqkv, void* dq_norm, void* dk_norm, int64_t n) {
    const Heads of{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    BY_DTYPE((rotate_grad<T>(dq, dk, dv, qkv, of, q_norm, k_norm, inverse, cos, sin, dqkv, dq_norm, dk_norm, n)))
}

void tb_silu_mul(int dtype, const void* in, void* out, int64_t n, int64_t f) { BY_DTYPE((silu_mul<T>(in, out, n, f))) }

void tb_silu_mul_grad(int dtype, const void* g, const void* in, void* din, int64_t n, int64_t f) {
    BY_DTYPE((silu_mul_grad<T>(g, in, din, n, f)))
}

void tb_row_sum(int dtype, const void* x, void* out, int64_t n, int64_t d) { BY_DTYPE((row_sum<T>(x, out, n, d))) }

}  // extern "C"
