// What the kernels are made of: vectors, 2^x, register tiles, panels of keys, memory and threads.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif
#if defined(__linux__)
#include <dlfcn.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// ROWS x LANES accumulators, LANES vectors of keys and one query coordinate fill the vector registers.
#if defined(__AVX512F__)
#define LANE_COUNT 16
constexpr int LANES = 4;
#elif defined(__AVX2__)
#define LANE_COUNT 8
constexpr int LANES = 2;
#elif defined(__aarch64__)
#define LANE_COUNT 4
constexpr int LANES = 4;
#else
#define LANE_COUNT 4
constexpr int LANES = 2;
#endif
constexpr int LANE = LANE_COUNT;
constexpr int ROWS = 6;
constexpr int PANEL = LANE * LANES;   // keys (or value columns) that one register tile covers
constexpr int CHUNK = 512;            // keys per chunk, a multiple of PANEL
constexpr int PITCH = CHUNK + 16;     // off a power of two, so that rows do not share cache sets
constexpr int BLOCK = 96;             // rows per block, a multiple of ROWS; half of it where all chunks are kept
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

typedef float vf __attribute__((vector_size(LANE * 4)));
typedef int32_t vi __attribute__((vector_size(LANE * 4)));
typedef float vfu __attribute__((vector_size(LANE * 4), aligned(4), may_alias));
typedef int32_t viu __attribute__((vector_size(LANE * 4), aligned(4), may_alias));

#define INLINE inline __attribute__((always_inline))

INLINE vf load(const float *p) { return *reinterpret_cast<const vfu *>(p); }
INLINE vi load(const int32_t *p) { return *reinterpret_cast<const viu *>(p); }
INLINE void store(float *p, vf x) { *reinterpret_cast<vfu *>(p) = x; }
INLINE vf splat(float x) { return x - vf{}; }
INLINE vi splat(int32_t x) { return x - vi{}; }

INLINE vi iota() {
    vi x;
    for (int i = 0; i < LANE; ++i) x[i] = i;
    return x;
}

// The second operand wins when either is NaN: `larger(floor, x)` keeps NaN visible.
INLINE vf larger(vf a, vf b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

INLINE vf magnitude(vf x) { return (vf)((vi)x & splat(0x7fffffff)); }

INLINE vf add_where_equal(vf sum, vf x, vi a, vi b) {
#if defined(__AVX512F__)
    return _mm512_mask_add_ps(sum, _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b), sum, x);
#else
    return sum + (vf)((vi)x & (a == b));
#endif
}

INLINE float total(vf x) {
    float s[LANE];
    std::memcpy(s, &x, sizeof x);
    for (int n = LANE / 2; n; n /= 2)
        for (int i = 0; i < n; ++i) s[i] += s[i + n];
    return s[0];
}

INLINE float largest(vf x) {
    float s[LANE];
    std::memcpy(s, &x, sizeof x);
    for (int n = LANE / 2; n; n /= 2)
        for (int i = 0; i < n; ++i) s[i] = s[i] > s[i + n] ? s[i] : s[i + n];
    return s[0];
}

// 2^x for -150 <= x <= 127, zero where the result would be subnormal. Relative error below 1.7e-7.
INLINE vf exp2(vf x) {
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vf t = x + magic;
    vf r = x - (t - magic);
    vf p = splat(1.326472763e-3f);
    p = p * r + splat(9.671512646e-3f);
    p = p * r + splat(5.550733742e-2f);
    p = p * r + splat(2.402224209e-1f);
    p = p * r + splat(6.931469776e-1f);
    p = p * r + splat(1.0f);
#if defined(__AVX512F__)
    return _mm512_scalef_ps(p, t - magic);
#else
    vf e = (vf)((vi)p + ((vi)t << 23));
    return (vf)((vi)e & ~(x < splat(-126.0f)));
#endif
}

// Weights that are functions of single scores, which nothing normalises; in the order of native.py. UP_TO and EXCESS
// are of e^score: 0 above a cut, and a power of what is above it; so is SOFT_EXCESS, of softplus.
enum Activation { SOFTMAX, SIGMOID, RELU, SOFTPLUS, UP_TO, EXCESS, SOFT_EXCESS };

// The weight of a score that is in units of ln 2.
template <int ACT>
INLINE vf activate(vf y) {
    if (ACT == RELU) return (vf)((vi)(y * splat(float(LN2))) & ~(y <= vf{}));
    const vf top = splat(127.0f), low = splat(-150.0f);
    if (ACT == UP_TO || ACT == EXCESS) return exp2(y < top ? larger(low, y) : top);
    if (ACT == SIGMOID) {
        const vf x = -y;
        return 1.0f / (1.0f + exp2(x < top ? larger(low, x) : top));
    }
    // ln(1 + e^x) = max(x, 0) + 2 atanh(e / (2 + e)), e = e^-|x|
    const vf e = exp2(larger(low, -magnitude(y)));
    const vf z = e / (2.0f + e), w = z * z;
    vf p = splat(2.0f / 15);
    p = p * w + splat(2.0f / 13);
    p = p * w + splat(2.0f / 11);
    p = p * w + splat(2.0f / 9);
    p = p * w + splat(2.0f / 7);
    p = p * w + splat(2.0f / 5);
    p = p * w + splat(2.0f / 3);
    p = p * w + splat(2.0f);
    return p * z + (vf)((vi)(y * splat(float(LN2))) & ~(y <= vf{}));
}

// Its derivative, from the weight.
template <int ACT>
INLINE vf slope(vf e) {
    if (ACT == SIGMOID) return e - e * e;
    if (ACT == RELU) return (vf)((vi)splat(1.0f) & (e > vf{}));
    // 1 - e^-weight, by its series where that would lose digits
    const vf low = e * (1.0f - e * (0.5f - e * (splat(1.0f / 6) - e * splat(1.0f / 24))));
    const vf x = e * splat(float(-LOG2E));
    return e < splat(0.03f) ? low : 1.0f - exp2(larger(splat(-150.0f), x));
}

// What x has over a cut, else zero; NaN stays.
INLINE vf over(vf x, vf cut) { return (vf)((vi)(x - cut) & ~(x <= cut)); }

// x^n for x >= 0; 0^0 is 0.
INLINE vf raised(vf x, int64_t n) {
    vf y = (vf)((vi)splat(1.0f) & (x != vf{}));
    for (; n; n >>= 1, x *= x)
        if (n & 1) y *= x;
    return y;
}

INLINE vf tanh(vf x) {
    const vf a = magnitude(x), z = x * x;
    // Near zero 1 - 2 / (e^2x + 1) loses all relative precision: use the odd series there.
    vf p = splat(-5.70498872745e-3f);
    p = p * z + splat(2.06390887954e-2f);
    p = p * z + splat(-5.37397155531e-2f);
    p = p * z + splat(1.33314422036e-1f);
    p = p * z + splat(-3.33332819422e-1f);
    const vf small = p * z * x + x;
    vf y = a * splat(2.885390081777927f);
    y = y < splat(60.0f) ? y : splat(60.0f);
    vf large = 1.0f - 2.0f / (exp2(y) + 1.0f);
    large = (vf)((vi)large | ((vi)x & splat(INT32_MIN)));
    // NaN fails both comparisons and comes out of the series.
    return a > splat(0.625f) ? large : small;
}

// The even and the odd elements of two vectors, one behind the other.
#if defined(__clang__) && LANE_COUNT == 16
#define EVENS 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODDS 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(__clang__) && LANE_COUNT == 8
#define EVENS 0, 2, 4, 6, 8, 10, 12, 14
#define ODDS 1, 3, 5, 7, 9, 11, 13, 15
#elif defined(__clang__)
#define EVENS 0, 2, 4, 6
#define ODDS 1, 3, 5, 7
#endif
#if defined(__clang__)
INLINE vf evens(vf a, vf b) { return __builtin_shufflevector(a, b, EVENS); }
INLINE vf odds(vf a, vf b) { return __builtin_shufflevector(a, b, ODDS); }
#else
INLINE vf evens(vf a, vf b) { return __builtin_shuffle(a, b, iota() * 2); }
INLINE vf odds(vf a, vf b) { return __builtin_shuffle(a, b, iota() * 2 + 1); }
#endif

// Element i of the result is the sum of vector i.
template <int N>
INLINE vf totals(const vf *x) {
    if constexpr (N == 1) {
        return x[0];
    } else {
        const vf a = totals<N / 2>(x), b = totals<N / 2>(x + N / 2);
        return evens(a, b) + odds(a, b);
    }
}

// acc[r][c] += sum over i of a[r][i] * b[i][c]; a[r][i] stands at r * row + i * step, b[i] at i * pitch.
template <int M, int N>
INLINE void multiply(vf (&acc)[M][N], const float *a, int64_t row, int64_t step, const float *b, int64_t pitch,
                     int64_t n) {
    for (int64_t i = 0; i < n; ++i, a += step, b += pitch) {
        vf y[N];
#pragma GCC unroll 8
        for (int c = 0; c < N; ++c) y[c] = load(b + c * LANE);
#pragma GCC unroll 8
        for (int r = 0; r < M; ++r) {
            const vf x = splat(a[r * row]);
#pragma GCC unroll 8
            for (int c = 0; c < N; ++c) acc[r][c] += x * y[c];
        }
    }
}

#if defined(__unix__) || defined(__APPLE__)
// Large blocks come straight from the system: the heap of a thread that ends keeps what the thread freed.
constexpr size_t LARGE = 256 << 10;

inline void *take(size_t bytes) {
    if (bytes < LARGE) return ::operator new[](bytes, std::align_val_t(64));
    void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    return p;
}

inline void give(void *p, size_t bytes) {
    if (bytes < LARGE) ::operator delete[](p, std::align_val_t(64));
    else munmap(p, bytes);
}
#else
inline void *take(size_t bytes) { return ::operator new[](bytes, std::align_val_t(64)); }
inline void give(void *p, size_t) { ::operator delete[](p, std::align_val_t(64)); }
#endif

template <class T>
struct Buffer {
    T *p = nullptr;
    int64_t size = 0;
    ~Buffer() { release(); }
    void release() {
        if (p) give(p, size * sizeof(T));
        p = nullptr;
        size = 0;
    }
    T *need(int64_t n) {
        if (n > size) {
            release();
            p = static_cast<T *>(take(n * sizeof(T)));
            size = n;
        }
        return p;
    }
};

// Subnormals cost many cycles on some processors and carry nothing here.
struct FlushSubnormals {
#if defined(__x86_64__)
    unsigned saved = _mm_getcsr();
    FlushSubnormals() { _mm_setcsr(saved | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(saved); }
#endif
};

// Runs one function on several threads. The team of the OpenMP runtime that is in the process already (torch's own)
// does it where there is one: its threads wait for work, while threads that are started anew come late and find the
// cores taken by those that wait.
using Team = void (*)(void (*)(void *), void *, unsigned, unsigned);

inline Team team() {
#if defined(__linux__)
    static const Team found = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#else
    return nullptr;
#endif
}

template <class Loop>
void on_threads(int64_t threads, Loop &loop) {
    if (threads > 1 && team()) return team()([](void *at) { (*static_cast<Loop *>(at))(); }, &loop, threads, 0);
    std::vector<std::thread> pool;
    try {
        for (int64_t i = 1; i < threads; ++i) pool.emplace_back(std::ref(loop));
    } catch (...) {
        // Fewer threads than asked: the others take over their share.
    }
    loop();
    for (auto &t : pool) t.join();
}

template <class Work>
bool parallel(int64_t threads, int64_t count, const Work &work) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> good{true};
    auto loop = [&] {
        try {
            FlushSubnormals flush;
            work([&] { const int64_t i = next++; return i < count ? i : -1; });
        } catch (...) {
            good = false;
        }
    };
    on_threads(std::min(threads, count), loop);
    return good;
}

constexpr int64_t WIDEST = 256;  // channels of a row; native.py asks for no more

// Rows in fewer bits than floats have: integers from a grid per group of channels, or bfloat16. Of 4 bits, a byte has
// a channel of the row's first half, in its lower bits, and one of its second. Mirrored in native.py.
struct Coded {
    const uint8_t *codes;    // null: rows are floats
    const uint16_t *grid;    // of each row the middles of its groups and then their steps, in bfloat16
    int64_t stride[3], grid_stride[3];  // batch, head, position; in bytes, and in elements
    int64_t groups, bits;    // 4, 8, or 16 for bfloat16
};

INLINE float widened(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

// LANE small numbers, each in a lane of its own.
INLINE vi apart(const uint8_t *p) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
#else
    vi x;
    for (int i = 0; i < LANE; ++i) x[i] = p[i];
    return x;
#endif
}
INLINE vi apart(const uint16_t *p) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#else
    vi x;
    for (int i = 0; i < LANE; ++i) x[i] = p[i];
    return x;
#endif
}

// How coded rows are read. What needs a division is found once.
struct Reader {
    const Coded &c;
    const int64_t width, size, half = width / 2;
    const bool whole;                // groups, and the halves of 4 bits, end where vectors do
    uint8_t group[WIDEST / LANE]{};  // of each vector

    Reader(const Coded &coded, int64_t wide)
        : c(coded), width(wide), size(c.groups ? wide / c.groups : wide),
          whole(size % LANE == 0 && (c.bits != 4 || half % LANE == 0)) {
        for (int64_t n = 0; n < width / LANE; ++n) group[n] = n * LANE / size;
    }

    // Row `at` as floats.
    void read(int64_t batch, int64_t head, int64_t at, float *__restrict to) const {
        const uint8_t *code = c.codes + batch * c.stride[0] + head * c.stride[1] + at * c.stride[2];
        const uint16_t *grid = c.grid + batch * c.grid_stride[0] + head * c.grid_stride[1] + at * c.grid_stride[2];
        if (c.bits == 16) widen(reinterpret_cast<const uint16_t *>(code), to);
        else if (!whole) decode_any(code, grid, to);
        else if (c.bits == 8) decode<8>(code, grid, to);
        else decode<4>(code, grid, to);
    }

  private:
    INLINE void widen(const uint16_t *number, float *__restrict to) const {
        int64_t d = 0;
        for (; d + LANE <= width; d += LANE) store(to + d, (vf)(apart(number + d) << 16));
        for (; d < width; ++d) to[d] = widened(number[d]);
    }

    // middle + step (code - top / 2), in vectors that are each of one group.
    template <int BITS>
    INLINE void decode(const uint8_t *code, const uint16_t *grid, float *__restrict to) const {
        const auto scaled = [&](int64_t n, vi x) {
            const int64_t g = group[n];
            const float step = widened(grid[c.groups + g]), zero = widened(grid[g]) - step * (((1 << BITS) - 1) / 2.0f);
            store(to + n * LANE, __builtin_convertvector(x, vf) * splat(step) + splat(zero));
        };
        const int64_t read = width * BITS / 8 / LANE;
        for (int64_t n = 0; n < read; ++n) {
            const vi x = apart(code + n * LANE);
            scaled(n, BITS == 4 ? x & 15 : x);
            if (BITS == 4) scaled(read + n, x >> 4);
        }
    }

    void decode_any(const uint8_t *code, const uint16_t *grid, float *__restrict to) const {
        uint8_t each[WIDEST];
        if (c.bits == 4) {
            const int64_t n = std::min(half, WIDEST / 2);
            for (int64_t d = 0; d < n; ++d) each[d] = code[d] & 15, each[n + d] = code[d] >> 4;
            code = each;
        }
        const float top = float((1 << c.bits) - 1);
        for (int64_t g = 0; g < c.groups; ++g, code += size, to += size) {
            const float step = widened(grid[c.groups + g]), zero = widened(grid[g]) - top / 2 * step;
            for (int64_t d = 0; d < size; ++d) to[d] = float(code[d]) * step + zero;
        }
    }
};

// Rows of a matrix as panels [width x PANEL], so that one vector load brings one coordinate of LANE rows. `row(j)`
// points to row j, until it is called four more times; what is left of the last panel stays as it is.
template <class At>
void pack_panels(const At &row, int64_t first, int64_t last, int64_t width, float *to) {
    for (int64_t p = first; p < last; p += PANEL, to += PANEL * width) {
        const int64_t n = std::min<int64_t>(PANEL, last - p);
        for (int64_t j = 0; j < n; j += 4) {
            const float *from[4];
            for (int64_t i = 0; i < 4; ++i) from[i] = row(std::min(p + j + i, last - 1));
            int64_t d = 0;
#if defined(__x86_64__)
            for (; j + 4 <= n && d + 4 <= width; d += 4) {
                __m128 x0 = _mm_loadu_ps(from[0] + d), x1 = _mm_loadu_ps(from[1] + d);
                __m128 x2 = _mm_loadu_ps(from[2] + d), x3 = _mm_loadu_ps(from[3] + d);
                _MM_TRANSPOSE4_PS(x0, x1, x2, x3);
                float *at = to + d * PANEL + j;
                _mm_storeu_ps(at, x0);
                _mm_storeu_ps(at + PANEL, x1);
                _mm_storeu_ps(at + 2 * PANEL, x2);
                _mm_storeu_ps(at + 3 * PANEL, x3);
            }
#endif
            for (; d < width; ++d)
                for (int64_t i = 0; i < std::min<int64_t>(4, n - j); ++i) to[d * PANEL + j + i] = from[i][d];
        }
    }
}

// Rows that share a register tile.
struct Tile {
    int32_t first, rows;
    int32_t any_lo, any_hi;  // keys that some row sees
    int32_t all_lo, all_hi;  // keys that every row sees
};

// Stretches of adjacent keys that row blocks visit, as [first, one past the last) pairs; mirrored in native.py.
struct Ranges {
    const int64_t *start;  // where the stretches of each (batch, head, row block) begin; null: all keys are visited
    const int32_t *bounds;
    int64_t rows, batch, heads, blocks;  // rows per row block; 1 where all entries or heads have the same

    void of(int64_t b, int64_t head, int64_t block, const int32_t *&first, const int32_t *&last) const {
        const int64_t at = ((batch > 1 ? b : 0) * heads + (heads > 1 ? head : 0)) * blocks + block;
        first = bounds + 2 * start[at], last = bounds + 2 * start[at + 1];
    }
};

}  // namespace

#define API extern "C" __attribute__((visibility("default")))
