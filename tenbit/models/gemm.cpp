// Matrix products of FP16 and BF16 numbers on AMX tiles, sums in FP32: c = a b + bias, for operands stored by rows or by
// columns, so that it serves a linear layer forward and both products of its backward pass.
//
// The tiles multiply BF16 only. But an FP16 number x (11 significant bits) is exactly the sum of two BF16 numbers (8 bits
// each), hi = bf16(x) and lo = x - hi, so a b = hi hi' + lo hi' + hi lo' + lo lo', products that are exact and added in
// FP32. The last one is below 2^-18 |a b|, the size of what FP32 sums of this length lose; it is left out where the
// caller does not ask for it (gradients).
//
// Every element of c is summed over k in the same order, however the work is divided among threads.
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>

#include "simd.h"

using namespace tenbit;

namespace {

constexpr int64_t kTile = 512;     // numbers in a tile: 16 rows of 32
constexpr int64_t kDepth = 128;    // of k, between two visits to the sums of a block
constexpr int64_t kBlock = 4;      // a block of c is up to kBlock x kBlock squares of 32 x 32
constexpr int64_t kPacked = 1 << 25;  // numbers of a packed at a time

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

// The i-th of `panels` x steps pieces of 32 x 32 beginning with panel `from`, in the order in which they lie in memory.
template <bool SPLIT> void pack_at(const Operand& x, int64_t from, int64_t panels, int64_t i, uint16_t* out, bool of_a) {
    const int64_t steps = (x.k + 31) / 32;
    const int64_t panel = x.inner == 1 ? i / steps : i % panels, s = x.inner == 1 ? i % steps : i / panels;
    pack<SPLIT>(x, (from + panel) * 32, s * 32, out + (panel * steps + s) * kTile * (SPLIT ? 4 : 2), of_a);
}

inline void products() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

// One square of 32 x 32, over `steps` of 32 of k, onto the sums so far.
template <bool SPLIT, bool EXACT> void square(const uint16_t* a, const uint16_t* b, int64_t steps, float* sums, bool first) {
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
            // (lo, hi'), (hi, hi'), (hi, lo'), and (lo, lo') if asked for.
            _tile_loadd(4, a + 2 * kTile, 64);
            _tile_loadd(5, a + 3 * kTile, 64);
        }
        if (SPLIT && EXACT) {
            _tile_loadd(6, b + 2 * kTile, 64);
            _tile_loadd(7, b + 3 * kTile, 64);
            products();
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

template <int T, bool EXACT>
void product(const Operand& a, const Operand& b, const uint16_t* bias, uint16_t* c) {
    using S = Store<T>;
    constexpr bool kSplit = T == kF16;
    constexpr int64_t step = kTile * (kSplit ? 4 : 2);
    static thread_local Buffer a_buffer, b_buffer;
    const int64_t steps = (a.k + 31) / 32, panel = steps * step, a_panels = (a.rows + 31) / 32, b_panels = (b.rows + 31) / 32;
    const int64_t at_once = std::min(a_panels, std::max<int64_t>(2 * kBlock, kPacked / panel));
    uint16_t *const pa = a_buffer.of(at_once * panel), *const pb = b_buffer.of(b_panels * panel);
    int64_t size = kBlock;
    while (size > 1 && ((at_once + size - 1) / size) * ((b_panels + size - 1) / size) < 2 * omp_get_max_threads()) size /= 2;
#pragma omp parallel
    {
        const TileConfig config;
        _tile_loadconfig(&config);
        alignas(64) static thread_local float sums[kBlock * kBlock * 1024];
#pragma omp for schedule(static)
        for (int64_t i = 0; i < b_panels * steps; ++i)
            pack_at<kSplit>(b, 0, b_panels, i, pb, false);
        for (int64_t from = 0; from < a_panels; from += at_once) {
            const int64_t here = std::min(at_once, a_panels - from);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < here * steps; ++i)
                pack_at<kSplit>(a, from, here, i, pa, true);
            const int64_t across = (b_panels + size - 1) / size, tasks = (here + size - 1) / size * across;
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < tasks; ++task) {
                const int64_t i0 = task / across * size, i1 = std::min(here, i0 + size);
                const int64_t j0 = task % across * size, j1 = std::min(b_panels, j0 + size);
                for (int64_t s = 0; s < steps; s += kDepth / 32)
                    for (int64_t i = i0; i < i1; ++i)
                        for (int64_t j = j0; j < j1; ++j)
                            square<kSplit, EXACT>(pa + i * panel + s * step, pb + j * panel + s * step,
                                                  std::min(kDepth / 32, steps - s),
                                                  sums + ((i - i0) * kBlock + j - j0) * 1024, s == 0);
                for (int64_t i = i0; i < i1; ++i)
                    for (int64_t j = j0; j < j1; ++j) {
                        const float* sum = sums + ((i - i0) * kBlock + j - j0) * 1024;
                        const int64_t row = (from + i) * 32, column = j * 32;
                        for (int half = 0; half < 32; half += 16) {
                            const __mmask16 m = lanes(b.rows - column - half);
                            if (!m) continue;
                            const __m512 add = bias ? S::load(bias + column + half, m) : _mm512_setzero_ps();
                            for (int64_t r = 0; r < std::min<int64_t>(32, a.rows - row); ++r)
                                S::store(c + (row + r) * b.rows + column + half, m,
                                         _mm512_add_ps(_mm512_load_ps(sum + r * 32 + half), add));
                        }
                    }
            }
        }
        _tile_release();
    }
}

}  // namespace

extern "C" {

// Whether the operating system lets this process use the tiles; asks for the permission.
int tb_amx() {
    constexpr int kRequest = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// a [m, k], b [k, n], each with a stride of 1 in one direction; bias [n] or none; c [m, n] by rows.
void tb_product(int dtype, int exact, const uint16_t* a, int64_t a_row, int64_t a_column, const uint16_t* b,
                int64_t b_row, int64_t b_column, const uint16_t* bias, uint16_t* c, int64_t m, int64_t n, int64_t k) {
    const Operand left{a, m, k, a_row, a_column}, right{b, n, k, b_column, b_row};
    if (dtype == kBF16) product<kBF16, false>(left, right, bias, c);
    else if (exact) product<kF16, true>(left, right, bias, c);
    else product<kF16, false>(left, right, bias, c);
}

}  // extern "C"
