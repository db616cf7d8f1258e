// The packed graph of a batch on the CPU, in double precision: what escaip/graph/knn.py computes, which has the symbols.
//
// A thread takes whole atoms, and what two of them decide together is decided by one: the same bits however many threads
// there are.
#include <numeric>

#include "graph_search.h"

namespace escaip {
namespace {

constexpr double TIE = 1e-9;  // of knn.py, as the next
constexpr double BOUND_MARGIN = 1e-6;
// A coordinate so far from 1 is decided without its logarithm.
constexpr double CLEAR = 1e-9;
constexpr int64_t CHUNK = 32;  // atoms of a task

enum Verdict : int32_t { NONE, OUT, IN, UNSURE };

// An entry that may become a token, or NONE: places in its list of the window of those that add to its rank by the step
// (all before add 1), and in its neighbor's of the same edge.
struct Candidate {
    double rank;
    int32_t low, high, reverse;
    Verdict verdict;
};

// The first entries of an atom's list, as many as matter, and which of them are candidates.
struct List {
    Entry* entries;
    Candidate* candidates;
    int64_t size, num_candidates;
};

struct Chunk {
    std::vector<Entry> entries;
    std::vector<Candidate> candidates;
};

struct Scratch {
    std::vector<Entry> found, list;
    std::vector<Candidate> candidates;
    std::vector<double> keys;
    std::vector<int32_t> hits, equal;
};

struct Graph {
    const GraphRequest p;
    const double stride;
    std::vector<Chunk> chunks;
    std::vector<List> lists;
    std::vector<int64_t> tokens, extras, compared;  // first of each atom, and the end

    explicit Graph(const GraphRequest& problem)
        : p(problem), stride(std::exp2(std::ceil(std::log2(4.0 * p.cutoff)))), chunks((p.atoms + CHUNK - 1) / CHUNK) {}

    bool build() {
        if (!is_sound(p) || !make_lists()) return false;
        if (p.kind == LIST) return count_edges();
        over_owned([&](int64_t n, Candidate& own, Candidate& other, const Entry& entry) {
            own.verdict = other.verdict = first_verdict(n, own, other, entry);
        });
        if (p.kind == SOFT) judge_by_exact_ranks();
        return count_rows();
    }

    // Calls task(i) for every atom.
    template <class Task>
    void over_atoms(const Task& task) const {
        in_parallel(int64_t(chunks.size()), p.threads, [&](int64_t c) {
            for (int64_t i = c * CHUNK; i < std::min(p.atoms, (c + 1) * CHUNK); ++i) task(i);
        });
    }

    double key(int64_t atom, const Entry& entry) const { return entry.distance + double(atom) * stride; }

    bool is_before(int64_t atom, const Entry& a, const Entry& b) const {
        const double x = key(atom, a), y = key(atom, b);
        if (x != y) return x < y;
        return a.neighbor != b.neighbor ? a.neighbor < b.neighbor : a.shift < b.shift;
    }

    bool make_lists() {
        std::vector<Grid> grids;
        std::vector<Edges> edges;
        if (p.edges >= 0) {
            edges.emplace_back(p);
            if (!edges[0].usable) return false;
        } else {
            grids.reserve(p.systems);
            for (int64_t s = 0; s < p.systems; ++s) {
                grids.emplace_back(p, s);
                if (!grids[s].usable) return false;
            }
        }
        lists.resize(p.atoms);
        std::atomic<bool> sound{true};
        in_parallel(int64_t(chunks.size()), p.threads, [&](int64_t c) {
            try {
                Scratch scratch;
                for (int64_t i = c * CHUNK; i < std::min(p.atoms, (c + 1) * CHUNK); ++i) {
                    scratch.found.clear();
                    if (p.edges >= 0) edges[0].collect(i, scratch.found);
                    else grids[p.index[i]].collect(i, scratch.found, scratch.hits);
                    if (!sort(i, scratch) || !keep(i, scratch, chunks[c])) sound = false;
                }
            } catch (const std::bad_alloc&) {
                sound = false;
            }
            if (!sound) return;
            Entry* entries = chunks[c].entries.data();
            Candidate* candidates = chunks[c].candidates.data();
            for (int64_t i = c * CHUNK; i < std::min(p.atoms, (c + 1) * CHUNK); ++i) {
                lists[i].entries = entries, lists[i].candidates = candidates;
                entries += lists[i].size, candidates += lists[i].num_candidates;
            }
        });
        return sound;
    }

    // Puts what was found in order after the atom itself; false for an edge that is there twice. A short list is sorted
    // by counting who is before each entry, which needs no branches.
    bool sort(int64_t i, Scratch& s) const {
        constexpr size_t SHORT = 256;
        const size_t size = s.found.size();
        s.list.resize(size + 1);
        s.list[0] = {0.0, NO_SHIFT, int32_t(i), 0};
        Entry* list = s.list.data() + 1;
        if (size <= SHORT) {
            const size_t padded = (size + 7) / 8 * 8;  // whole vectors
            s.keys.assign(padded, std::numeric_limits<double>::infinity());
            s.equal.assign(size, 0);
            double* keys = s.keys.data();
            for (size_t m = 0; m < size; ++m) keys[m] = key(i, s.found[m]);
            for (size_t m = 0; m < size; ++m) {
                const double here = keys[m];
                int64_t before = 0;
                for (size_t other = 0; other < padded; ++other) before += keys[other] < here;
                list[before + s.equal[before]++] = s.found[m];
            }
        } else {
            std::copy(s.found.begin(), s.found.end(), list);
            std::sort(list, list + size, [&](const Entry& a, const Entry& b) { return a.distance < b.distance; });
        }
        for (size_t begin = 0, end; begin < size; begin = end) {
            for (end = begin + 1; end < size && key(i, list[end]) == key(i, list[begin]);) ++end;
            if (end - begin < 2) continue;
            std::sort(list + begin, list + end, [&](const Entry& a, const Entry& b) { return is_before(i, a, b); });
            for (size_t m = begin + 1; m < end; ++m) {
                if (!is_before(i, list[m - 1], list[m])) return false;
            }
        }
        return true;
    }

    // Finds the candidates and appends what matters of the list to the chunk; false where windows are so narrow that
    // rounding of the keys turns them inside out.
    bool keep(int64_t i, Scratch& s, Chunk& chunk) {
        s.candidates.assign(1, {0.0, 0, 0, 0, NONE});
        int64_t used = p.kind == LIST ? int64_t(s.list.size()) : 1;
        if (p.kind != LIST && !find_candidates(i, s, used)) return false;
        lists[i].size = used, lists[i].num_candidates = int64_t(s.candidates.size());
        chunk.entries.insert(chunk.entries.end(), s.list.begin(), s.list.begin() + used);
        chunk.candidates.insert(chunk.candidates.end(), s.candidates.begin(), s.candidates.end());
        return true;
    }

    // As the selections of knn.py. Keys ascend, so the ends of windows do: each is found by walking on from the last.
    bool find_candidates(int64_t i, Scratch& s, int64_t& used) const {
        const Entry* list = s.list.data();
        const int64_t size = int64_t(s.list.size()), twice = 2 * p.num_neighbors;
        const double reach = p.support + 2.0 * p.slack;
        int64_t low = 0, nearer = 0, high = 0;
        for (int64_t n = 1; n < size; ++n) {
            if (p.kind != RADIUS && ((p.slack == 0.0 && n + 1 >= twice) || (p.ranked >= 0 && n >= p.ranked))) break;
            const double here = key(i, list[n]);
            Candidate now{0.0, 0, 0, 0, OUT};
            if (!(list[n].distance < p.radius + p.slack)) {
                if (list[n].distance > p.radius + p.slack + BOUND_MARGIN) break;
                now.verdict = NONE;  // but one with the same key may be nearer
            } else if (p.kind == HARD) {
                const double margin = TIE * list[n].distance;  // may fall among equal keys: no walking here
                const auto count = [&](auto holds) {
                    return std::partition_point(list, list + size, [&](const Entry& e) { return holds(key(i, e)); }) - list;
                };
                const int64_t fewer = count([&](double other) { return other < here - margin; });
                now.rank = 0.5 * double(fewer + count([&](double other) { return other <= here + margin; }));
            } else if (p.kind == SOFT) {
                while (low < size && key(i, list[low]) <= here - reach) ++low;
                while (p.slack > 0.0 && key(i, list[nearer]) < here - 2.0 * p.slack) ++nearer;
                if (low + (p.slack > 0.0 ? nearer : n) + 1 >= twice) break;
                while (high < size && key(i, list[high]) < here + reach) ++high;
                now.low = int32_t(low), now.high = int32_t(p.ranked >= 0 ? std::min(high, p.ranked) : high);
                if (now.low > n || now.high <= n) return false;
            }
            used = std::max(used, std::max<int64_t>(n + 1, now.high));
            s.candidates.push_back(now);
        }
        return true;
    }

    // Calls judge once for each pair of candidates that are each other's reverse.
    template <class Judge>
    void over_owned(const Judge& judge) {
        over_atoms([&](int64_t i) {
            for (int64_t n = 1; n < lists[i].num_candidates; ++n) {
                Candidate& own = lists[i].candidates[n];
                const Entry& entry = lists[i].entries[n];
                if (own.verdict == NONE || entry.neighbor < i || (entry.neighbor == i && entry.shift < NO_SHIFT)) continue;
                if (!own.reverse && !find_reverse(i, n, own, entry)) continue;
                Candidate& other = lists[entry.neighbor].candidates[own.reverse];
                if (other.verdict != NONE) judge(n, own, other, entry);
            }
        });
    }

    bool find_reverse(int64_t i, int64_t n, Candidate& own, const Entry& entry) {
        const List& list = lists[entry.neighbor];
        const Entry wanted{entry.distance, 2 * NO_SHIFT - entry.shift, int32_t(i), 0};
        const Entry* place = std::lower_bound(
            list.entries + 1, list.entries + list.num_candidates, wanted,
            [&](const Entry& a, const Entry& b) { return is_before(entry.neighbor, a, b); });
        if (place == list.entries + list.num_candidates || place->neighbor != i || place->shift != wanted.shift) return false;
        own.reverse = int32_t(place - list.entries);
        list.candidates[own.reverse].reverse = int32_t(n);
        return true;
    }

    // Bounds decide most pairs: whoever is not farther adds at least ½ to a rank, whoever is farther at most ½ (knn.py).
    Verdict first_verdict(int64_t n, const Candidate& own, const Candidate& other, const Entry& entry) const {
        if (p.kind == RADIUS) return IN;
        if (p.kind == HARD) return verdict(own.rank, other.rank, entry.distance);
        if (p.slack > 0.0) return UNSURE;
        const auto least = [](const Candidate& c, int64_t place) { return 0.5 * double(c.low + place + 1); };
        const auto most = [](const Candidate& c, int64_t place) { return 0.5 * double(place + 1 + c.high) + BOUND_MARGIN; };
        if (verdict(least(own, n), least(other, own.reverse), entry.distance) == OUT) return OUT;
        return verdict(most(own, n), most(other, own.reverse), entry.distance) == IN ? IN : UNSURE;
    }

    void judge_by_exact_ranks() {
        over_atoms([&](int64_t i) {
            for (int64_t n = 1; n < lists[i].num_candidates; ++n) {
                Candidate& own = lists[i].candidates[n];
                if (own.verdict == UNSURE) own.rank = exact_rank(lists[i].entries, own, lists[i].entries[n].distance);
            }
        });
        over_owned([&](int64_t, Candidate& own, Candidate& other, const Entry& entry) {
            if (own.verdict == UNSURE) own.verdict = other.verdict = verdict(own.rank, other.rank, entry.distance);
        });
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

    double exact_rank(const Entry* list, const Candidate& own, double distance) const {
        double rank = own.low;
        for (int32_t other = own.low; other < own.high; ++other) {
            rank += step((distance - list[other].distance - 2.0 * p.slack) / p.rank_scale);
        }
        return rank;
    }

    // step.py
    double step(double x) const {
        if (!p.bump) return 0.5 + 0.5 * std::sin(0.5 * std::min(std::max(x, -M_PI), M_PI));
        const double y = std::min(std::max(x / 4.0, -0.9975), 0.9975);
        return 1.0 / (1.0 + std::exp(-(4.0 * y / (1.0 - y * y))));
    }

    // Calls visit(place, whether it is a token) for the tokens of an atom and for whom their windows cover, in order of
    // each. Windows are runs whose ends ascend: one sweep.
    template <class Visit>
    void over_rows(int64_t i, const Visit& visit) const {
        const List& list = lists[i];
        const auto is_token = [&](int64_t n) { return n < list.num_candidates && list.candidates[n].verdict == IN; };
        visit(0, true);
        int64_t covered = 1;
        for (int64_t n = 1; n < list.num_candidates; ++n) {
            if (!is_token(n)) continue;
            for (covered = std::max<int64_t>(covered, list.candidates[n].low); covered < list.candidates[n].high; ++covered) {
                if (!is_token(covered)) visit(covered, false);
            }
            visit(n, true);
        }
    }

    bool count_edges() {
        tokens.assign(p.atoms + 1, 0);
        for (int64_t i = 0; i < p.atoms; ++i) tokens[i + 1] = tokens[i] + lists[i].size - 1;
        return true;
    }

    // False where there are too many rows to number in 32 bits.
    bool count_rows() {
        for (auto* ends : {&tokens, &extras, &compared}) ends->assign(p.atoms + 1, 0);
        over_atoms([&](int64_t i) {
            int64_t counts[2] = {0, 0}, pairs = 0;
            over_rows(i, [&](int64_t n, bool is_token) {
                ++counts[is_token];
                if (is_token) pairs += lists[i].candidates[n].high - lists[i].candidates[n].low;
            });
            tokens[i + 1] = counts[1], extras[i + 1] = counts[0], compared[i + 1] = pairs;
        });
        for (auto* ends : {&tokens, &extras, &compared}) std::partial_sum(ends->begin(), ends->end(), ends->begin());
        return tokens[p.atoms] + extras[p.atoms] <= std::numeric_limits<int32_t>::max();
    }
};

void write_row(const GraphArrays& out, int64_t row, int64_t center, const Entry& entry) {
    out.center[row] = center;
    out.neighbor[row] = entry.neighbor;
    for (int c = 0; c < 3; ++c) out.shift[3 * row + c] = component(entry.shift, c);
}

void write_list(const Graph& g, const GraphArrays& out) {
    g.over_atoms([&](int64_t i) {
        for (int64_t n = 1; n < g.lists[i].size; ++n) write_row(out, g.tokens[i] + n - 1, i, g.lists[i].entries[n]);
    });
}

void write_graph(const Graph& g, const GraphArrays& out) {
    const int64_t num_tokens = g.tokens[g.p.atoms];
    g.over_atoms([&](int64_t i) {
        int64_t token = g.tokens[i], extra = num_tokens + g.extras[i];
        g.over_rows(i, [&](int64_t n, bool is_token) {
            Entry& entry = g.lists[i].entries[n];
            entry.row = int32_t(is_token ? token++ : extra++);
            write_row(out, entry.row, i, entry);
        });
        out.offsets[i] = out.self_token[i] = g.tokens[i];
    });
    out.offsets[g.p.atoms] = num_tokens;
    g.over_atoms([&](int64_t i) {
        const List& list = g.lists[i];
        int64_t row = g.tokens[i], done = g.compared[i];
        for (int64_t n = 0; n < list.num_candidates; ++n) {
            const Candidate& own = list.candidates[n];
            if (n > 0 && own.verdict != IN) continue;
            out.reverse[row] = n > 0 ? g.lists[list.entries[n].neighbor].entries[own.reverse].row : row;
            out.rank_base[row] = g.p.kind == HARD ? own.rank : double(own.low);
            for (int32_t other = own.low; other < own.high; ++other, ++done) {
                out.rank_token[done] = row;
                out.rank_other[done] = list.entries[other].row;
            }
            ++row;
        }
    });
}

}  // namespace

bool build_graph(const GraphRequest& p, const std::function<GraphArrays(const GraphSizes&)>& allocate) {
    try {
        Graph graph(p);
        if (!graph.build()) return false;
        const bool is_list = p.kind == LIST;
        GraphSizes sizes{0, graph.tokens[p.atoms], is_list ? 0 : graph.compared[p.atoms], 0};
        sizes.rows = sizes.tokens + (is_list ? 0 : graph.extras[p.atoms]);
        for (int64_t i = 0; i < p.atoms; ++i) sizes.longest = std::max(sizes.longest, graph.tokens[i + 1] - graph.tokens[i]);
        const GraphArrays out = allocate(sizes);
        is_list ? write_list(graph, out) : write_graph(graph, out);
        return true;
    } catch (const std::bad_alloc&) {
        return false;
    }
}

}  // namespace escaip
