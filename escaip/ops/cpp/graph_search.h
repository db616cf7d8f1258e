// Who is near an atom: by a grid of bins, or from a list of edges that is given.
#pragma once

#include "graph.h"

namespace escaip {

// The atoms of one system in bins between planes of its axes. Open axes are replaced by normals to the periodic ones, and
// end where the atoms do; along periodic ones the bins repeat, however often a thin cell asks for.
class Grid {
    static constexpr double MARGIN = 1e-3;  // Å, beyond any rounding of where an atom is
    const GraphRequest& p;
    int64_t first, size;
    double axes[3][3], dual[3][3];  // rows; a position's component along axis a is its product with dual row a
    double low[3] = {0, 0, 0}, extent[3];  // of the components of atoms
    int64_t bins[3], reach[3];
    bool repeats[3];
    std::vector<int32_t> start, atom;      // of each bin; in the order of the bins
    std::vector<double> x, y, z;           // inside of the cell, in the same order
    std::vector<int32_t> place, wrap;      // of each atom: bin along each axis; cells that it is away, along each axis

    static void cross(const double* a, const double* b, double* out) {
        for (int c = 0; c < 3; ++c) out[c] = a[(c + 1) % 3] * b[(c + 2) % 3] - a[(c + 2) % 3] * b[(c + 1) % 3];
    }
    static double dot(const double* a, const double* b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }
    static void normalize(double* a) {
        const double length = std::sqrt(dot(a, a));
        for (int c = 0; c < 3; ++c) a[c] /= length;
    }

    void set_axes(int64_t system) {
        int open[3], num_open = 0, closed = 0;
        for (int a = 0; a < 3; ++a) {
            repeats[a] = p.pbc[3 * system + a] != 0;
            std::copy_n(p.cell + 9 * system + 3 * a, 3, axes[a]);
            if (repeats[a]) closed = a;
            else open[num_open++] = a;
        }
        if (num_open == 3) {
            for (int a = 0; a < 3; ++a)
                for (int c = 0; c < 3; ++c) axes[a][c] = a == c;
        } else if (num_open == 2) {
            const double* along = axes[closed];
            int least = 0;
            for (int c = 1; c < 3; ++c)
                if (std::abs(along[c]) < std::abs(along[least])) least = c;
            double unit[3] = {0, 0, 0};
            unit[least] = 1.0;
            cross(along, unit, axes[open[0]]), normalize(axes[open[0]]);
            cross(along, axes[open[0]], axes[open[1]]), normalize(axes[open[1]]);
        } else if (num_open == 1) {
            cross(axes[(open[0] + 1) % 3], axes[(open[0] + 2) % 3], axes[open[0]]), normalize(axes[open[0]]);
        }
        for (int a = 0; a < 3; ++a) cross(axes[(a + 1) % 3], axes[(a + 2) % 3], dual[a]);
        const double volume = dot(axes[0], dual[0]);
        for (auto& row : dual)
            for (double& value : row) value /= volume;
    }

    // Bins are about half a cutoff wide, but there are not many more than atoms.
    void set_bins() {
        const double cutoff = p.cutoff + MARGIN;
        double width[3];  // Å
        for (int a = 0; a < 3; ++a) {
            extent[a] = 1.0, width[a] = 1.0 / std::sqrt(dot(dual[a], dual[a]));
            if (!repeats[a]) {
                double high = -std::numeric_limits<double>::infinity();
                low[a] = -high;
                for (int64_t i = first; i < first + size; ++i) {
                    const double here = dot(p.positions + 3 * i, dual[a]);
                    low[a] = std::min(low[a], here), high = std::max(high, here);
                }
                extent[a] = width[a] = std::max(high - low[a], MARGIN);
            }
            bins[a] = int64_t(std::min(std::max(2.0 * width[a] / cutoff, 1.0), 1e5));
        }
        while (bins[0] * bins[1] * bins[2] > 4 * size + 8) {
            int64_t& most = *std::max_element(bins, bins + 3);
            most = (most + 1) / 2;
        }
        for (int a = 0; a < 3; ++a) {
            // Atoms of bins n apart are more than n − 1 bins apart.
            const double bins_apart = std::ceil(cutoff * double(bins[a]) / width[a]);
            reach[a] = int64_t(repeats[a] ? bins_apart : std::min(bins_apart, double(bins[a])));
        }
    }

    bool fill() {
        std::vector<int32_t> bin(size);
        std::vector<double> inside(3 * size);
        place.resize(3 * size), wrap.assign(3 * size, 0);
        start.assign(bins[0] * bins[1] * bins[2] + 1, 0);
        for (int64_t i = 0; i < size; ++i) {
            const double* position = p.positions + 3 * (first + i);
            std::copy_n(position, 3, &inside[3 * i]);
            for (int a = 0; a < 3; ++a) {
                double here = dot(position, dual[a]) - low[a];
                if (repeats[a]) {
                    const double away = std::floor(here);
                    if (!(std::abs(away) < double(MOST_SHIFT / 4))) return false;
                    wrap[3 * i + a] = int32_t(away);
                    here -= away;
                    for (int c = 0; c < 3; ++c) inside[3 * i + c] -= away * axes[a][c];
                }
                const double bin_along = here / extent[a] * double(bins[a]);
                place[3 * i + a] = int32_t(std::min(std::max(bin_along, 0.0), double(bins[a] - 1)));
            }
            bin[i] = int32_t((place[3 * i] * bins[1] + place[3 * i + 1]) * bins[2] + place[3 * i + 2]);
            ++start[bin[i] + 1];
        }
        for (size_t b = 1; b < start.size(); ++b) start[b] += start[b - 1];
        std::vector<int32_t> end(start.begin(), start.end() - 1);
        atom.resize(size), x.resize(size), y.resize(size), z.resize(size);
        for (int64_t i = 0; i < size; ++i) {
            const int32_t k = end[bin[i]]++;
            atom[k] = int32_t(i), x[k] = inside[3 * i], y[k] = inside[3 * i + 1], z[k] = inside[3 * i + 2];
        }
        return true;
    }

    // A bin along an axis that may lie outside: the one it repeats, and the cell that is in; false if there is none.
    bool fold(int a, int64_t bin, int64_t& inside, int64_t& image) const {
        image = bin >= 0 ? bin / bins[a] : -((bins[a] - 1 - bin) / bins[a]);
        inside = bin - image * bins[a];
        return repeats[a] || image == 0;
    }

  public:
    // A system of the problem; check `usable` before use.
    bool usable;
    Grid(const GraphRequest& problem, int64_t system)
        : p(problem), first(p.ptr[system]), size(p.ptr[system + 1] - p.ptr[system]) {
        usable = true;
        if (!size) return;
        set_axes(system);
        set_bins();
        usable = fill();
    }

    // Appends everything closer than the cutoff to an atom, in no particular order.
    void collect(int64_t i, std::vector<Entry>& found, std::vector<int32_t>& hits) const {
        const int64_t local = i - first;
        const int32_t *from = &place[3 * local], *away = &wrap[3 * local];
        double here[3];
        for (int c = 0; c < 3; ++c) {
            here[c] = p.positions[3 * i + c];
            for (int a = 0; a < 3; ++a) here[c] -= double(away[a]) * axes[a][c];
        }
        int64_t inside[3], image[3];
        const int64_t begin = repeats[2] ? from[2] - reach[2] : std::max<int64_t>(0, from[2] - reach[2]);
        const int64_t end = repeats[2] ? from[2] + reach[2] + 1 : std::min(bins[2], from[2] + reach[2] + 1);
        for (int64_t u = from[0] - reach[0]; u <= from[0] + reach[0]; ++u) {
            if (!fold(0, u, inside[0], image[0])) continue;
            for (int64_t v = from[1] - reach[1]; v <= from[1] + reach[1]; ++v) {
                if (!fold(1, v, inside[1], image[1])) continue;
                const int64_t column = (inside[0] * bins[1] + inside[1]) * bins[2];
                for (int64_t w = begin; w < end;) {  // runs of bins in one cell
                    fold(2, w, inside[2], image[2]);
                    const int64_t run = std::min(bins[2] - inside[2], end - w);
                    const int64_t bin = column + inside[2];
                    look(i, here, away, image, start[bin], start[bin + run], found, hits);
                    w += run;
                }
            }
        }
    }

  private:
    void look(int64_t i, const double* here, const int32_t* away, const int64_t* image, int64_t begin, int64_t end,
              std::vector<Entry>& found, std::vector<int32_t>& hits) const {
        if (int64_t(hits.size()) < end - begin) hits.resize(end - begin);
        double at[3];
        for (int c = 0; c < 3; ++c) {
            at[c] = here[c];
            for (int a = 0; a < 3; ++a) at[c] -= double(image[a]) * axes[a][c];
        }
        const double limit = (p.cutoff + MARGIN) * (p.cutoff + MARGIN);
        int64_t count = 0;
        for (int64_t k = begin; k < end; ++k) {
            const double a = x[k] - at[0], b = y[k] - at[1], c = z[k] - at[2];
            hits[count] = int32_t(k);
            count += a * a + b * b + c * c < limit;
        }
        for (int64_t h = 0; h < count; ++h) {
            const int32_t local = atom[hits[h]];
            const int64_t j = first + local;
            int64_t shift[3];
            for (int a = 0; a < 3; ++a) shift[a] = image[a] + away[a] - wrap[3 * local + a];
            if (j == i && !(shift[0] | shift[1] | shift[2])) continue;
            const double distance = measure(p, i, j, shift);
            if (distance < p.cutoff) found.push_back({distance, pack(shift[0], shift[1], shift[2]), int32_t(j), 0});
        }
    }
};

// The edges of a list by their center. It must hold both directions of every pair.
class Edges {
    const GraphRequest& p;
    std::vector<int64_t> start, order;  // of each atom; no order where centers ascend

    static uint64_t mix(uint64_t a) {
        a = (a ^ (a >> 30)) * 0xbf58476d1ce4e5b9u;
        a = (a ^ (a >> 27)) * 0x94d049bb133111ebu;
        return a ^ (a >> 31);
    }

  public:
    bool usable = true;

    explicit Edges(const GraphRequest& problem) : p(problem), start(p.atoms + 1, 0) {
        // Sums of hashes tell whether the forward edges are the reversed ones: exactly, but for one chance in 2⁶⁴.
        uint64_t forward = 0, reversed = 0;
        bool ascend = true;
        for (int64_t m = 0; m < p.edges; ++m) {
            const int64_t i = p.center[m], j = p.neighbor[m], *s = p.shift + 3 * m;
            usable = i >= 0 && i < p.atoms && j >= 0 && j < p.atoms;
            for (int a = 0; a < 3; ++a) usable &= s[a] >= -MOST_SHIFT && s[a] <= MOST_SHIFT;
            if (!usable) return;
            const int64_t shift = pack(s[0], s[1], s[2]);
            const bool is_forward = i < j || (i == j && shift > NO_SHIFT);
            const uint64_t ends = is_forward ? (uint64_t(i) << 32) + j : (uint64_t(j) << 32) + i;
            (is_forward ? forward : reversed) += mix(mix(ends) + uint64_t(is_forward ? shift : 2 * NO_SHIFT - shift));
            ascend &= m == 0 || p.center[m - 1] <= i;
            ++start[i + 1];
        }
        usable = forward == reversed;
        for (int64_t i = 0; i < p.atoms; ++i) start[i + 1] += start[i];
        if (ascend || !usable) return;
        order.resize(p.edges);
        std::vector<int64_t> end(start.begin(), start.end());
        for (int64_t m = 0; m < p.edges; ++m) order[end[p.center[m]]++] = m;
    }

    void collect(int64_t i, std::vector<Entry>& found) const {
        for (int64_t n = start[i]; n < start[i + 1]; ++n) {
            const int64_t m = order.empty() ? n : order[n], j = p.neighbor[m], *s = p.shift + 3 * m;
            const double distance = measure(p, i, j, s);
            if (distance < p.cutoff) found.push_back({distance, pack(s[0], s[1], s[2]), int32_t(j), 0});
        }
    }
};

}  // namespace escaip
