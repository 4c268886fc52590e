// Matrix products of FP16 and BF16 numbers on AMX tiles, sums in FP32: c = a b + bias, for operands stored by rows or by
// columns, so that it serves a linear layer forward and both products of its backward pass.
//
// The tiles multiply BF16 only. But an FP16 number x (11 significant bits) is exactly the sum of two BF16 numbers (8 bits
// each), hi = bf16(x) and lo = x - hi, so a b = hi hi' + lo hi' + hi lo' + lo lo', products that are exact and added in
// FP32. The last one is at most 2^-18 |a b|, a 128th of the rounding of an FP16 number, and is left out.
//
// Every element of c is summed over k in the same order, however the work is divided among threads.
#include <omp.h>

#include <cstdlib>
#include <memory>

#include "simd.h"

using namespace tenbit;

namespace {

constexpr int64_t kTile = 512;  // numbers in a tile: 16 rows of 32
constexpr int64_t kPanels = 4;  // panels of 32 rows of a that a thread works on at a time
constexpr int64_t kPacked = 32;  // steps of 32 along k for which it packs them: 512 KB, half of a level 2 cache or less
constexpr int64_t kDepth = 16;   // steps between two visits to the sums: 32 KB of b stay in the level 1 cache

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t columns[16] = {};
    uint8_t rows[16] = {};
    TileConfig() {
        for (int i = 0; i < 8; ++i) columns[i] = 64, rows[i] = 16;
    }
};

// Element (r, i) of an operand, i being summed over, lies at p[r * row + i * inner]; one of the strides is 1.
struct Operand {
    const uint16_t* p;
    int64_t rows, k, row, inner;
};

// Memory that grows and is kept, as fresh pages cost more than what is done with them.
struct Buffer {
    struct Free { void operator()(void* p) const { std::free(p); } };
    std::unique_ptr<void, Free> memory;
    int64_t size = 0;
    uint16_t* of(int64_t numbers) {
        if (numbers > size) {
            memory.reset();
            memory.reset(std::aligned_alloc(4096, (numbers * 2 + 4095) / 4096 * 4096));
            size = numbers;
        }
        return (uint16_t*)memory.get();
    }
};

// Vectors of 16 pairs: v[i] lane j <-> v[j] lane i.
inline void transpose(__m512i* v) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

inline void split(__m256i x, __m256i& hi, __m256i& lo) {
    const __m512 v = _mm512_cvtph_ps(x);
    hi = bf16_bits(v);
    lo = bf16_bits(_mm512_sub_ps(v, bf16_floats(hi)));
}

inline __m512i join(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }

// Pairs (low[j], high[j]).
inline __m512i interleave(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// 16 rows by 32 of k, as 16 vectors of pairs along k. `by_row`: one vector per row; else one per pair of k.
template <bool SPLIT> void fetch(const Operand& x, int64_t r, int64_t k, __m512i* hi, __m512i* lo, bool by_row) {
    for (int i = 0; i < 16; ++i) {
        const int64_t row = by_row ? r + i : r, inner = by_row ? k : k + 2 * i;
        const int64_t left = by_row ? x.k - k : x.rows - r;  // along the contiguous direction
        const uint16_t* p = x.p + row * x.row + inner * x.inner;
        __m256i first = _mm256_setzero_si256(), second = first;
        if (by_row ? row < x.rows : inner < x.k) first = _mm256_maskz_loadu_epi16(lanes(left), p);
        if (by_row ? row < x.rows : inner + 1 < x.k)
            second = by_row ? _mm256_maskz_loadu_epi16(lanes(left - 16), p + 16)
                            : _mm256_maskz_loadu_epi16(lanes(left), p + x.inner);
        __m256i h[2] = {first, second}, l[2];
        if (SPLIT) split(first, h[0], l[0]), split(second, h[1], l[1]);
        hi[i] = by_row ? join(h[0], h[1]) : interleave(h[0], h[1]);
        if (SPLIT) lo[i] = by_row ? join(l[0], l[1]) : interleave(l[0], l[1]);
    }
}

// 32 rows by 32 of k: two tiles, then, split, the two of lo. Tiles of a hold a vector per row, those of b one per pair.
template <bool SPLIT> void pack(const Operand& x, int64_t r, int64_t k, uint16_t* out, bool of_a) {
    const bool by_row = x.inner == 1;
    for (int t = 0; t < 2; ++t) {
        __m512i hi[16], lo[16];
        fetch<SPLIT>(x, r + 16 * t, k, hi, lo, by_row);
        if (by_row != of_a) {
            transpose(hi);
            if (SPLIT) transpose(lo);
        }
        for (int i = 0; i < 16; ++i) {
            _mm512_store_si512(out + t * kTile + i * 32, hi[i]);
            if (SPLIT) _mm512_store_si512(out + (2 + t) * kTile + i * 32, lo[i]);
        }
    }
}

inline void products() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

// One square of 32 x 32, over `steps` of 32 of k, onto the sums so far.
template <bool SPLIT> void square(const uint16_t* a, const uint16_t* b, int64_t steps, float* sums, bool first) {
    constexpr int64_t step = kTile * (SPLIT ? 4 : 2);
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 128);
        _tile_loadd(1, sums + 16, 128);
        _tile_loadd(2, sums + 512, 128);
        _tile_loadd(3, sums + 528, 128);
    }
    for (int64_t i = 0; i < steps; ++i, a += step, b += step) {
        if (SPLIT) {
            // (lo, hi'), (hi, hi'), (hi, lo'): each step loads one side only.
            _tile_loadd(4, a + 2 * kTile, 64);
            _tile_loadd(5, a + 3 * kTile, 64);
        }
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + kTile, 64);
        if (SPLIT) products();
        _tile_loadd(4, a, 64);
        _tile_loadd(5, a + kTile, 64);
        products();
        if (SPLIT) {
            _tile_loadd(6, b + 2 * kTile, 64);
            _tile_loadd(7, b + 3 * kTile, 64);
            products();
        }
    }
    _tile_stored(0, sums, 128);
        _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 512, 128);
        _tile_stored(3, sums + 528, 128);
}

template <int T> void store(const float* sums, const uint16_t* bias, uint16_t* c, int64_t rows, int64_t columns, int64_t width) {
    using S = Store<T>;
    for (int half = 0; half < 32; half += 16) {
        const __mmask16 m = lanes(columns - half);
        if (!m) continue;
        const __m512 add = bias ? S::load(bias + half, m) : _mm512_setzero_ps();
        for (int64_t r = 0; r < std::min<int64_t>(32, rows); ++r)
            S::store(c + r * width + half, m, _mm512_add_ps(_mm512_load_ps(sums + r * 32 + half), add));
    }
}

// Panels [i0, i1) of a by [j0, j1) of the packed b.
template <int T>
void block(const Operand& a, const uint16_t* pb, const uint16_t* bias, uint16_t* c, int64_t width, int64_t i0,
           int64_t i1, int64_t j0, int64_t j1) {
    constexpr bool kSplit = T == kF16;
    constexpr int64_t step = kTile * (kSplit ? 4 : 2);
    static thread_local Buffer a_buffer, sum_buffer;
    const int64_t steps = (a.k + 31) / 32, rows = i1 - i0;
    uint16_t* const pa = a_buffer.of(kPanels * kPacked * step);
    float* const sums = (float*)sum_buffer.of(rows * (j1 - j0) * 2048);
    for (int64_t from = 0; from < steps; from += kPacked) {
        const int64_t to = std::min(steps, from + kPacked);
        const bool by_row = a.inner == 1;  // in the order in which it lies in memory
        for (int64_t x = 0; x < (by_row ? rows : to - from); ++x)
            for (int64_t y = 0; y < (by_row ? to - from : rows); ++y) {
                const int64_t i = by_row ? x : y, s = by_row ? y : x;
                pack<kSplit>(a, (i0 + i) * 32, (from + s) * 32, pa + (i * kPacked + s) * step, true);
            }
        for (int64_t j = j0; j < j1; ++j)
            for (int64_t s = from; s < to; s += kDepth)
                for (int64_t i = 0; i < rows; ++i)
                    square<kSplit>(pa + (i * kPacked + s - from) * step, pb + (j * steps + s) * step,
                                          std::min(kDepth, to - s), sums + ((j - j0) * rows + i) * 1024, s == 0);
    }
    for (int64_t j = j0; j < j1; ++j)
        for (int64_t i = 0; i < rows; ++i)
            store<T>(sums + ((j - j0) * rows + i) * 1024, bias ? bias + j * 32 : nullptr,
                     c + (i0 + i) * 32 * width + j * 32, a.rows - (i0 + i) * 32, width - j * 32, width);
}

template <int T>
void product(const Operand& a, const Operand& b, const uint16_t* bias, uint16_t* c) {
    constexpr bool kSplit = T == kF16;
    constexpr int64_t step = kTile * (kSplit ? 4 : 2);
    static thread_local Buffer b_buffer;
    const int64_t steps = (a.k + 31) / 32, down = (a.rows + 31) / 32, across = (b.rows + 31) / 32;
    const int64_t threads = omp_get_max_threads(), wanted = threads > 1 ? 3 * threads : 1;
    int64_t height = kPanels;
    while (height > 1 && (down + height - 1) / height < wanted) height /= 2;
    const int64_t tall = (down + height - 1) / height;
    const int64_t wide = std::min(across, (wanted + tall - 1) / tall), width = (across + wide - 1) / wide;
    uint16_t* const pb = b_buffer.of(across * steps * step);
#pragma omp parallel
    {
        const TileConfig config;
        _tile_loadconfig(&config);
        const bool by_row = b.inner == 1;
#pragma omp for schedule(static)
        for (int64_t x = 0; x < across * steps; ++x) {
            const int64_t j = by_row ? x / steps : x % across, s = by_row ? x % steps : x / across;
            pack<kSplit>(b, j * 32, s * 32, pb + (j * steps + s) * step, false);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tall * wide; ++task) {
            const int64_t i = task / wide * height, j = task % wide * width;
            if (j < across)
                block<T>(a, pb, bias, c, b.rows, i, std::min(down, i + height), j, std::min(across, j + width));
        }
        _tile_release();
    }
}

}  // namespace

extern "C" {

// a [m, k], b [k, n], each with a stride of 1 in one direction; bias [n] or none; c [m, n] by rows.
void tb_product(int dtype, const uint16_t* a, int64_t a_row, int64_t a_column, const uint16_t* b,
                int64_t b_row, int64_t b_column, const uint16_t* bias, uint16_t* c, int64_t m, int64_t n, int64_t k) {
    const Operand left{a, m, k, a_row, a_column}, right{b, n, k, b_column, b_row};
    if (dtype == kBF16) product<kBF16>(left, right, bias, c);
    else product<kF16>(left, right, bias, c);
}

}  // extern "C"
