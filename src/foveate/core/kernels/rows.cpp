// Exact softmax attention with per-row and per-key statistics, in blocks of rows.
//
// A block of rows walks over its keys in chunks. Scores of one chunk stay in the L2 cache while they become
// weights e = 2^(s - m) relative to the running maximum m; every sum over e is rescaled when m grows. Column
// mass needs the final normaliser, so only then is the e of all chunks kept until the block ends.
// Scores are held in units of log2 (the factor is folded into the queries), which makes exp one polynomial.

#include "tiles.hpp"

// Mirrored field by field in native.py. Strides count elements; a null pointer means "not asked".
struct Call {
    int64_t batch, heads, groups, queries, keys, width, values, extras, withins, matches, threads;
    const float *q, *k, *v;
    int64_t q_stride[3], k_stride[3], v_stride[3];  // batch, head, position
    Coded k_coded, v_coded;                         // where k or v is null
    const int32_t *lo, *hi, *query_position, *key_position;  // positions: null where no distance is asked for
    int64_t lo_stride, hi_stride, query_position_stride, key_position_stride;
    const int32_t *within;                    // ascending
    const int32_t *const *match_query, *const *match_key;
    const int64_t *match_query_stride, *match_key_stride;
    const float *sinks, *extra, *tilt;        // tilt: a bias on keys, rows of whole panels
    const uint8_t *tilted;                    // the rows that the tilt is for; null: all
    const int32_t *index;                     // which row of k and v each key is; null: its own number
    int64_t extra_stride, tilt_batch_stride, tilt_head_stride, tilted_stride, index_stride;
    Ranges ranges;                            // which keys row blocks visit
    int64_t activation;                       // weights are functions of score + shift, and nothing is normalised
    int64_t power;                            // of EXCESS and SOFT_EXCESS
    int64_t piece;                            // keys per part where few rows have many
    double scale, softcap, shift;             // softcap 0: none
    const float *row_shift, *row_cut;         // [batch, heads, queries], from UP_TO on
    float *out;                               // [batch, queries, heads, values]
    float *lse, *top, *entropy, *distance;    // [batch, heads, queries]
    float *within_mass, *match_mass;          // [n, batch, heads, queries]
    float *extra_mass;                        // [batch, heads, queries, extras]
    float *column;                            // [batch, heads, keys]
};

namespace {

// What one row carries from chunk to chunk.
struct Row {
    int32_t lo, hi;       // keys that it sees
    int64_t query, head;
    const float *tilt;    // bias on its keys in nats, or null
    float shift, cut;     // of an activation; the shift in units of ln 2, of SOFT_EXCESS a factor
    int64_t here;         // its position, relative to the block's first key
    float peak;           // largest score so far
    double factor;        // weight = e * factor, once all keys were seen
};

// What scores become: capped, tilted, cut to the keys of [lo, hi) that each row sees. `peak` follows the largest score
// per row and lane.
template <int M, bool CUT, bool TILT>
INLINE void settle_tile(vf (&acc)[M][LANES], float *s, float *peak, float cap, const Row *rows, int32_t first,
                        int32_t lo, int32_t hi) {
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
                const vi seen = (key >= splat(std::max(lo, rows[r].lo))) & (key < splat(std::min(hi, rows[r].hi)));
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

// Scores of M rows against one panel of keys.
template <int M, bool CUT, bool TILT>
void score_tile(const float *q, const float *k, int64_t width, float *s, float *peak, float cap, const Row *rows,
                int32_t first, int32_t lo, int32_t hi) {
    vf acc[M][LANES] = {};
    multiply<M, LANES>(acc, q, 1, M, k, PANEL, width);
    settle_tile<M, CUT, TILT>(acc, s, peak, cap, rows, first, lo, hi);
}

// The same for few rows, one at a time, with keys that are read where they stand, or decoded: each is read once, and
// packing them would take longer than all the rest. `key` points to the keys of the panel; rows of q are filled up with
// zeros.
template <bool CUT, bool TILT>
void score_row(const float *q, const float *const *key, int64_t width, float *s, float *peak, float cap,
               const Row *rows, int32_t first, int32_t lo, int32_t hi) {
    vf acc[1][LANES], part[LANE];
    const int64_t whole = width / LANE * LANE;
    for (int c = 0; c < LANES; ++c) {
        for (int i = 0; i < LANE; ++i) {
            const float *k = key[c * LANE + i];
            vf sum{};
            for (int64_t d = 0; d < whole; d += LANE) sum += load(q + d) * load(k + d);
            if (whole < width) {
                float rest[LANE] = {};
                std::copy(k + whole, k + width, rest);
                sum += load(q + whole) * load(rest);
            }
            part[i] = sum;
        }
        acc[0][c] = totals<LANE>(part);
    }
    settle_tile<1, CUT, TILT>(acc, s, peak, cap, rows, first, lo, hi);
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

// One row takes more columns at once: values are then read in the order in which they stand.
constexpr int COLUMNS = 64;
constexpr int32_t NEAR = 64;  // keys whose values stay in the nearest cache
template <size_t... N>
constexpr std::array<decltype(&value_tile<1, 1>), sizeof...(N)> single_rows(std::index_sequence<N...>) {
    return {value_tile<1, N + 1>...};
}
constexpr auto VALUE_ROW = single_rows(std::make_index_sequence<COLUMNS / LANE>());

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

// Turns the scores of one row into functions of score + shift, in place; what it does not see becomes zero.
template <int ACT>
void weigh_alone(float *s, int64_t n, const Row &row, int64_t power, float *sum) {
    const vf by = splat(row.shift), cut = splat(row.cut);
    vf mass = load(sum + MASS * LANE);
    for (int64_t j = 0; j < n; j += LANE) {
        const vf x = load(s + j);
        vf e = ACT == SOFT_EXCESS ? activate<SOFTPLUS>(x) : activate<ACT>(x + by);
        if (ACT == UP_TO) e = (vf)((vi)e & ~(e > cut));
        if (ACT == EXCESS) e = raised(over(e, cut), power);
        if (ACT == SOFT_EXCESS) e = raised(over(e, cut) * by, power);
        // hidden keys stand at minus infinity
        e = (vf)((vi)e & (x != splat(-INF)));
        store(s + j, e);
        mass += e;
    }
    store(sum + MASS * LANE, mass);
}

constexpr decltype(&weigh_alone<SIGMOID>) ALONE[] = {nullptr,
                                                     weigh_alone<SIGMOID>,
                                                     weigh_alone<RELU>,
                                                     weigh_alone<SOFTPLUS>,
                                                     weigh_alone<UP_TO>,
                                                     weigh_alone<EXCESS>,
                                                     weigh_alone<SOFT_EXCESS>};

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
// A block of rows: (query, head) pairs of some heads of a group, heads fastest.
struct Block {
    int64_t batch, group, head, heads, first, rows;  // head: the first of them
    int32_t lo, hi;                                  // keys that some row sees
    const int32_t *range, *range_end;                // stretches of keys that it visits; null: all
    int64_t piece, pieces;                           // which part of its keys this is
    int64_t cost;
};

// One part of the keys of few rows, before it is merged with the other parts.
struct Part {
    std::vector<float> o, peak;
    std::vector<double> mass;
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
    const Reader coded_keys{c.k_coded, c.width}, coded_values{c.v_coded, c.values};
    const int64_t columns = own + c.extras;
    const int64_t padded = (columns + LANE - 1) / LANE * LANE;
    const int64_t keys_padded = (c.keys + PANEL - 1) / PANEL * PANEL;
    const int64_t sums = MATCH + c.matches;
    const float cap = c.softcap * LOG2E;
    const int64_t block = c.column ? BLOCK / 2 : BLOCK;
    bool shared = false;    // keys and values are packed once for all blocks
    bool few = false;       // keys are read where they stand
    bool in_place = false;  // and so are values
    Buffer<float> keys, values;
    Buffer<double> column;
    Buffer<int32_t> labels;
    std::vector<Block> blocks, split;
    std::vector<Part> parts;
    std::unique_ptr<std::mutex[]> locks;

    explicit Job(const Call &call) : c(call) {}
    bool run();
    void plan();
    void add_blocks(int64_t b, int64_t g, int64_t head, int64_t heads);
    void add(Block t);
    void keep(const Block &t, const Workspace &w);
    void merge(const Block &t);
    int64_t row_of(const Block &t, int64_t j) const { return c.index ? c.index[t.batch * c.index_stride + j] : j; }
    const float *key_row(const Block &t, int64_t j, float *room) const;
    void pack_keys(const Block &t, int64_t first, int64_t last, float *to) const;
    void pack_values(const Block &t, int64_t first, int64_t last, float *to) const;
    void prepare(const Block &t, Workspace &w) const;
    void attend(const Block &t, Workspace &w);
    void walk(const Block &t, Workspace &w, int32_t lo, int32_t hi);
    void weigh_row(const Block &t, Workspace &w, int64_t r, float *s, int64_t from, int64_t to) const;
    void mix(Workspace &w, const float *s, const Values &v, int64_t r, int64_t rows, int64_t from, int64_t to) const;
    void mix_tile(const Tile &tile, Workspace &w, const float *s, const Values &v, int32_t first,
                  int32_t last) const;
    void finish(const Block &t, Workspace &w) const;
    void add_columns(const Block &t, Workspace &w);
};

void Job::plan() {
    const bool per_head = c.ranges.start && c.ranges.heads > 1;
    for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t g = 0; g < c.groups; ++g)
            for (int64_t h = 0; h < (per_head ? share : 1); ++h)
                add_blocks(b, g, g * share + h, per_head ? 1 : share);
    shared = c.queries * share > block;
    few = c.queries * share <= 2 * ROWS;
    in_place = few && columns == padded && !c.extras && !c.index && c.v;
    // The largest first, so that no thread is left alone with one at the end.
    std::stable_sort(blocks.begin(), blocks.end(), [](auto &x, auto &y) { return x.cost > y.cost; });
}

void Job::add_blocks(int64_t b, int64_t g, int64_t head, int64_t heads) {
    const int64_t most = c.ranges.start ? c.ranges.rows : std::max<int64_t>(c.queries, 1);
    for (int64_t query = 0, row = 0; query < c.queries; query += most, ++row) {
        const int64_t rows = std::min(most, c.queries - query) * heads;
        // equal shares of whole tiles, where the rows of one pattern block are more than a block
        const int64_t parts = (rows + block - 1) / block;
        const int64_t step = c.ranges.start ? ((rows + parts - 1) / parts + ROWS - 1) / ROWS * ROWS : block;
        for (int64_t first = 0; first < rows; first += step) {
            Block t{b, g, head, heads, query * heads + first, std::min(step, rows - first), INT32_MAX, 0,
                    nullptr, nullptr, 0, 1, 0};
            for (int64_t i = t.first / heads; i <= (t.first + t.rows - 1) / heads; ++i) {
                const int32_t from = std::max(c.lo[b * c.lo_stride + i], 0);
                const int32_t to = std::min<int64_t>(c.hi[b * c.hi_stride + i], c.keys);
                if (from < to) t.lo = std::min(t.lo, from), t.hi = std::max(t.hi, to);
            }
            if (t.hi == 0) t.lo = 0;
            t.cost = (t.hi - t.lo) * t.rows;
            if (c.ranges.start) {
                c.ranges.of(b, head, row, t.range, t.range_end);
                t.cost = 0;
                for (const int32_t *r = t.range; r < t.range_end; r += 2)
                    t.cost += t.rows * std::max(0, std::min(t.hi, r[1]) - std::max(t.lo, r[0]));
            }
            add(t);
        }
    }
}

// Adds a block, in parts where few rows have many keys and nothing but their outputs is asked for. The parts do not
// depend on the count of threads.
void Job::add(Block t) {
    const bool plain = !c.entropy && !c.distance && !c.withins && !c.matches && !c.extras && !c.column && !c.activation;
    const int64_t span = t.hi - t.lo, pieces = (span + c.piece - 1) / c.piece;
    if (c.queries * share > block || !plain || c.ranges.start || pieces < 2) return blocks.push_back(t);
    t.pieces = pieces;
    t.piece = parts.size();
    parts.resize(parts.size() + pieces);
    split.push_back(t);
    const int32_t lo = t.lo, hi = t.hi;
    const int64_t step = (span + pieces - 1) / pieces + PANEL - 1;
    for (int64_t n = 0, at = lo; n < pieces; ++n, ++t.piece) {
        // parts begin where panels do
        t.lo = at, t.hi = at = n + 1 < pieces ? std::min<int64_t>(hi, (at + step) / PANEL * PANEL) : hi;
        t.cost = std::max(0, t.hi - t.lo) * t.rows;
        blocks.push_back(t);
    }
}

// What one part says of its rows, for `merge`.
void Job::keep(const Block &t, const Workspace &w) {
    Part &part = parts[t.piece];
    part.o.assign(w.o.p, w.o.p + t.rows * padded);
    for (int64_t r = 0; r < t.rows; ++r) {
        part.peak.push_back(w.rows[r].peak);
        part.mass.push_back(total(load(w.sum.p + r * sums * LANE + MASS * LANE)));
    }
}

// The merge is associative: outputs and masses, each relative to the largest score of its part.
void Job::merge(const Block &t) {
    Workspace w;
    prepare(t, w);
    for (int64_t r = 0; r < t.rows; ++r) {
        Row &row = w.rows[r];
        for (int64_t n = t.piece; n < t.piece + t.pieces; ++n) row.peak = std::max(row.peak, parts[n].peak[r]);
        double mass = 0;
        for (int64_t n = t.piece; n < t.piece + t.pieces; ++n) {
            if (parts[n].peak[r] == -INF) continue;
            const double fade = std::exp2(double(parts[n].peak[r]) - row.peak);
            mass += fade * parts[n].mass[r];
            for (int64_t i = 0; i < padded; ++i) w.o.p[r * padded + i] += float(fade) * parts[n].o[r * padded + i];
        }
        w.sum.p[r * sums * LANE + MASS * LANE] = mass;
    }
    finish(t, w);
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
                Block t{};
                t.batch = pair / c.groups, t.group = pair % c.groups;
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
    if (good)
        for (const Block &t : split) merge(t);
    std::copy_n(column.p, cells, c.column);
    return good;
}

// Key j where it stands, or in `room` where it must be decoded.
const float *Job::key_row(const Block &t, int64_t j, float *room) const {
    const int64_t at = row_of(t, j);
    if (c.k) return c.k + t.batch * c.k_stride[0] + t.group * c.k_stride[1] + at * c.k_stride[2];
    coded_keys.read(t.batch, t.group, at, room);
    return room;
}

// Keys [first, last) as panels. What is left of the last panel stays as it is: no row sees it, so score_tile hides it.
void Job::pack_keys(const Block &t, int64_t first, int64_t last, float *to) const {
    std::array<float, 4 * WIDEST> four;
    int64_t turn = 0;
    pack_panels([&](int64_t j) { return key_row(t, j, four.data() + turn++ % 4 * c.width); }, first, last, c.width, to);
}

// Values and extra columns side by side, [keys x padded].
void Job::pack_values(const Block &t, int64_t first, int64_t last, float *to) const {
    for (int64_t j = first; j < last; ++j, to += padded) {
        const int64_t at = row_of(t, j);
        if (own && !c.v) coded_values.read(t.batch, t.group, at, to);
        else std::copy_n(c.v + t.batch * c.v_stride[0] + t.group * c.v_stride[1] + at * c.v_stride[2], own, to);
        std::copy_n(c.extra + t.batch * c.extra_stride + j * c.extras, c.extras, to + own);
        std::fill(to + columns, to + padded, 0.0f);
    }
}

void Job::prepare(const Block &t, Workspace &w) const {
    const bool placed = c.key_position && c.query_position;
    const int32_t *key_position = placed ? c.key_position + t.batch * c.key_position_stride : nullptr;
    const int32_t *query_position = placed ? c.query_position + t.batch * c.query_position_stride : nullptr;
    const int64_t base = placed && t.lo < t.hi ? key_position[t.lo] : 0, origin = t.lo / PANEL * PANEL;
    w.rows.clear();
    w.tiles.clear();
    for (int64_t r = 0; r < t.rows; ++r) {
        const int64_t i = (t.first + r) / t.heads, head = t.head + (t.first + r) % t.heads;
        const int64_t at = (t.batch * c.heads + head) * c.queries + i;
        Row row{std::max(c.lo[t.batch * c.lo_stride + i], 0),
                int32_t(std::min<int64_t>(c.hi[t.batch * c.hi_stride + i], c.keys)), i, head, nullptr,
                float((c.row_shift ? c.row_shift[at] : c.shift) * (c.activation == SOFT_EXCESS ? 1 : LOG2E)),
                c.row_cut ? c.row_cut[at] : 0.0f,
                placed ? query_position[i] - base : 0, -INF, 0};
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
    const int64_t wide = (c.width + LANE - 1) / LANE * LANE;
    float *q = w.q.need(t.rows * wide);
    if (few) std::fill_n(q, t.rows * wide, 0.0f);
    for (const Tile &tile : w.tiles)
        for (int64_t r = 0; r < tile.rows; ++r) {
            const Row &row = w.rows[tile.first + r];
            const float *from = c.q + t.batch * c.q_stride[0] + row.head * c.q_stride[1] + row.query * c.q_stride[2];
            float *to = few ? q + (tile.first + r) * wide : q + tile.first * c.width + r;
            for (int64_t d = 0; d < c.width; ++d, to += few ? 1 : tile.rows) *to = from[d] * scale;
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
    const int32_t whole[] = {t.lo, t.hi}, *range = whole, *end = whole + 2;
    if (c.ranges.start) range = t.range, end = t.range_end;
    for (; range < end; range += 2) walk(t, w, std::max(t.lo, range[0]), std::min(t.hi, range[1]));
    if (t.pieces > 1) return keep(t, w);
    finish(t, w);
    if (c.column) add_columns(t, w);
}

// Goes over the keys [lo, hi).
void Job::walk(const Block &t, Workspace &w, int32_t lo, int32_t hi) {
    const int64_t pair = t.batch * c.groups + t.group, wide = (c.width + LANE - 1) / LANE * LANE;
    for (int64_t first = lo / PANEL * PANEL, chunk = 0; first < hi; first += CHUNK, ++chunk) {
        const int64_t last = std::min<int64_t>(first + CHUNK, hi), begin = std::max<int64_t>(first, lo);
        const float *k = keys.p + (pair * keys_padded + first) * c.width;
        Values v{values.p + pair * c.keys * padded, padded};
        if (!shared) {
            if (!few) pack_keys(t, first, last, w.k.p);
            k = w.k.p;
            if (in_place) {
                v = {c.v + t.batch * c.v_stride[0] + t.group * c.v_stride[1], c.v_stride[2]};
            } else if (!few) {
                pack_values(t, first, last, w.v.p);
                v.key_0 = w.v.p - first * padded;
            }
        }
        float *s = w.s.p + (c.column ? chunk * t.rows * PITCH : 0);
        std::fill_n(w.peak.p, t.rows * LANE, -INF);
        for (int64_t p = first; p < last; p += PANEL, k += PANEL * c.width) {
            const float *key[PANEL];
            for (int64_t j = 0; few && j < PANEL; ++j)
                key[j] = key_row(t, std::min(p + j, last - 1), w.k.p + j * c.width);
            for (const Tile &tile : w.tiles) {
                if (tile.any_hi <= p || tile.any_lo >= p + PANEL) continue;
                const bool cut = std::max(tile.all_lo, lo) > p || std::min(tile.all_hi, hi) < p + PANEL;
                for (int64_t r = tile.first; few && r < tile.first + tile.rows; ++r)
                    (c.tilt ? (cut ? score_row<true, true> : score_row<false, true>)
                            : (cut ? score_row<true, false> : score_row<false, false>))(
                        w.q.p + r * wide, key, c.width, s + r * PITCH + (p - first), w.peak.p + r * LANE, cap,
                        &w.rows[r], p, lo, hi);
                if (few) continue;
                (c.tilt ? (cut ? SCORE<true, true> : SCORE<false, true>)
                        : (cut ? SCORE<true, false> : SCORE<false, false>))[tile.rows - 1](
                    w.q.p + tile.first * c.width, k, c.width, s + tile.first * PITCH + (p - first),
                    w.peak.p + tile.first * LANE, cap, &w.rows[tile.first], p, lo, hi);
            }
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
            if (padded && !few) mix_tile(tile, w, s - first, v, begin, last);
        }
        // few rows take turns at values that the first of them has brought into the nearest cache
        for (int32_t at = begin; few && padded && at < last; at += NEAR) {
            const int32_t end = std::min<int32_t>(at + NEAR, last);
            if (!in_place) {
                pack_values(t, at, end, w.v.p);
                v.key_0 = w.v.p - at * padded;
            }
            for (int64_t r = 0; r < t.rows; ++r)
                mix(w, s - first, v, r, 1, std::max(at, w.rows[r].lo), std::min(end, w.rows[r].hi));
        }
    }
}

// `s` points to where key 0 would stand; [from, to) are whole panels.
void Job::weigh_row(const Block &t, Workspace &w, int64_t r, float *s, int64_t from, int64_t to) const {
    Row &row = w.rows[r];
    float *sum = w.sum.p + r * sums * LANE, *near = w.near.p + r * c.withins, *o = w.o.p + r * padded;
    const float peak = std::max(row.peak, largest(load(w.peak.p + r * LANE)));
    if (c.activation) {
        row.peak = peak;
        return ALONE[c.activation](s + from, to - from, row, c.power, sum);
    }
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

// Adds the values of keys [from, to), weighted by some rows. `s` points to where key 0 would stand.
void Job::mix(Workspace &w, const float *s, const Values &v, int64_t r, int64_t rows, int64_t from, int64_t to) const {
    const int64_t wide = rows == 1 ? COLUMNS : PANEL;
    for (int64_t p = 0; p < padded && from < to; p += wide) {
        const int64_t n = std::min<int64_t>(wide, padded - p) / LANE - 1;
        (rows == 1 ? VALUE_ROW[n] : VALUE[n][rows - 1])(s + r * PITCH + from, v.key_0 + from * v.pitch + p, v.pitch,
                                                        to - from, w.o.p + r * padded + p, padded);
    }
}

// The same for a tile and the keys [first, last). Only keys that a row sees are touched: zero weight does not silence
// NaN in a value.
void Job::mix_tile(const Tile &tile, Workspace &w, const float *s, const Values &v, int32_t first,
                   int32_t last) const {
    const int32_t all_lo = std::max(first, tile.all_lo), all_hi = std::min(last, tile.all_hi);
    if (all_lo < all_hi) mix(w, s, v, tile.first, tile.rows, all_lo, all_hi);
    for (int64_t r = tile.first; r < tile.first + tile.rows; ++r) {
        const int32_t lo = std::max(first, w.rows[r].lo), hi = std::min(last, w.rows[r].hi);
        if (all_lo < all_hi) {
            mix(w, s, v, r, 1, lo, all_lo);
            mix(w, s, v, r, 1, all_hi, hi);
        } else {
            mix(w, s, v, r, 1, lo, hi);
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
        if (c.activation) row.factor = 1;
        else if (!empty) {
            const double norm = mass * std::exp2(row.peak - top) + std::exp2(sink - top);
            lse = top + std::log2(norm);
            row.factor = std::exp2(row.peak - top) / norm;
        }
        const auto weighted = [&](double x) { return empty ? 0.0f : float(x * row.factor); };
        const int64_t at = (t.batch * c.heads + row.head) * c.queries + row.query;
        const int64_t all = c.batch * c.heads * c.queries;
        c.lse[at] = c.activation ? mass : lse * LN2;
        if (c.top) c.top[at] = row.peak * LN2;
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
