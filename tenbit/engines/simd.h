// What the kernels share: FP32, FP16 and BF16 in storage as vectors of FP32, exp, and sums across lanes.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace tenbit {


enum Dtype : int { kF32 = 0, kF16 = 1, kBF16 = 2 };

template <int T> struct Store;

template <> struct Store<kF32> {
    using type = float;
    static __m512 load(const float* p) { return _mm512_loadu_ps(p); }
    static __m512 load(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
    static void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
    static void store(float* p, __mmask16 m, __m512 v) { _mm512_mask_storeu_ps(p, m, v); }
    static __m512 round(__m512 v) { return v; }
    static float one(float x) { return x; }
};

template <> struct Store<kF16> {
    using type = uint16_t;
    static constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    static __m512 load(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
    static __m512 load(const uint16_t* p, __mmask16 m) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)); }
    static __m256i half(__m512 v) { return _mm512_cvtps_ph(v, kNearest); }
    static void store(uint16_t* p, __m512 v) { _mm256_storeu_si256((__m256i*)p, half(v)); }
    static void store(uint16_t* p, __mmask16 m, __m512 v) { _mm256_mask_storeu_epi16(p, m, half(v)); }
    static __m512 round(__m512 v) { return _mm512_cvtph_ps(half(v)); }
    static float one(uint16_t x) { return _cvtsh_ss(x); }
};

// BF16, round to nearest even.
inline __m256i bf16_bits(__m512 v) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(v);
#else
    const __m512i x = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
#endif
}

inline __m512 bf16_floats(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

template <> struct Store<kBF16> {
    using type = uint16_t;
    static __m512 load(const uint16_t* p) { return bf16_floats(_mm256_loadu_si256((const __m256i*)p)); }
    static __m512 load(const uint16_t* p, __mmask16 m) { return bf16_floats(_mm256_maskz_loadu_epi16(m, p)); }
    static void store(uint16_t* p, __m512 v) { _mm256_storeu_si256((__m256i*)p, bf16_bits(v)); }
    static void store(uint16_t* p, __mmask16 m, __m512 v) { _mm256_mask_storeu_epi16(p, m, bf16_bits(v)); }
    static __m512 round(__m512 v) { return bf16_floats(bf16_bits(v)); }
    static float one(uint16_t x) {
        const uint32_t bits = (uint32_t)x << 16;
        float out;
        std::memcpy(&out, &bits, 4);
        return out;
    }
};

// exp to about one unit in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
inline __m512 exp_ps(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

// Within each quarter of the result, lane i is the sum over the same quarter of v[i].
inline __m512 sums4(const __m512* v) {
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}

// Of four results of sums4: lane 4 q + i is the sum over all lanes of vector i of the q-th.
inline __m512 sums16(const __m512* quarter) {
    __m512 c[2];
    for (int i = 0; i < 2; ++i)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quarter[2 * i], quarter[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(quarter[2 * i], quarter[2 * i + 1], 0xDD));
    return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xDD));
}

// The first `count` lanes, all where it is 16 or more.
inline __mmask16 lanes(int64_t count) {
    return count >= 16 ? 0xffff : (__mmask16)((1u << std::max<int64_t>(count, 0)) - 1);
}

}  // namespace tenbit
