// The packed graph of a batch on the CPU, in double precision: what escaip/graph/knn.py computes, which has the symbols.
//
// A thread takes whole atoms, and what two of them decide together is decided by one: the same bits however many threads
// there are. Entries of lists and rows are counted in 32 bits; whoever has more is REFUSED.
#include "graph_pairs.h"

namespace {

using namespace escaip;

constexpr double TIE = 1e-9;           // of knn.py, as the next
constexpr double BOUND_MARGIN = 1e-6;
// A coordinate so far from 1 is decided without its logarithm.
constexpr double CLEAR = 1e-9;

enum Verdict : uint8_t { OUT = 0, IN = 1, UNSURE = 2 };

// Directed edge 2m is pair m from first to second, 2m + 1 its reverse; −1 the atom itself.
struct Entry {
    double distance;
    int32_t edge, neighbor;
};

// Entries, from the start of their list, that add to a rank by the step; all before them add 1.
struct Window {
    int32_t low, high;
    bool candidate;
};

struct Graph {
    Problem p;
    std::vector<Pair> pairs;
    std::vector<int64_t> start, tokens, extras, compared;  // first of each atom, and the end
    std::unique_ptr<Entry[]> entries;
    std::unique_ptr<int32_t[]> place, row;  // entry of each edge, row of each entry
    std::unique_ptr<Window[]> windows;
    std::unique_ptr<double[]> ranks;
    std::vector<uint8_t> verdicts;  // of each pair
    double stride;

    explicit Graph(const Problem& problem) : p(problem), stride(std::exp2(std::ceil(std::log2(4.0 * p.cutoff)))) {}

    int64_t build() {
        if (!is_sound(p)) return REFUSED;
        if (p.source == SEARCH) {
            if (!is_direct(p)) return WANTS_PAIRS;
            search(p, pairs);
        } else if (!read(p, pairs)) {
            return REFUSED;
        }
        if (2 * int64_t(pairs.size()) + p.atoms > std::numeric_limits<int32_t>::max()) return REFUSED;
        make_lists();
        if (p.kind == LIST) return DONE;
        if (!select()) return REFUSED;
        count();
        return DONE;
    }

    double key(int64_t atom, const Entry& entry) const { return entry.distance + double(atom) * stride; }
    int64_t length(int64_t atom) const { return start[atom + 1] - start[atom]; }
    const int32_t* shift(const Entry& entry) const { return pairs[entry.edge >> 1].shift; }
    // The entry of the same edge at its other end, which is in its neighbor's list.
    int32_t reverse(const Entry& entry) const { return place[entry.edge ^ 1]; }

    // By key, then neighbor, then shift, then as given.
    bool before(double base, const Entry& a, const Entry& b) const {
        const double x = a.distance + base, y = b.distance + base;
        if (x != y) return x < y;
        if (a.neighbor != b.neighbor) return a.neighbor < b.neighbor;
        const int32_t *s = shift(a), *t = shift(b), u = a.edge & 1 ? -1 : 1, v = b.edge & 1 ? -1 : 1;
        for (int c = 0; c < 3; ++c)
            if (u * s[c] != v * t[c]) return u * s[c] < v * t[c];
        return a.edge < b.edge;
    }

    // Each thread looks at all pairs for the atoms that are its own.
    template <class Visit>
    void over_ends(const Visit& visit) const {
        const int64_t parts = std::max<int64_t>(1, std::min(p.threads, p.atoms / 256));
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) num_threads(int(parts)) if (parts > 1)
#endif
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t low = p.atoms * part / parts, high = p.atoms * (part + 1) / parts;
            for (int64_t m = 0; m < int64_t(pairs.size()); ++m) {
                const Pair& pair = pairs[m];
                if (!(pair.distance < p.cutoff)) continue;
                if (pair.first >= low && pair.first < high) visit(pair.first, pair.second, 2 * m, pair.distance);
                if (pair.second >= low && pair.second < high) visit(pair.second, pair.first, 2 * m + 1, pair.distance);
            }
        }
    }

    void make_lists() {
        start.assign(p.atoms + 1, 0);
        over_ends([&](int64_t atom, int64_t, int64_t, double) { ++start[atom + 1]; });
        for (int64_t i = 0; i < p.atoms; ++i) start[i + 1] += start[i] + 1;
        entries = uninitialized<Entry>(start[p.atoms]);
        place = uninitialized<int32_t>(2 * pairs.size());
        std::vector<int64_t> end(start.begin(), start.end());
        for (int64_t i = 0; i < p.atoms; ++i) entries[end[i]++] = {0.0, -1, int32_t(i)};
        over_ends([&](int64_t atom, int64_t neighbor, int64_t edge, double distance) {
            entries[end[atom]++] = {distance, int32_t(edge), int32_t(neighbor)};
        });
        in_parallel(p.atoms, p.threads, [&](int64_t i) {
            const double base = double(i) * stride;
            std::sort(&entries[0] + start[i] + 1, &entries[0] + start[i + 1],
                      [&](const Entry& a, const Entry& b) { return before(base, a, b); });
            for (int64_t e = start[i] + 1; e < start[i + 1]; ++e) place[entries[e].edge] = int32_t(e);
        });
    }

    // Verdicts on all pairs; false where windows are so narrow that rounding of the keys turns them inside out.
    bool select() {
        windows = uninitialized<Window>(start[p.atoms]);
        ranks = uninitialized<double>(start[p.atoms]);
        verdicts.assign(pairs.size(), OUT);
        int64_t faults = 0;
        in_parallel(p.atoms, p.threads, [&](int64_t i) {
            if (find_windows(i)) return;
#ifdef _OPENMP
#pragma omp atomic
#endif
            faults += 1;
        });
        if (faults) return false;
        over_own([&](int64_t i, int64_t e, int64_t r) {
            const Entry& entry = entries[e];
            if (p.kind == RADIUS) return IN;
            if (p.kind == HARD) return verdict(ranks[e], ranks[r], entry.distance);
            if (p.slack > 0.0) return UNSURE;
            if (verdict(least(i, e), least(entry.neighbor, r), entry.distance) == OUT) return OUT;
            return verdict(most(i, e), most(entry.neighbor, r), entry.distance) == IN ? IN : UNSURE;
        });
        if (p.kind != SOFT) return true;
        in_parallel(p.atoms, p.threads, [&](int64_t i) {
            for (int64_t e = start[i] + 1; e < start[i + 1]; ++e)
                if (windows[e].candidate && verdicts[entries[e].edge >> 1] == UNSURE) ranks[e] = exact(i, e);
        });
        over_own([&](int64_t, int64_t e, int64_t r) {
            const Verdict now = Verdict(verdicts[entries[e].edge >> 1]);
            return now == UNSURE ? verdict(ranks[e], ranks[r], entries[e].distance) : now;
        });
        return true;
    }

    // Judges each pair of candidates once, at its first atom.
    template <class Judge>
    void over_own(const Judge& judge) {
        in_parallel(p.atoms, p.threads, [&](int64_t i) {
            for (int64_t e = start[i] + 1; e < start[i + 1]; ++e) {
                if (!windows[e].candidate || entries[e].edge & 1) continue;
                const int64_t r = reverse(entries[e]);
                if (windows[r].candidate) verdicts[entries[e].edge >> 1] = judge(i, e, r);
            }
        });
    }

    // Bounds of the rank: whoever is not farther adds at least ½, whoever is farther at most ½ (knn.py).
    double least(int64_t atom, int64_t e) const { return 0.5 * (windows[e].low + (e - start[atom] + 1)); }
    double most(int64_t atom, int64_t e) const {
        return 0.5 * ((e - start[atom] + 1) + windows[e].high) + BOUND_MARGIN;
    }

    // The coordinate x against 1. A pair is judged once, so both of its directions hear the same. Close to 1 the sum is
    // that of knn.py, in its order; exp and log may differ from PyTorch's there in the last bit, which can only matter to
    // an x that is 1 to 1e-15: an accident of numbers, except where all but the largest term vanish beside it, and there
    // exp(0) = 1 and log(1) = 0 are exact in both.
    Verdict verdict(double rank, double of_reverse, double distance) const {
        const double scale = p.envelope_scale, unit = double(p.num_neighbors) * scale;
        const double own = rank / unit, other = of_reverse / unit, radial = (distance - p.slack) / (p.radius * scale);
        const double top = std::max(std::max(own, other), radial);
        if (scale * top >= 1.0 + CLEAR) return OUT;
        if (scale * (top + 1.0986122886681098) <= 1.0 - CLEAR) return IN;  // log 3
        const double total = (std::exp(own - top) + std::exp(other - top)) + std::exp(radial - top);
        return scale * (top + std::log(total)) < 1.0 ? IN : OUT;
    }

    double exact(int64_t atom, int64_t e) const {
        const Entry* list = &entries[0] + start[atom];
        const double distance = entries[e].distance, less = 2.0 * p.slack;
        double rank = windows[e].low;
        for (int32_t other = windows[e].low; other < windows[e].high; ++other) {
            rank += step((distance - list[other].distance - less) / p.rank_scale);
        }
        return rank;
    }

    // step.py
    double step(double x) const {
        if (!p.bump) return 0.5 + 0.5 * std::sin(0.5 * std::min(std::max(x, -M_PI), M_PI));
        const double y = std::min(std::max(x / 4.0, -0.9975), 0.9975);
        return 1.0 / (1.0 + std::exp(-(4.0 * y / (1.0 - y * y))));
    }

    // The candidates of an atom with their windows, and ranks where they are hard. Keys ascend, and so do all ends: each
    // is found by walking on from the one before.
    bool find_windows(int64_t i) {
        const Entry* list = &entries[0] + start[i];
        Window* window = &windows[0] + start[i];
        const int64_t size = length(i), twice = 2 * p.num_neighbors;
        const double reach = p.support + 2.0 * p.slack;
        int64_t low = 0, nearer = 0, high = 0;
        for (int64_t n = 1; n < size; ++n) window[n].candidate = false;
        for (int64_t n = 1; n < size; ++n) {
            if (!(list[n].distance < p.radius + p.slack)) continue;
            const double here = key(i, list[n]);
            if (p.kind == RADIUS) {
                window[n] = {0, 0, true};
                continue;
            }
            if (p.slack == 0.0 && n + 1 >= twice) break;
            if (p.ranked >= 0 && n >= p.ranked) break;
            if (p.kind == HARD) {
                const double margin = TIE * list[n].distance;
                const int64_t less = first(list, size, i, here - margin, true);
                const int64_t not_more = first(list, size, i, here + margin, false);
                window[n] = {0, 0, true};
                ranks[start[i] + n] = 0.5 * double(less + not_more);
                continue;
            }
            while (low < size && key(i, list[low]) <= here - reach) ++low;
            while (p.slack > 0.0 && nearer < size && key(i, list[nearer]) < here - 2.0 * p.slack) ++nearer;
            if (low + (p.slack > 0.0 ? nearer + 1 : n + 1) >= twice) break;
            while (high < size && key(i, list[high]) < here + reach) ++high;
            const int64_t end = p.ranked >= 0 ? std::min(high, p.ranked) : high;
            if (low > n || end <= n) return false;
            window[n] = {int32_t(low), int32_t(end), true};
        }
        return true;
    }

    // The first entry whose key is not below a value, or is above it.
    int64_t first(const Entry* list, int64_t size, int64_t atom, double value, bool or_equal) const {
        int64_t low = 0;
        while (size > 0) {
            const double middle = key(atom, list[low + size / 2]);
            if (or_equal ? middle < value : middle <= value) {
                low += size / 2 + 1, size -= size / 2 + 1;
            } else {
                size /= 2;
            }
        }
        return low;
    }

    bool is_token(const Entry& entry) const { return entry.edge < 0 || verdicts[entry.edge >> 1] == IN; }

    // Visits the tokens of an atom, with themselves, and whom a window covers: each entry once, with its window or null.
    template <class Visit>
    void over_rows(int64_t i, const Visit& visit) const {
        const int64_t size = length(i);
        int64_t covered = 0;  // windows are runs whose ends ascend: one sweep
        for (int64_t n = 0; n < size; ++n) {
            const int64_t e = start[i] + n;
            if (n > 0 && is_token(entries[e])) {
                for (int64_t c = std::max<int64_t>(covered, windows[e].low); c < windows[e].high; ++c) {
                    if (!is_token(entries[start[i] + c])) visit(start[i] + c, nullptr);
                }
                covered = std::max<int64_t>(covered, windows[e].high);
            }
            if (is_token(entries[e])) visit(e, &windows[e]);
        }
    }

    void count() {
        for (auto* ends : {&tokens, &extras, &compared}) ends->assign(p.atoms + 1, 0);
        in_parallel(p.atoms, p.threads, [&](int64_t i) {
            over_rows(i, [&](int64_t e, const Window* window) {
                (window ? tokens : extras)[i + 1] += 1;
                if (window && entries[e].edge >= 0) compared[i + 1] += window->high - window->low;
            });
        });
        for (int64_t i = 0; i < p.atoms; ++i) {
            tokens[i + 1] += tokens[i], extras[i + 1] += extras[i], compared[i + 1] += compared[i];
        }
    }
};

// Where the arrays of a graph go, or of a list: there only center, neighbor and shift.
struct Arrays {
    int64_t *offsets, *center, *neighbor, *shift, *reverse, *self_token, *rank_token, *rank_other;
    double* rank_base;
};

void write_row(const Graph& g, const Arrays& out, int64_t row, int64_t center, const Entry& entry) {
    out.center[row] = center;
    out.neighbor[row] = entry.neighbor;
    for (int c = 0; c < 3; ++c) {
        out.shift[3 * row + c] = entry.edge < 0 ? 0 : int64_t(g.shift(entry)[c]) * (entry.edge & 1 ? -1 : 1);
    }
}

void write_list(const Graph& g, const Arrays& out) {
    in_parallel(g.p.atoms, g.p.threads, [&](int64_t i) {
        for (int64_t e = g.start[i] + 1; e < g.start[i + 1]; ++e) write_row(g, out, e - i - 1, i, g.entries[e]);
    });
}

void write_graph(Graph& g, const Arrays& out) {
    const int64_t atoms = g.p.atoms, num_tokens = g.tokens[atoms];
    g.row = uninitialized<int32_t>(g.start[atoms]);
    in_parallel(atoms, g.p.threads, [&](int64_t i) {
        int64_t token = g.tokens[i], extra = num_tokens + g.extras[i];
        g.over_rows(i, [&](int64_t e, const Window* window) {
            const int64_t row = window ? token++ : extra++;
            g.row[e] = int32_t(row);
            write_row(g, out, row, i, g.entries[e]);
        });
        out.offsets[i] = out.self_token[i] = g.tokens[i];
    });
    out.offsets[atoms] = num_tokens;
    in_parallel(atoms, g.p.threads, [&](int64_t i) {
        int64_t done = g.compared[i];
        const bool hard = g.p.kind == HARD;
        g.over_rows(i, [&](int64_t e, const Window* window) {
            if (!window) return;
            const Entry& entry = g.entries[e];
            const int64_t row = g.row[e];
            out.reverse[row] = entry.edge < 0 ? row : g.row[g.reverse(entry)];
            out.rank_base[row] = entry.edge < 0 ? 0.0 : hard ? g.ranks[e] : double(window->low);
            if (entry.edge < 0) return;
            for (int32_t other = window->low; other < window->high; ++other, ++done) {
                out.rank_token[done] = row;
                out.rank_other[done] = g.row[g.start[i] + other];
            }
        });
    });
}

}  // namespace

extern "C" {

// Returns a status and, where it is DONE, the graph in `made` and how many rows, tokens and rank pairs it has, and the
// longest run of tokens. It must be given to escaip_graph_write, which frees it, or to escaip_graph_free.
int64_t escaip_graph_build(const Problem* problem, void** made, int64_t* sizes) {
    try {
        auto graph = std::make_unique<Graph>(*problem);
        const int64_t status = graph->build();
        if (status != DONE) return status;
        const int64_t atoms = problem->atoms;
        if (problem->kind == LIST) {
            sizes[0] = graph->start[atoms] - atoms;
        } else {
            sizes[0] = graph->tokens[atoms] + graph->extras[atoms];
            sizes[1] = graph->tokens[atoms];
            sizes[2] = graph->compared[atoms];
            sizes[3] = 0;
            for (int64_t i = 0; i < atoms; ++i) sizes[3] = std::max(sizes[3], graph->tokens[i + 1] - graph->tokens[i]);
        }
        *made = graph.release();
        return DONE;
    } catch (const std::bad_alloc&) {
        return REFUSED;
    }
}

int64_t escaip_graph_write(void* made, const Arrays* out) {
    const std::unique_ptr<Graph> graph(static_cast<Graph*>(made));
    try {
        graph->p.kind == LIST ? write_list(*graph, *out) : write_graph(*graph, *out);
        return DONE;
    } catch (const std::bad_alloc&) {
        return REFUSED;
    }
}

void escaip_graph_free(void* made) { delete static_cast<Graph*>(made); }

}  // extern "C"
