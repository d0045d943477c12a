// Derivatives of exact attention. Weights are made again from the scores and the log-sum-exp of their row, strip by
// strip of keys, and never stand in memory together:
//
//     p = e^(s - lse)    ds = p (dout v - shared)    dq = scale ds k    dk = scale ds^T q    dv = p^T dout
//
// Under SOFT_EXCESS, u = max(0, shift (softplus(s) - cut)) and its sum of u^power in the place of lse:
//
//     p = u^power / lse    ds = sigmoid(s) (power shift u^(power - 1) / lse (dout v - shared) + common)
//
// A part is one group of heads of a batch entry with every n-th of its row blocks. It sums up derivatives of keys and
// values of its own, and these sums are added in order: the numbers do not depend on the count of threads.

#include "tiles.hpp"

// Mirrored field by field in native.py. Strides count elements.
struct Back {
    int64_t batch, heads, groups, queries, keys, width, values, threads;
    const float *q, *k, *v, *dout;
    int64_t q_stride[3], k_stride[3], v_stride[3], dout_stride[3];  // batch, head, position
    const float *lse, *shared;                                      // [batch, heads, queries]
    const int32_t *lo, *hi;
    int64_t lo_stride, hi_stride;
    Ranges ranges;
    int64_t activation, power;
    double scale, shift;
    const float *row_shift, *row_cut, *common;  // [batch, heads, queries], for SOFT_EXCESS
    float *dq, *dk, *dv;  // [batch, heads, queries, width], [batch, groups, keys, width or values]
};

namespace {

constexpr int STRIP = 64;  // keys at once, a multiple of PANEL
constexpr int STRIP_PITCH = STRIP + 16;
constexpr int64_t PARTS = 8;  // at least so many parts, where there are rows for them
static_assert(STRIP % PANEL == 0);

int64_t lanes(int64_t n) { return (n + LANE - 1) / LANE * LANE; }

// o[r] += sum over i of a[r][i] b[i], for M rows of o
template <int M, int N>
void add_product(float *o, int64_t pitch, const float *a, int64_t row, int64_t step, const float *b, int64_t n) {
    vf acc[M][N];
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < N; ++c) acc[r][c] = load(o + r * pitch + c * LANE);
    multiply<M, N>(acc, a, row, step, b, pitch, n);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < N; ++c) store(o + r * pitch + c * LANE, acc[r][c]);
}

template <int N>
constexpr decltype(&add_product<1, N>) ADD_ROWS[] = {add_product<1, N>, add_product<2, N>, add_product<3, N>,
                                                     add_product<4, N>, add_product<5, N>, add_product<6, N>};
constexpr const decltype(&add_product<1, 1>) *ADD[] = {ADD_ROWS<1>, ADD_ROWS<2>,
#if defined(__AVX512F__) || defined(__aarch64__)
                                                       ADD_ROWS<3>, ADD_ROWS<4>
#endif
};

// The same for any number of columns; o and b have rows of `pitch`.
void add_products(int64_t rows, float *o, int64_t pitch, const float *a, int64_t row, int64_t step, const float *b,
                  int64_t n) {
    for (int64_t c = 0; c < pitch; c += PANEL)
        ADD[std::min<int64_t>(PANEL, pitch - c) / LANE - 1][rows - 1](o + c, pitch, a, row, step, b + c, n);
}

struct Limits {
    int32_t lo, hi;
    float lse, shared;         // lse in units of log2; of SOFT_EXCESS as it is
    float shift, cut, common;  // of SOFT_EXCESS
};

// Weights and ds of M rows against one panel of keys.
template <int M, int ACT>
void derive_tile(const float *q, const float *dout, const float *k, const float *v, int64_t width, int64_t values,
                 float *p, float *ds, const Limits *rows, int32_t first, int32_t lo, int32_t hi, float scale,
                 float shift, int64_t power) {
    const vi key = iota() + splat(first);
    vf acc[M][LANES] = {}, bend[M][LANES], rise[M][LANES];
    multiply<M, LANES>(acc, q, 1, M, k, PANEL, width);
    for (int r = 0; r < M; ++r) {
        const int32_t from = std::max(lo, rows[r].lo), to = std::min(hi, rows[r].hi);
        for (int c = 0; c < LANES; ++c) {
            const vi at = key + splat(c * LANE);
            vf e;
            if constexpr (ACT == SOFTMAX) {
                const vf x = acc[r][c] - splat(rows[r].lse);
                e = exp2(x < splat(127.0f) ? larger(splat(-150.0f), x) : splat(127.0f));
            } else if constexpr (ACT == SOFT_EXCESS) {
                const vf plain = activate<SOFTPLUS>(acc[r][c]), u = over(plain, splat(rows[r].cut)) * rows[r].shift;
                const vf below = raised(u, power - 1) * (1 / rows[r].lse);
                bend[r][c] = slope<SOFTPLUS>(plain);
                rise[r][c] = below * (power * rows[r].shift);
                e = below * u;
            } else {
                e = activate<ACT>(acc[r][c] + splat(shift));
            }
            store(p + r * STRIP_PITCH + c * LANE, (vf)((vi)e & (at >= splat(from)) & (at < splat(to))));
        }
    }
    for (int r = 0; r < M; ++r)
        for (int c = 0; c < LANES; ++c) acc[r][c] = vf{};
    multiply<M, LANES>(acc, dout, 1, M, v, PANEL, values);
    for (int r = 0; r < M; ++r)
        for (int c = 0; c < LANES; ++c) {
            const vf e = load(p + r * STRIP_PITCH + c * LANE);
            vf by = e;
            if constexpr (ACT == SOFT_EXCESS) by = rise[r][c];
            else if constexpr (ACT != SOFTMAX) by = slope<ACT>(e);
            vf x = by * (acc[r][c] - splat(rows[r].shared));
            // what has no weight has no derivative, whatever stands in its value
            x = (vf)((vi)x & (by != vf{}) & (e != vf{}));
            if constexpr (ACT == SOFT_EXCESS) {
                const int32_t from = std::max(lo, rows[r].lo), to = std::min(hi, rows[r].hi);
                const vi at = key + splat(c * LANE);
                x = (vf)((vi)(bend[r][c] * (x + splat(rows[r].common))) & (at >= splat(from)) & (at < splat(to)));
            }
            store(ds + r * STRIP_PITCH + c * LANE, x * scale);
        }
}

template <int ACT>
constexpr decltype(&derive_tile<1, ACT>) DERIVE[] = {derive_tile<1, ACT>, derive_tile<2, ACT>, derive_tile<3, ACT>,
                                                     derive_tile<4, ACT>, derive_tile<5, ACT>, derive_tile<6, ACT>};
constexpr const decltype(&derive_tile<1, SOFTMAX>) *DERIVE_AS[] = {DERIVE<SOFTMAX>, DERIVE<SIGMOID>, DERIVE<RELU>,
                                                                   DERIVE<SOFTPLUS>, nullptr, nullptr,
                                                                   DERIVE<SOFT_EXCESS>};

// (query, head) pairs of some heads of a group, heads fastest.
struct RowBlock {
    int64_t head, heads, first, rows, pattern;
};

struct Scratch {
    std::vector<Limits> rows;
    std::vector<Tile> tiles;
    Buffer<float> q_tiles, dout_tiles, q, dout, dq, p, ds, dk, dv;
};

struct Derivation {
    const Back &c;
    const int64_t share = c.heads / c.groups, pairs = c.batch * c.groups;
    const int64_t wide = lanes(c.width), tall = lanes(c.values);
    const int64_t padded = (c.keys + STRIP - 1) / STRIP * STRIP;
    int64_t parts = 1;
    std::vector<RowBlock> blocks;  // of one group; its heads count from 0
    Buffer<float> k_panels, v_panels, k_rows, dk, dv;

    explicit Derivation(const Back &call) : c(call) {}
    bool run();
    void plan();
    void pack(int64_t pair);
    void part(int64_t pair, int64_t n, Scratch &w, float *dk, float *dv) const;
    void prepare(int64_t pair, const RowBlock &t, Scratch &w) const;
    void strip(int64_t pair, const RowBlock &t, Scratch &w, int32_t first, int32_t lo, int32_t hi, float *dk,
               float *dv) const;
    void write(int64_t pair, const float *dk, const float *dv) const;
};

void Derivation::plan() {
    const bool per_head = c.ranges.start && c.ranges.heads > 1;
    const int64_t heads = per_head ? 1 : share;
    const int64_t most = c.ranges.start ? c.ranges.rows : std::max<int64_t>(c.queries, 1);
    for (int64_t h = 0; h < share; h += heads)
        for (int64_t query = 0, pattern = 0; query < c.queries; query += most, ++pattern) {
            const int64_t rows = std::min(most, c.queries - query) * heads, pieces = (rows + BLOCK - 1) / BLOCK;
            const int64_t step = ((rows + pieces - 1) / pieces + ROWS - 1) / ROWS * ROWS;
            for (int64_t first = 0; first < rows; first += step)
                blocks.push_back({h, heads, query * heads + first, std::min(step, rows - first), pattern});
        }
    parts = std::max<int64_t>(1, std::min<int64_t>(PARTS / std::max<int64_t>(1, pairs), blocks.size()));
}

bool Derivation::run() {
    plan();
    k_panels.need(pairs * padded * c.width);
    v_panels.need(pairs * padded * c.values);
    k_rows.need(pairs * padded * wide);
    bool good = parallel(c.threads, pairs, [&](auto next) {
        for (int64_t i; (i = next()) >= 0;) pack(i);
    });
    if (!good) return false;
    if (parts > 1) dk.need(pairs * parts * padded * wide), dv.need(pairs * parts * padded * tall);
    good = parallel(c.threads, pairs * parts, [&](auto next) {
        Scratch w;
        for (int64_t i; (i = next()) >= 0;) {
            float *k = parts > 1 ? dk.p + i * padded * wide : w.dk.need(padded * wide);
            float *v = parts > 1 ? dv.p + i * padded * tall : w.dv.need(padded * tall);
            std::fill_n(k, padded * wide, 0.0f);
            std::fill_n(v, padded * tall, 0.0f);
            part(i / parts, i % parts, w, k, v);
            if (parts == 1) write(i, k, v);
        }
    });
    if (!good || parts == 1) return good;
    return parallel(c.threads, pairs, [&](auto next) {
        for (int64_t i; (i = next()) >= 0;) {
            float *k = dk.p + i * parts * padded * wide, *v = dv.p + i * parts * padded * tall;
            for (int64_t n = 1; n < parts; ++n) {
                for (int64_t j = 0; j < padded * wide; ++j) k[j] += k[n * padded * wide + j];
                for (int64_t j = 0; j < padded * tall; ++j) v[j] += v[n * padded * tall + j];
            }
            write(i, k, v);
        }
    });
}

// Keys and values as panels, keys also as rows. What no row sees is zero, whatever stands there.
void Derivation::pack(int64_t pair) {
    const int64_t b = pair / c.groups, g = pair % c.groups;
    std::vector<int32_t> edge(padded + 1);
    for (int64_t i = 0; i < c.queries; ++i) {
        const int32_t lo = std::max(c.lo[b * c.lo_stride + i], 0);
        const int32_t hi = std::min<int64_t>(c.hi[b * c.hi_stride + i], c.keys);
        if (lo < hi) ++edge[lo], --edge[hi];
    }
    for (int64_t j = 1; j <= padded; ++j) edge[j] += edge[j - 1];
    const std::vector<float> zero(std::max(c.width, c.values));
    const auto rows = [&](const float *x, const int64_t *stride) {
        return [=, &edge, &zero](int64_t j) {
            return edge[j] ? x + b * stride[0] + g * stride[1] + j * stride[2] : zero.data();
        };
    };
    const auto key = rows(c.k, c.k_stride), value = rows(c.v, c.v_stride);
    pack_panels(key, 0, padded, c.width, k_panels.p + pair * padded * c.width);
    pack_panels(value, 0, padded, c.values, v_panels.p + pair * padded * c.values);
    float *to = k_rows.p + pair * padded * wide;
    for (int64_t j = 0; j < padded; ++j, to += wide) {
        std::copy_n(key(j), c.width, to);
        std::fill(to + c.width, to + wide, 0.0f);
    }
}

void Derivation::part(int64_t pair, int64_t n, Scratch &w, float *dk, float *dv) const {
    const int64_t b = pair / c.groups, g = pair % c.groups;
    for (int64_t i = n; i < int64_t(blocks.size()); i += parts) {
        const RowBlock &t = blocks[i];
        prepare(pair, t, w);
        int32_t lo = INT32_MAX, hi = 0;
        for (const Tile &tile : w.tiles) lo = std::min(lo, tile.any_lo), hi = std::max(hi, tile.any_hi);
        const int32_t whole[] = {lo, hi};
        const int32_t *range = whole, *end = whole + 2;
        if (c.ranges.start) c.ranges.of(b, g * share + t.head, t.pattern, range, end);
        for (; range < end; range += 2) {
            const int32_t from = std::max(lo, range[0]), to = std::min(hi, range[1]);
            for (int32_t first = from / PANEL * PANEL; first < to; first = (first / STRIP + 1) * STRIP)
                strip(pair, t, w, first, from, to, dk, dv);
        }
        for (int64_t r = 0; r < t.rows; ++r) {
            const int64_t query = (t.first + r) / t.heads, head = g * share + t.head + (t.first + r) % t.heads;
            std::copy_n(w.dq.p + r * wide, c.width, c.dq + ((b * c.heads + head) * c.queries + query) * c.width);
        }
    }
}

void Derivation::prepare(int64_t pair, const RowBlock &t, Scratch &w) const {
    const int64_t b = pair / c.groups, g = pair % c.groups;
    float *q_tiles = w.q_tiles.need(t.rows * c.width), *dout_tiles = w.dout_tiles.need(t.rows * c.values);
    float *q = w.q.need(t.rows * wide), *dout = w.dout.need(t.rows * tall);
    std::fill_n(q, t.rows * wide, 0.0f);
    std::fill_n(dout, t.rows * tall, 0.0f);
    std::fill_n(w.dq.need(t.rows * wide), t.rows * wide, 0.0f);
    w.p.need(t.rows * STRIP_PITCH);
    w.ds.need(t.rows * STRIP_PITCH);
    w.rows.clear();
    w.tiles.clear();
    for (int64_t r = 0; r < t.rows; ++r) {
        const int64_t i = (t.first + r) / t.heads, head = g * share + t.head + (t.first + r) % t.heads;
        const int64_t at = (b * c.heads + head) * c.queries + i;
        Limits row{std::max(c.lo[b * c.lo_stride + i], 0),
                   int32_t(std::min<int64_t>(c.hi[b * c.hi_stride + i], c.keys)), float(c.lse[at] * LOG2E),
                   c.shared[at]};
        const bool excess = c.activation == SOFT_EXCESS;
        if (excess) row.lse = c.lse[at], row.shift = c.row_shift[at], row.cut = c.row_cut[at], row.common = c.common[at];
        // a pattern may leave nothing of what a row could see
        if (row.lo >= row.hi || c.lse[at] == (excess ? 0 : -INF)) row.lo = row.hi = 0;
        if (r % ROWS == 0) w.tiles.push_back({int32_t(r), 0, INT32_MAX, 0, 0, INT32_MAX});
        Tile &tile = w.tiles.back();
        ++tile.rows;
        tile.all_lo = std::max(tile.all_lo, row.lo);
        tile.all_hi = std::min(tile.all_hi, row.hi);
        if (row.lo < row.hi) {
            tile.any_lo = std::min(tile.any_lo, row.lo);
            tile.any_hi = std::max(tile.any_hi, row.hi);
            std::copy_n(c.q + b * c.q_stride[0] + head * c.q_stride[1] + i * c.q_stride[2], c.width, q + r * wide);
            std::copy_n(c.dout + b * c.dout_stride[0] + head * c.dout_stride[1] + i * c.dout_stride[2], c.values,
                        dout + r * tall);
        } else {
            row.lse = row.shared = row.shift = row.cut = row.common = 0;
        }
        w.rows.push_back(row);
    }
    const float scale = c.scale * LOG2E;
    for (const Tile &tile : w.tiles)
        for (int64_t r = 0; r < tile.rows; ++r) {
            const float *x = q + (tile.first + r) * wide, *y = dout + (tile.first + r) * tall;
            for (int64_t d = 0; d < c.width; ++d) q_tiles[tile.first * c.width + d * tile.rows + r] = x[d] * scale;
            for (int64_t d = 0; d < c.values; ++d) dout_tiles[tile.first * c.values + d * tile.rows + r] = y[d];
        }
}

// The keys from `first` to the end of its strip, of which [lo, hi) are visited.
void Derivation::strip(int64_t pair, const RowBlock &t, Scratch &w, int32_t first, int32_t lo, int32_t hi, float *dk,
                       float *dv) const {
    const int32_t last = std::min<int32_t>((first / STRIP + 1) * STRIP, (hi + PANEL - 1) / PANEL * PANEL);
    int64_t from = t.rows, to = 0;  // rows that see something of the strip
    for (const Tile &tile : w.tiles)
        if (tile.any_hi > first && tile.any_lo < last)
            from = std::min<int64_t>(from, tile.first), to = tile.first + tile.rows;
    const int64_t keys = last - first;
    for (const Tile &tile : w.tiles) {
        if (tile.first < from || tile.first >= to) continue;
        float *p = w.p.p + tile.first * STRIP_PITCH, *ds = w.ds.p + tile.first * STRIP_PITCH;
        for (int32_t at = first; at < last; at += PANEL)
            DERIVE_AS[c.activation][tile.rows - 1](
                w.q_tiles.p + tile.first * c.width, w.dout_tiles.p + tile.first * c.values,
                k_panels.p + (pair * padded + at) * c.width, v_panels.p + (pair * padded + at) * c.values, c.width,
                c.values, p + (at - first), ds + (at - first), &w.rows[tile.first], at, lo, hi, c.scale,
                c.shift * LOG2E, c.power);
        add_products(tile.rows, w.dq.p + tile.first * wide, wide, ds, STRIP_PITCH, 1,
                     k_rows.p + (pair * padded + first) * wide, keys);
    }
    for (int64_t j = 0; j < keys && from < to; j += ROWS) {
        const int64_t some = std::min<int64_t>(ROWS, keys - j), at = from * STRIP_PITCH + j;
        add_products(some, dv + (first + j) * tall, tall, w.p.p + at, 1, STRIP_PITCH, w.dout.p + from * tall, to - from);
        add_products(some, dk + (first + j) * wide, wide, w.ds.p + at, 1, STRIP_PITCH, w.q.p + from * wide, to - from);
    }
}

void Derivation::write(int64_t pair, const float *dk, const float *dv) const {
    for (int64_t j = 0; j < c.keys; ++j) {
        std::copy_n(dk + j * wide, c.width, c.dk + (pair * c.keys + j) * c.width);
        std::copy_n(dv + j * tall, c.values, c.dv + (pair * c.keys + j) * c.values);
    }
}

}  // namespace

API int64_t foveate_back_size() { return sizeof(Back); }

// Zero when everything went well, otherwise memory ran out.
API int foveate_back(const Back *call) {
    try {
        return Derivation(*call).run() ? 0 : 1;
    } catch (...) {
        return 1;
    }
}
