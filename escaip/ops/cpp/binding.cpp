// Kernels of PyTorch's dispatcher for the CPU. Python defines the operators, their shapes and their derivatives
// (../autograd.py, ../rows.py, ../spline.py, ../harmonics.py), except that of the graph, which has none.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "attention.h"
#include "graph.h"
#include "ops.h"
#include "tensors.h"

namespace escaip {
namespace {

using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// ---- rows, splines, densities of neighbors --------------------------------------------------------------------

Tensor sum_rows_kernel(const Tensor& x, const Tensor& index, int64_t num_rows) {
    std::vector<int64_t> sizes = x.sizes().vec();
    sizes[0] = num_rows;
    Tensor out = at::zeros(sizes, x.options().dtype(computed_in(x)));
    if (!x.numel()) return out.to(x.scalar_type());
    with_scalar(x, [&](auto scalar) {
        using T = decltype(scalar);
        Inputs in;
        sum_rows(in.get<T>(x), in.get<int64_t>(index), x.size(0), x.numel() / x.size(0), at::get_num_threads(), data<T>(out));
    });
    return out.to(x.scalar_type());
}

SplineShape shape_of(int64_t order, int64_t rows, int64_t columns, const Tensor& point) {
    return {order, rows, columns, point.size(0), at::get_num_threads()};
}

Tensor spline_values_kernel(const Tensor& table, const Tensor& point, int64_t order) {
    Tensor out = at::empty({point.size(0), table.size(1)}, table.options().dtype(computed_in(table)));
    with_scalar(table, [&](auto scalar) {
        using T = decltype(scalar);
        Inputs in;
        spline_values(shape_of(order, table.size(0), table.size(1), point), in.get<T>(table), in.get<T>(point), data<T>(out));
    });
    return out.to(table.scalar_type());
}

Tensor spline_products_kernel(const Tensor& cotangent, const Tensor& table, const Tensor& point, int64_t order) {
    Tensor out = at::empty({point.size(0)}, table.options().dtype(computed_in(table)));
    with_scalar(table, [&](auto scalar) {
        using T = decltype(scalar);
        Inputs in;
        spline_products(shape_of(order, table.size(0), table.size(1), point), in.get<T>(cotangent), in.get<T>(table),
                        in.get<T>(point), data<T>(out));
    });
    return out.to(table.scalar_type());
}

Tensor spline_transpose_kernel(const Tensor& cotangent, const Tensor& point, int64_t order, int64_t num_rows) {
    Tensor out = at::zeros({num_rows, cotangent.size(1)}, cotangent.options().dtype(computed_in(cotangent)));
    with_scalar(cotangent, [&](auto scalar) {
        using T = decltype(scalar);
        Inputs in;
        spline_transpose(shape_of(order, num_rows, cotangent.size(1), point), in.get<T>(cotangent), in.get<T>(point),
                         data<T>(out));
    });
    return out.to(cotangent.scalar_type());
}

DensityShape shape_of(Inputs& in, const Tensor& weight, const Tensor& offsets, const Optional& first,
                      const Optional& second, int64_t l_max) {
    const int64_t channels = weight.size(1), pairs = first ? first->size(0) : channels;
    return {in.get<int64_t>(offsets), in.get<int64_t>(first), in.get<int64_t>(second), offsets.size(0) - 1, channels, pairs,
            l_max, at::get_num_threads()};
}

Tensor power_spectrum_kernel(const Tensor& direction, const Tensor& weight, const Tensor& offsets, const Optional& first,
                             const Optional& second, int64_t l_max) {
    Inputs in;
    const DensityShape shape = shape_of(in, weight, offsets, first, second, l_max);
    Tensor out = at::empty({shape.atoms, shape.pairs, l_max + 1}, direction.options().dtype(computed_in(direction)));
    with_scalar(direction, [&](auto scalar) {
        using T = decltype(scalar);
        power_spectrum(shape, in.get<T>(direction), in.get<T>(weight), data<T>(out));
    });
    return out.to(direction.scalar_type());
}

Pair power_spectrum_backward_kernel(const Tensor& grad, const Tensor& direction, const Tensor& weight, const Tensor& offsets,
                                    const Optional& first, const Optional& second) {
    Tensor to_n = new_like(direction).zero_(), to_w = new_like(weight).zero_();
    with_scalar(direction, [&](auto scalar) {
        using T = decltype(scalar);
        Inputs in;
        power_spectrum_backward(shape_of(in, weight, offsets, first, second, grad.size(2) - 1), in.get<T>(grad),
                                in.get<T>(direction), in.get<T>(weight), data<T>(to_n), data<T>(to_w));
    });
    return {to_n.to(direction.scalar_type()), to_w.to(weight.scalar_type())};
}

Triple power_spectrum_double_backward_kernel(const Tensor& tn, const Tensor& tw, const Tensor& grad, const Tensor& direction,
                                             const Tensor& weight, const Tensor& offsets, const Optional& first,
                                             const Optional& second) {
    Tensor to_grad = new_like(grad), to_n = new_like(direction).zero_(), to_w = new_like(weight).zero_();
    with_scalar(direction, [&](auto scalar) {
        using T = decltype(scalar);
        Inputs in;
        power_spectrum_double_backward(shape_of(in, weight, offsets, first, second, grad.size(2) - 1), in.get<T>(tn),
                                       in.get<T>(tw), in.get<T>(grad), in.get<T>(direction), in.get<T>(weight),
                                       data<T>(to_grad), data<T>(to_n), data<T>(to_w));
    });
    return {to_grad.to(grad.scalar_type()), to_n.to(direction.scalar_type()), to_w.to(weight.scalar_type())};
}

// ---- attention --------------------------------------------------------------------------------------------------

// Arguments that value and derivatives share.
struct Shared {
    const Tensor &q, &k, &v;
    const Optional &log_envelope, &direction;
    const Tensor &query_offsets, &key_offsets;
    at::IntArrayRef widths;
    double scale;
    bool angular_values;

    template <class T>
    Problem<T> problem(Inputs& in) const {
        Problem<T> p{};
        p.neighborhoods = query_offsets.size(0) - 1;
        p.queries = q.size(0), p.tokens = k.size(0), p.heads = q.size(1), p.head_size = q.size(2);
        p.groups = int64_t(widths.size()), p.threads = at::get_num_threads(), p.scale = scale;
        p.angular_values = angular_values;
        TORCH_CHECK_VALUE(p.groups <= MOST_GROUPS && key_offsets.size(0) == p.neighborhoods + 1,
                          "attention has ", p.groups, " groups, and offsets of ", query_offsets.size(0), " and ",
                          key_offsets.size(0), " entries: at most ", MOST_GROUPS, " groups and equal lengths are allowed");
        std::copy(widths.begin(), widths.end(), p.widths);
        p.q = in.get<T>(q), p.k = in.get<T>(k), p.v = in.get<T>(v);
        p.log_envelope = in.get<T>(log_envelope), p.direction = in.get<T>(direction);
        p.query_offsets = in.get<int64_t>(query_offsets), p.key_offsets = in.get<int64_t>(key_offsets);
        return p;
    }
};

template <class T>
void run(const Problem<T>& p, int order) {
    const Status status = attend(p, order);
    TORCH_CHECK_VALUE(status != BAD_OFFSETS,
                      "attention offsets must start at 0, never fall, and end at the number of queries and of tokens");
    TORCH_CHECK(status != NO_MEMORY,
                "attention backend 'native' found no memory for its tiles: use fewer threads or backend='blocked'");
}

// Memory for gradients; undefined where there is none.
struct Gradients {
    Tensor q, k, v, b, n;
    Gradients(const Shared& of, bool with_direction) : q(new_like(of.q)), k(new_like(of.k)), v(new_like(of.v)) {
        if (of.log_envelope) b = new_like(*of.log_envelope);
        if (of.direction && with_direction) n = new_like(*of.direction);
    }
    template <class T>
    void give(Problem<T>& p) const {
        p.to_q = data<T>(q), p.to_k = data<T>(k), p.to_v = data<T>(v), p.to_b = data<T>(b), p.to_n = data<T>(n);
    }
    // Empty tensors stand for those that are undefined.
    Five results(at::ScalarType type) const {
        const auto or_empty = [&](const Tensor& x) { return x.defined() ? x : at::empty({0}, q.options().dtype(type)); };
        return {q.to(type), k.to(type), v.to(type), or_empty(b), or_empty(n)};
    }
};

Pair attention(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& log_envelope, const Optional& direction,
               const Tensor& query_offsets, const Tensor& key_offsets, at::IntArrayRef widths, double scale,
               bool angular_values) {
    const Shared shared{q, k, v, log_envelope, direction, query_offsets, key_offsets, widths, scale, angular_values};
    Tensor out = new_like(q), lse = at::empty({q.size(0), q.size(1)}, out.options());
    with_scalar(q, [&](auto scalar) {
        using T = decltype(scalar);
        Inputs in;
        Problem<T> p = shared.problem<T>(in);
        p.to_out = data<T>(out), p.to_lse = data<T>(lse);
        run(p, 0);
    });
    return {out.to(q.scalar_type()), lse};
}

Five attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Optional& log_envelope,
                        const Optional& direction, const Tensor& query_offsets, const Tensor& key_offsets, const Tensor& out,
                        const Tensor& lse, at::IntArrayRef widths, double scale, bool angular_values,
                        bool with_direction) {
    const Shared shared{q, k, v, log_envelope, direction, query_offsets, key_offsets, widths, scale, angular_values};
    const Gradients gradients(shared, with_direction);
    with_scalar(q, [&](auto scalar) {
        using T = decltype(scalar);
        Inputs in;
        Problem<T> p = shared.problem<T>(in);
        p.grad_out = in.get<T>(grad_out), p.out = in.get<T>(out), p.lse = in.get<T>(lse);
        gradients.give(p);
        run(p, 1);
    });
    return gradients.results(q.scalar_type());
}

Six attention_double_backward(const Tensor& tq, const Tensor& tk, const Tensor& tv, const Optional& tb, const Optional& tn,
                              const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                              const Optional& log_envelope, const Optional& direction, const Tensor& query_offsets,
                              const Tensor& key_offsets, const Tensor& out, const Tensor& lse, at::IntArrayRef widths,
                              double scale, bool angular_values) {
    const Shared shared{q, k, v, log_envelope, direction, query_offsets, key_offsets, widths, scale, angular_values};
    const Gradients gradients(shared, true);
    Tensor to_grad_out = new_like(q);
    with_scalar(q, [&](auto scalar) {
        using T = decltype(scalar);
        Inputs in;
        Problem<T> p = shared.problem<T>(in);
        p.grad_out = in.get<T>(grad_out), p.out = in.get<T>(out), p.lse = in.get<T>(lse);
        p.tq = in.get<T>(tq), p.tk = in.get<T>(tk), p.tv = in.get<T>(tv), p.tb = in.get<T>(tb), p.tn = in.get<T>(tn);
        p.to_out = data<T>(to_grad_out);
        gradients.give(p);
        run(p, 2);
    });
    return std::tuple_cat(std::make_tuple(to_grad_out.to(q.scalar_type())), gradients.results(q.scalar_type()));
}

// ---- the graph --------------------------------------------------------------------------------------------------

// Arrays of a graph in the order of escaip/graph/native.py, of a list center, neighbor and shift; none where it is refused.
std::tuple<std::vector<Tensor>, int64_t> graph(
    const Tensor& positions, const Tensor& cell, const Tensor& pbc, const Tensor& index, const Tensor& ptr,
    const Optional& center, const Optional& neighbor, const Optional& shift, at::IntArrayRef choice,
    at::ArrayRef<double> lengths) {
    TORCH_CHECK_VALUE(choice.size() == 4 && lengths.size() == 6, "escaip::graph takes four integers and six numbers");
    Inputs in;
    GraphRequest p{};
    p.atoms = positions.size(0), p.systems = cell.size(0), p.threads = at::get_num_threads();
    p.kind = choice[0], p.num_neighbors = choice[1], p.ranked = choice[2], p.bump = choice[3];
    p.cutoff = lengths[0], p.radius = lengths[1], p.support = lengths[2], p.rank_scale = lengths[3];
    p.envelope_scale = lengths[4], p.slack = lengths[5];
    p.positions = in.get<double>(positions), p.cell = in.get<double>(cell);
    p.pbc = reinterpret_cast<const uint8_t*>(in.get<bool>(pbc));
    p.index = in.get<int64_t>(index), p.ptr = in.get<int64_t>(ptr);
    p.edges = center ? center->size(0) : -1;
    p.center = in.get<int64_t>(center), p.neighbor = in.get<int64_t>(neighbor), p.shift = in.get<int64_t>(shift);
    std::vector<Tensor> arrays;
    int64_t longest = 0;
    const auto integers = [&](at::IntArrayRef sizes) {
        arrays.push_back(at::empty(sizes, at::kLong));
        return arrays.back().mutable_data_ptr<int64_t>();
    };
    const bool built = build_graph(p, [&](const GraphSizes& sizes) {
        longest = sizes.longest;
        GraphArrays out{};
        if (p.kind != LIST) out.offsets = integers({p.atoms + 1});
        out.center = integers({sizes.rows}), out.neighbor = integers({sizes.rows}), out.shift = integers({sizes.rows, 3});
        if (p.kind == LIST) return out;
        out.reverse = integers({sizes.tokens}), out.self_token = integers({p.atoms});
        arrays.push_back(at::empty({sizes.tokens}, at::kDouble));
        out.rank_base = arrays.back().mutable_data_ptr<double>();
        out.rank_token = integers({sizes.compared}), out.rank_other = integers({sizes.compared});
        return out;
    });
    if (!built) arrays.clear();
    return {arrays, longest};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(escaip, m) {
    m.def(
        "graph(Tensor positions, Tensor cell, Tensor pbc, Tensor index, Tensor ptr, Tensor? center, Tensor? neighbor, "
        "Tensor? shift, int[] choice, float[] lengths) -> (Tensor[], int)");
}

TORCH_LIBRARY_IMPL(escaip, CPU, m) {
    m.impl("sum_rows", sum_rows_kernel);
    m.impl("spline_values", spline_values_kernel);
    m.impl("spline_products", spline_products_kernel);
    m.impl("spline_transpose", spline_transpose_kernel);
    m.impl("power_spectrum", power_spectrum_kernel);
    m.impl("power_spectrum_backward", power_spectrum_backward_kernel);
    m.impl("power_spectrum_double_backward", power_spectrum_double_backward_kernel);
    m.impl("attention_native", attention);
    m.impl("attention_native_backward", attention_backward);
    m.impl("attention_native_double_backward", attention_double_backward);
    m.impl("graph", graph);
}

}  // namespace escaip
