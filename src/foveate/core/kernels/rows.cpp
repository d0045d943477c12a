// Exact softmax attention with per-row and per-key statistics, in blocks of rows.
//
// A block of rows walks over its keys in chunks. Scores of one chunk stay in the L2 cache while they become
// weights e = 2^(s - m) relative to the running maximum m; every sum over e is rescaled when m grows. Column
// mass needs the final normaliser, so only then is the e of all chunks kept until the block ends.
// Scores are held in units of log2 (the factor is folded into the queries), which makes exp one polynomial.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Mirrored field by field in native.py. Strides count elements; a null pointer means "not asked".
struct Call {
    int64_t batch, heads, groups, queries, keys, width, values, extras, withins, matches, threads;
    const float *q, *k, *v;
    int64_t q_stride[3], k_stride[3], v_stride[3];  // batch, head, position
    const int32_t *lo, *hi, *query_position, *key_position;
    int64_t lo_stride, hi_stride, query_position_stride, key_position_stride;
    const int32_t *within;                    // ascending
    const int32_t *const *match_query, *const *match_key;
    const int64_t *match_query_stride, *match_key_stride;
    const float *sinks, *extra, *tilt;        // tilt: a bias on keys, rows of whole panels
    const uint8_t *tilted;                    // the rows that the tilt is for; null: all
    const int32_t *index;                     // which row of k and v each key is; null: its own number
    int64_t extra_stride, tilt_batch_stride, tilt_head_stride, tilted_stride, index_stride;
    double scale, softcap;                    // softcap 0: none
    float *out;                               // [batch, queries, heads, values]
    float *lse, *entropy, *distance;          // [batch, heads, queries]
    float *within_mass, *match_mass;          // [n, batch, heads, queries]
    float *extra_mass;                        // [batch, heads, queries, extras]
    float *column;                            // [batch, heads, keys]
};

namespace {

// ROWS x LANES accumulators, LANES vectors of keys and one query coordinate fill the vector registers.
#if defined(__AVX512F__)
constexpr int LANE = 16, LANES = 4;
#elif defined(__AVX2__)
constexpr int LANE = 8, LANES = 2;
#elif defined(__aarch64__)
constexpr int LANE = 4, LANES = 4;
#else
constexpr int LANE = 4, LANES = 2;
#endif
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

// What one row carries from chunk to chunk.
struct Row {
    int32_t lo, hi;       // keys that it sees
    int64_t query, head;
    const float *tilt;    // bias on its keys in nats, or null
    int64_t here;         // its position, relative to the block's first key
    float peak;           // largest score so far
    double factor;        // weight = e * factor, once all keys were seen
};

// Scores of M rows against one panel of keys; `peak` follows the largest score per row and lane.
template <int M, bool CUT, bool TILT>
void score_tile(const float *q, const float *k, int64_t width, float *s, float *peak, float cap, const Row *rows,
                int32_t first) {
    vf acc[M][LANES] = {};
    multiply<M, LANES>(acc, q, 1, M, k, PANEL, width);
    if (cap != 0)
        for (int r = 0; r < M; ++r)
            for (int c = 0; c < LANES; ++c) acc[r][c] = tanh(acc[r][c]) * cap;
    if (TILT)
        for (int r = 0; r < M; ++r)
            if (rows[r].tilt)
                for (int c = 0; c < LANES; ++c) {
                    const vf t = load(rows[r].tilt + first + c * LANE);
                    // what is taken out has no influence, also where its score is NaN
                    acc[r][c] = t > splat(-INF) ? acc[r][c] + t * splat(float(LOG2E)) : t;
                }
    if (CUT)
        for (int r = 0; r < M; ++r)
            for (int c = 0; c < LANES; ++c) {
                const vi key = iota() + splat(first + c * LANE);
                const vi seen = (key >= splat(rows[r].lo)) & (key < splat(rows[r].hi));
                acc[r][c] = seen ? acc[r][c] : splat(-INF);
            }
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
        vf m = load(peak + r * LANE);
#pragma GCC unroll 8
        for (int c = 0; c < LANES; ++c) {
            m = larger(acc[r][c], m);
            store(s + r * PITCH + c * LANE, acc[r][c]);
        }
        store(peak + r * LANE, m);
    }
}

template <int M, int N>
void value_tile(const float *e, const float *v, int64_t v_pitch, int64_t n, float *o, int64_t o_pitch) {
    vf acc[M][N];
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < N; ++c) acc[r][c] = load(o + r * o_pitch + c * LANE);
    multiply<M, N>(acc, e, PITCH, 1, v, v_pitch, n);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < N; ++c) store(o + r * o_pitch + c * LANE, acc[r][c]);
}

template <bool CUT, bool TILT>
constexpr decltype(&score_tile<1, CUT, TILT>) SCORE[] = {
    score_tile<1, CUT, TILT>, score_tile<2, CUT, TILT>, score_tile<3, CUT, TILT>,
    score_tile<4, CUT, TILT>, score_tile<5, CUT, TILT>, score_tile<6, CUT, TILT>};
template <int N>
constexpr decltype(&value_tile<1, N>) VALUE_ROWS[] = {value_tile<1, N>, value_tile<2, N>, value_tile<3, N>,
                                                      value_tile<4, N>, value_tile<5, N>, value_tile<6, N>};
constexpr const decltype(&value_tile<1, 1>) *VALUE[] = {VALUE_ROWS<1>, VALUE_ROWS<2>,
#if defined(__AVX512F__) || defined(__aarch64__)
                                                        VALUE_ROWS<3>, VALUE_ROWS<4>
#endif
};

enum Sum { MASS, SURPRISE, DISTANCE, MATCH };  // vector accumulators of a row, one per match from MATCH on

// Turns the scores of one row into weights, in place, and adds them up.
template <bool ENTROPY, bool FAR>
void weigh(float *s, int64_t n, float peak, const float *position, float here, float *sum) {
    const vf m = splat(peak), floor = splat(-150.0f), at = splat(here);
    vf mass = load(sum + MASS * LANE), surprise = load(sum + SURPRISE * LANE), far = load(sum + DISTANCE * LANE);
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; j += LANE) {
        const vf x = larger(floor, load(s + j) - m);
        const vf e = exp2(x);
        store(s + j, e);
        mass += e;
        if (ENTROPY) surprise += e * x;
        if (FAR) far += e * magnitude(load(position + j) - at);
    }
    store(sum + MASS * LANE, mass);
    store(sum + SURPRISE * LANE, surprise);
    store(sum + DISTANCE * LANE, far);
}

template <int N>
void match_labels(const float *e, int64_t n, const int32_t *const *labels, const int32_t *wanted, float *sum) {
    vf acc[N];
    vi want[N];
    for (int i = 0; i < N; ++i) acc[i] = load(sum + i * LANE), want[i] = splat(wanted[i]);
    for (int64_t j = 0; j < n; j += LANE) {
        const vf x = load(e + j);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) acc[i] = add_where_equal(acc[i], x, load(labels[i] + j), want[i]);
    }
    for (int i = 0; i < N; ++i) store(sum + i * LANE, acc[i]);
}

constexpr decltype(&match_labels<1>) MATCH_LABELS[] = {match_labels<1>, match_labels<2>, match_labels<3>,
                                                       match_labels<4>};

float sum_range(const float *e, int64_t n) {
    vf acc{};
    int64_t j = 0;
    for (; j + LANE <= n; j += LANE) acc += load(e + j);
    float s = total(acc);
    for (; j < n; ++j) s += e[j];
    return s;
}

float sum_ring(const float *e, int64_t n, const float *position, float here, float inner, float outer) {
    vf acc{};
    for (int64_t j = 0; j < n; j += LANE) {
        const vf d = magnitude(load(position + j) - splat(here));
        acc += (vf)((vi)load(e + j) & (d > splat(inner)) & (d <= splat(outer)));
    }
    return total(acc);
}

// Adding and taking away 1.5 * 2^20 rounds to a multiple of 2^-32. Sums of such numbers are exact in a double,
// so the column does not depend on the order in which blocks finish, and NaN still goes through.
INLINE double quantise(double x) { return (x + 1572864.0) - 1572864.0; }

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
    std::vector<std::thread> pool;
    try {
        for (int64_t i = 1; i < std::min(threads, count); ++i) pool.emplace_back(loop);
    } catch (...) {
        // Fewer threads than asked: the others take over their share.
    }
    loop();
    for (auto &t : pool) t.join();
    return good;
}

// Rows that share a register tile.
struct Tile {
    int32_t first, rows;
    int32_t any_lo, any_hi;  // keys that some row sees
    int32_t all_lo, all_hi;  // keys that every row sees
};

struct Block {
    int64_t batch, group, first, rows;  // rows count (query, head of the group) pairs, heads fastest
    int32_t lo, hi;                     // keys that some row sees
    int64_t cost;
};

// `key_0` points to where key 0 would stand.
struct Values {
    const float *key_0;
    int64_t pitch;
};

struct Workspace {
    std::vector<Row> rows;
    std::vector<Tile> tiles;
    bool consecutive;  // key positions grow by one per key within the block
    Buffer<float> q, k, v, s, o, peak, sum, position, near, column, chunk_peak;
};

struct Job {
    const Call &c;
    const int64_t share = c.heads / c.groups;  // query heads per kv head
    const int64_t own = c.out ? c.values : 0;
    const int64_t columns = own + c.extras;
    const int64_t padded = (columns + LANE - 1) / LANE * LANE;
    const int64_t keys_padded = (c.keys + PANEL - 1) / PANEL * PANEL;
    const int64_t sums = MATCH + c.matches;
    const float cap = c.softcap * LOG2E;
    const int64_t block = c.column ? BLOCK / 2 : BLOCK;
    bool shared = false;    // keys and values are packed once for all blocks
    bool in_place = false;  // values are read once or twice and need no packing
    Buffer<float> keys, values;
    Buffer<double> column;
    Buffer<int32_t> labels;
    std::vector<Block> blocks;
    std::unique_ptr<std::mutex[]> locks;

    explicit Job(const Call &call) : c(call) {}
    bool run();
    void plan();
    int64_t row_of(const Block &t, int64_t j) const { return c.index ? c.index[t.batch * c.index_stride + j] : j; }
    void pack_keys(const Block &t, int64_t first, int64_t last, float *to) const;
    void pack_values(const Block &t, int64_t first, int64_t last, float *to) const;
    void prepare(const Block &t, Workspace &w) const;
    void attend(const Block &t, Workspace &w);
    void weigh_row(const Block &t, Workspace &w, int64_t r, float *s, int64_t from, int64_t to) const;
    void mix_tile(const Tile &tile, Workspace &w, const float *s, const Values &v, int32_t first,
                  int32_t last) const;
    void finish(const Block &t, Workspace &w) const;
    void add_columns(const Block &t, Workspace &w);
};

void Job::plan() {
    const int64_t rows = c.queries * share;
    for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t first = 0; first < rows; first += block) {
            const int64_t n = std::min(block, rows - first);
            int32_t lo = INT32_MAX, hi = 0;
            for (int64_t i = first / share; i <= (first + n - 1) / share; ++i) {
                const int32_t from = std::max(c.lo[b * c.lo_stride + i], 0);
                const int32_t to = std::min<int64_t>(c.hi[b * c.hi_stride + i], c.keys);
                if (from < to) lo = std::min(lo, from), hi = std::max(hi, to);
            }
            if (hi == 0) lo = 0;
            for (int64_t g = 0; g < c.groups; ++g) blocks.push_back({b, g, first, n, lo, hi, (hi - lo) * n});
        }
    shared = rows > block;
    in_place = rows <= 2 * ROWS && columns == padded && !c.extras && !c.index;
    // The largest first, so that no thread is left alone with one at the end.
    std::stable_sort(blocks.begin(), blocks.end(), [](auto &x, auto &y) { return x.cost > y.cost; });
}

bool Job::run() {
    plan();
    double products = 0;
    for (const auto &t : blocks) products += double(t.cost) * (c.width + columns);
    // Below this a thread costs more than it saves.
    const int64_t threads = products < 1e6 ? 1 : std::max<int64_t>(1, c.threads);
    const int64_t cells = c.column ? c.batch * c.heads * c.keys : 0;
    std::fill_n(column.need(cells), cells, 0.0);
    locks.reset(new std::mutex[c.batch * c.groups]);
    int32_t *label = labels.need(c.matches * c.batch * keys_padded);
    for (int64_t n = 0; n < c.matches; ++n)
        for (int64_t b = 0; b < c.batch; ++b, label += keys_padded) {
            std::copy_n(c.match_key[n] + b * c.match_key_stride[n], c.keys, label);
            std::fill(label + c.keys, label + keys_padded, -1);
        }
    if (shared) {
        float *k = keys.need(c.batch * c.groups * keys_padded * c.width);
        float *v = values.need(c.batch * c.groups * c.keys * padded);
        const int64_t parts = (c.keys + CHUNK - 1) / CHUNK;
        const bool good = parallel(threads, c.batch * c.groups * parts, [&](auto next) {
            for (int64_t i; (i = next()) >= 0;) {
                const int64_t pair = i / parts, first = i % parts * CHUNK, last = std::min(first + CHUNK, c.keys);
                const Block t{pair / c.groups, pair % c.groups, 0, 0, 0, 0, 0};
                pack_keys(t, first, last, k + (pair * keys_padded + first) * c.width);
                pack_values(t, first, last, v + (pair * c.keys + first) * padded);
            }
        });
        if (!good) return false;
    }
    const bool good = parallel(threads, blocks.size(), [&](auto next) {
        Workspace w;
        for (int64_t i; (i = next()) >= 0;) attend(blocks[i], w);
    });
    std::copy_n(column.p, cells, c.column);
    return good;
}

// Keys [first, last) as panels [width x PANEL], so that one vector load brings one coordinate of LANE keys. What
// is left of the last panel stays as it is: no row sees it, so score_tile hides it.
void Job::pack_keys(const Block &t, int64_t first, int64_t last, float *to) const {
    const int64_t step = c.k_stride[2];
    const float *k = c.k + t.batch * c.k_stride[0] + t.group * c.k_stride[1];
    for (int64_t p = first; p < last; p += PANEL, to += PANEL * c.width) {
        const int64_t n = std::min<int64_t>(PANEL, last - p);
        for (int64_t j = 0; j < n; j += 4) {
            const float *key[4];
            for (int64_t i = 0; i < 4; ++i) key[i] = k + row_of(t, std::min(p + j + i, last - 1)) * step;
            int64_t d = 0;
#if defined(__x86_64__)
            for (; j + 4 <= n && d + 4 <= c.width; d += 4) {
                __m128 x0 = _mm_loadu_ps(key[0] + d), x1 = _mm_loadu_ps(key[1] + d);
                __m128 x2 = _mm_loadu_ps(key[2] + d), x3 = _mm_loadu_ps(key[3] + d);
                _MM_TRANSPOSE4_PS(x0, x1, x2, x3);
                float *at = to + d * PANEL + j;
                _mm_storeu_ps(at, x0);
                _mm_storeu_ps(at + PANEL, x1);
                _mm_storeu_ps(at + 2 * PANEL, x2);
                _mm_storeu_ps(at + 3 * PANEL, x3);
            }
#endif
            for (; d < c.width; ++d)
                for (int64_t i = 0; i < std::min<int64_t>(4, n - j); ++i) to[d * PANEL + j + i] = key[i][d];
        }
    }
}

// Values and extra columns side by side, [keys x padded].
void Job::pack_values(const Block &t, int64_t first, int64_t last, float *to) const {
    for (int64_t j = first; j < last; ++j, to += padded) {
        const float *v = c.v + t.batch * c.v_stride[0] + t.group * c.v_stride[1] + row_of(t, j) * c.v_stride[2];
        std::copy_n(v, own, to);
        std::copy_n(c.extra + t.batch * c.extra_stride + j * c.extras, c.extras, to + own);
        std::fill(to + columns, to + padded, 0.0f);
    }
}

void Job::prepare(const Block &t, Workspace &w) const {
    const int32_t *key_position = c.key_position + t.batch * c.key_position_stride;
    const int32_t *query_position = c.query_position + t.batch * c.query_position_stride;
    const int64_t base = t.lo < t.hi ? key_position[t.lo] : 0, origin = t.lo / PANEL * PANEL;
    w.rows.clear();
    w.tiles.clear();
    for (int64_t r = 0; r < t.rows; ++r) {
        const int64_t i = (t.first + r) / share, head = t.group * share + (t.first + r) % share;
        Row row{std::max(c.lo[t.batch * c.lo_stride + i], 0),
                int32_t(std::min<int64_t>(c.hi[t.batch * c.hi_stride + i], c.keys)), i, head, nullptr,
                query_position[i] - base, -INF, 0};
        if (c.tilt && (!c.tilted || c.tilted[t.batch * c.tilted_stride + i]))
            row.tilt = c.tilt + t.batch * c.tilt_batch_stride + head * c.tilt_head_stride;
        if (row.lo >= row.hi) row.lo = row.hi = 0;
        if (r % ROWS == 0) w.tiles.push_back({int32_t(r), 0, INT32_MAX, 0, 0, INT32_MAX});
        Tile &tile = w.tiles.back();
        ++tile.rows;
        tile.all_lo = std::max(tile.all_lo, row.lo);
        tile.all_hi = std::min(tile.all_hi, row.hi);
        if (row.lo < row.hi) {
            tile.any_lo = std::min(tile.any_lo, row.lo);
            tile.any_hi = std::max(tile.any_hi, row.hi);
        }
        w.rows.push_back(row);
    }

    const float scale = c.softcap ? c.scale / c.softcap : c.scale * LOG2E;
    float *q = w.q.need(t.rows * c.width);
    for (const Tile &tile : w.tiles)
        for (int64_t r = 0; r < tile.rows; ++r) {
            const Row &row = w.rows[tile.first + r];
            const float *from = c.q + t.batch * c.q_stride[0] + row.head * c.q_stride[1] + row.query * c.q_stride[2];
            for (int64_t d = 0; d < c.width; ++d) q[tile.first * c.width + d * tile.rows + r] = from[d] * scale;
        }

    const int64_t span = (t.hi - origin + CHUNK - 1) / CHUNK * CHUNK;
    w.consecutive = true;
    if (c.distance || c.withins) {
        float *position = w.position.need(span);
        std::fill_n(position, span, 0.0f);
        for (int64_t j = t.lo; j < t.hi; ++j) {
            const int64_t x = key_position[j] - base;
            position[j - origin] = x;
            w.consecutive &= x == j - t.lo;
        }
    }
    std::fill_n(w.o.need(t.rows * padded), t.rows * padded, 0.0f);
    std::fill_n(w.sum.need(t.rows * sums * LANE), t.rows * sums * LANE, 0.0f);
    std::fill_n(w.near.need(t.rows * c.withins), t.rows * c.withins, 0.0f);
    w.peak.need(BLOCK * LANE);
    const int64_t kept = c.column ? span / CHUNK : 1;
    w.s.need(kept * t.rows * PITCH);
    w.chunk_peak.need(kept * t.rows);
    if (!shared) {
        w.k.need(CHUNK * c.width);
        w.v.need(CHUNK * padded);
    }
}

void Job::attend(const Block &t, Workspace &w) {
    prepare(t, w);
    const int64_t origin = t.lo / PANEL * PANEL, pair = t.batch * c.groups + t.group;
    for (int64_t first = origin, chunk = 0; first < t.hi; first += CHUNK, ++chunk) {
        const int64_t last = std::min<int64_t>(first + CHUNK, t.hi);
        const float *k = keys.p + (pair * keys_padded + first) * c.width;
        Values v{values.p + pair * c.keys * padded, padded};
        if (!shared) {
            pack_keys(t, first, last, w.k.p);
            k = w.k.p;
            if (in_place) {
                v = {c.v + t.batch * c.v_stride[0] + t.group * c.v_stride[1], c.v_stride[2]};
            } else {
                pack_values(t, first, last, w.v.p);
                v.key_0 = w.v.p - first * padded;
            }
        }
        float *s = w.s.p + (c.column ? chunk * t.rows * PITCH : 0);
        std::fill_n(w.peak.p, t.rows * LANE, -INF);
        for (int64_t p = first; p < last; p += PANEL, k += PANEL * c.width)
            for (const Tile &tile : w.tiles) {
                if (tile.any_hi <= p || tile.any_lo >= p + PANEL) continue;
                const bool cut = tile.all_lo > p || tile.all_hi < p + PANEL;
                (c.tilt ? (cut ? SCORE<true, true> : SCORE<false, true>)
                        : (cut ? SCORE<true, false> : SCORE<false, false>))[tile.rows - 1](
                    w.q.p + tile.first * c.width, k, c.width, s + tile.first * PITCH + (p - first),
                    w.peak.p + tile.first * LANE, cap, &w.rows[tile.first], p);
            }
        for (const Tile &tile : w.tiles) {
            // Whole panels: what lies outside of a row's interval holds zero weight after weigh_row.
            const int64_t from = std::max<int64_t>(first, tile.any_lo / PANEL * PANEL);
            const int64_t to = std::min<int64_t>(last, tile.any_hi);
            if (from >= to) continue;
            for (int64_t r = tile.first; r < tile.first + tile.rows; ++r) {
                weigh_row(t, w, r, s + r * PITCH - first, from, from + (to - from + PANEL - 1) / PANEL * PANEL);
                w.chunk_peak.p[chunk * (c.column ? t.rows : 0) + r] = w.rows[r].peak;
            }
            if (padded) mix_tile(tile, w, s - first, v, first, last);
        }
    }
    finish(t, w);
    if (c.column) add_columns(t, w);
}

// `s` points to where key 0 would stand; [from, to) are whole panels.
void Job::weigh_row(const Block &t, Workspace &w, int64_t r, float *s, int64_t from, int64_t to) const {
    Row &row = w.rows[r];
    float *sum = w.sum.p + r * sums * LANE, *near = w.near.p + r * c.withins, *o = w.o.p + r * padded;
    const float peak = std::max(row.peak, largest(load(w.peak.p + r * LANE)));
    if (peak > row.peak && row.peak > -INF) {
        const float fade = std::exp2(row.peak - peak);
        // The surprise is relative to the peak: sum of fade * e * (x + old peak - new peak).
        const vf shift = splat(row.peak - peak);
        store(sum + SURPRISE * LANE, load(sum + SURPRISE * LANE) + shift * load(sum + MASS * LANE));
        for (int64_t i = 0; i < sums * LANE; ++i) sum[i] *= fade;
        for (int64_t i = 0; i < c.withins; ++i) near[i] *= fade;
        for (int64_t i = 0; i < padded; ++i) o[i] *= fade;
    }
    row.peak = peak;
    const int64_t origin = t.lo / PANEL * PANEL, n = to - from;
    const float *position = w.position.p + (from - origin);
    const auto weigh_as = c.entropy ? (c.distance ? weigh<true, true> : weigh<true, false>)
                                    : (c.distance ? weigh<false, true> : weigh<false, false>);
    weigh_as(s + from, n, peak > -INF ? peak : 0, position, row.here, sum);

    // Each entry of `near` collects one ring, |distance| in (previous, within[i]]; finish() adds them up.
    int64_t inner_from = 0, inner_to = 0;
    for (int64_t i = 0; i < c.withins; ++i) {
        if (w.consecutive) {
            const int64_t a = std::max(from, t.lo + row.here - c.within[i]);
            const int64_t z = std::min(to, t.lo + row.here + c.within[i] + 1);
            if (a >= z) continue;
            if (inner_from >= inner_to) inner_from = inner_to = a;
            near[i] += sum_range(s + a, inner_from - a) + sum_range(s + inner_to, z - inner_to);
            inner_from = a, inner_to = z;
        } else {
            near[i] += sum_ring(s + from, n, position, row.here, i ? c.within[i - 1] : -1, c.within[i]);
        }
    }
    for (int64_t i = 0; i < c.matches; i += 4) {
        const int64_t some = std::min<int64_t>(4, c.matches - i);
        const int32_t *label[4];
        int32_t wanted[4];
        for (int64_t m = 0; m < some; ++m) {
            label[m] = labels.p + ((i + m) * c.batch + t.batch) * keys_padded + from;
            wanted[m] = c.match_query[i + m][t.batch * c.match_query_stride[i + m] + row.query];
        }
        MATCH_LABELS[some - 1](s + from, n, label, wanted, sum + (MATCH + i) * LANE);
    }
}

// Adds the weighted values of keys [first, last). Only keys that a row sees are touched: zero weight does not
// silence NaN in a value.
void Job::mix_tile(const Tile &tile, Workspace &w, const float *s, const Values &v, int32_t first,
                   int32_t last) const {
    const auto mix = [&](int64_t r, int64_t rows, int64_t from, int64_t to) {
        for (int64_t p = 0; p < padded && from < to; p += PANEL) {
            const int64_t n = std::min<int64_t>(PANEL, padded - p);
            VALUE[n / LANE - 1][rows - 1](s + r * PITCH + from, v.key_0 + from * v.pitch + p, v.pitch, to - from,
                                          w.o.p + r * padded + p, padded);
        }
    };
    const int32_t all_lo = std::max(first, tile.all_lo), all_hi = std::min(last, tile.all_hi);
    if (all_lo < all_hi) mix(tile.first, tile.rows, all_lo, all_hi);
    for (int64_t r = tile.first; r < tile.first + tile.rows; ++r) {
        const int32_t lo = std::max(first, w.rows[r].lo), hi = std::min(last, w.rows[r].hi);
        if (all_lo < all_hi) {
            mix(r, 1, lo, all_lo);
            mix(r, 1, all_hi, hi);
        } else {
            mix(r, 1, lo, hi);
        }
    }
}

void Job::finish(const Block &t, Workspace &w) const {
    for (int64_t r = 0; r < t.rows; ++r) {
        Row &row = w.rows[r];
        const float *sum = w.sum.p + r * sums * LANE, *o = w.o.p + r * padded;
        const double mass = total(load(sum + MASS * LANE)), surprise = total(load(sum + SURPRISE * LANE));
        const double sink = c.sinks ? c.sinks[row.head] * LOG2E : -INF;
        const double top = std::max<double>(row.peak, sink);
        const bool empty = row.lo >= row.hi || mass == 0;
        double lse = -INF;
        if (!empty) {
            const double norm = mass * std::exp2(row.peak - top) + std::exp2(sink - top);
            lse = top + std::log2(norm);
            row.factor = std::exp2(row.peak - top) / norm;
        }
        const auto weighted = [&](double x) { return empty ? 0.0f : float(x * row.factor); };
        const int64_t at = (t.batch * c.heads + row.head) * c.queries + row.query;
        const int64_t all = c.batch * c.heads * c.queries;
        c.lse[at] = lse * LN2;
        if (c.entropy) c.entropy[at] = weighted((mass * (lse - row.peak) - surprise) * LN2);
        if (c.distance) c.distance[at] = weighted(total(load(sum + DISTANCE * LANE)));
        double near = 0;
        for (int64_t i = 0; i < c.withins; ++i) {
            near += w.near.p[r * c.withins + i];
            c.within_mass[i * all + at] = weighted(near);
        }
        for (int64_t i = 0; i < c.matches; ++i) {
            const bool any = c.match_query[i][t.batch * c.match_query_stride[i] + row.query] != -1;
            c.match_mass[i * all + at] = any ? weighted(total(load(sum + (MATCH + i) * LANE))) : 0;
        }
        const float factor = row.factor;
        if (c.out) {
            float *to = c.out + ((t.batch * c.queries + row.query) * c.heads + row.head) * c.values;
            for (int64_t d = 0; d < c.values; ++d) to[d] = o[d] * factor;
        }
        for (int64_t d = 0; d < c.extras; ++d) c.extra_mass[at * c.extras + d] = o[own + d] * factor;
    }
}

void Job::add_columns(const Block &t, Workspace &w) {
    const int64_t origin = t.lo / PANEL * PANEL, span = (t.hi - origin + CHUNK - 1) / CHUNK * CHUNK;
    float *sum = w.column.need(share * span);
    std::fill_n(sum, share * span, 0.0f);
    for (int64_t first = origin, chunk = 0; first < t.hi; first += CHUNK, ++chunk) {
        const int64_t last = std::min<int64_t>(first + CHUNK, t.hi);
        const float *s = w.s.p + chunk * t.rows * PITCH;
        for (const Tile &tile : w.tiles) {
            const int64_t from = std::max<int64_t>(first, tile.any_lo / PANEL * PANEL);
            const int64_t to = std::min<int64_t>(last, tile.any_hi);
            for (int64_t r = tile.first; r < tile.first + tile.rows; ++r) {
                const Row &row = w.rows[r];
                if (row.factor == 0 || from >= to) continue;
                const float factor = row.factor * std::exp2(w.chunk_peak.p[chunk * t.rows + r] - row.peak);
                float *to_head = sum + (row.head - t.group * share) * span + (from - origin);
                const float *e = s + r * PITCH + (from - first);
                for (int64_t j = 0; j < to - from; j += LANE)
                    store(to_head + j, load(to_head + j) + load(e + j) * factor);
            }
        }
    }
    const std::lock_guard<std::mutex> guard(locks[t.batch * c.groups + t.group]);
    for (int64_t h = 0; h < share; ++h) {
        double *to = column.p + (t.batch * c.heads + t.group * share + h) * c.keys;
        for (int64_t j = t.lo; j < t.hi; ++j) to[j] += quantise(sum[h * span + j - origin]);
    }
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// native.py compares this with its own mirror, so that a stale build is refused.
API int64_t foveate_call_size() { return sizeof(Call); }

// Zero when everything went well, otherwise memory ran out.
API int foveate_attend(const Call *call) {
    try {
        return Job(*call).run() ? 0 : 1;
    } catch (...) {
        return 1;
    }
}
