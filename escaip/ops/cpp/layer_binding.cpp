// Activation and norm for the CPU, with derivatives (../layers.py has the formulas). These are of PyTorch's C++: a step of
// training calls some hundred of them, and the way through Python would take a good part of a small step.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops.h"
#include "tensors.h"

namespace escaip {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Guard = at::AutoDispatchBelowADInplaceOrView;

Tensor or_undefined(const Optional& x) { return x.value_or(Tensor()); }

// A sum of rows: base (..., H) + first (N, H) at i (T) + second (N, H) at j (T), without what is undefined.
struct Parts {
    Tensor base, first, second, i, j;

    Tensor new_sum() const {
        if (base.defined()) return at::empty(base.sizes(), base.options());
        return at::empty({i.size(0), first.size(1)}, first.options());
    }
    SumShape shape(Inputs& in, const Tensor& sum) const {
        const int64_t size = first.defined() ? first.size(1) : 1024, elements = sum.numel();
        const auto get = [&](const Tensor& x) { return x.defined() ? in.get<int64_t>(x) : nullptr; };
        return {get(i), get(j), size ? (elements + size - 1) / size : 0, size, elements, at::get_num_threads()};
    }
    template <class T>
    Sum<T> values(Inputs& in) const {
        const auto get = [&](const Tensor& x) { return x.defined() ? in.get<T>(x) : nullptr; };
        return {get(base), get(first), get(second)};
    }
    // By operations of PyTorch, differentiable.
    Tensor sum() const {
        variable_list terms;
        if (base.defined()) terms.push_back(base);
        if (first.defined()) terms.push_back(first.index_select(0, i));
        if (second.defined()) terms.push_back(second.index_select(0, j));
        Tensor total = terms.at(0);
        for (size_t term = 1; term < terms.size(); ++term) total = total + terms[term];
        return total;
    }
    // Gradients by base, first and second of a gradient by the sum, where the bits of `wanted` say so.
    variable_list gradients(const Tensor& x, int64_t wanted) const {
        const auto rows = [&](const Tensor& like, const Tensor& index) {
            return at::zeros(like.sizes(), like.options()).index_add(0, index, x);
        };
        return {wanted & 1 ? x : Tensor(), wanted & 2 ? rows(first, i) : Tensor(), wanted & 4 ? rows(second, j) : Tensor()};
    }
};

Tensor gelu_forward(const Parts& parts, Tensor* slope) {
    Tensor out = parts.new_sum();
    if (slope) *slope = parts.new_sum();
    with_scalar(out, [&](auto scalar) {
        using T = decltype(scalar);
        Inputs in;
        gelu(parts.shape(in, out), parts.values<T>(in), data<T>(out), slope ? data<T>(*slope) : nullptr);
    });
    return out;
}

struct GeluBackward : torch::autograd::Function<GeluBackward> {
    static variable_list forward(AutogradContext* ctx, const Tensor& grad, const Optional& base, const Optional& first,
                                 const Optional& second, const Optional& i, const Optional& j, const Tensor& slope,
                                 int64_t wanted) {
        const Guard guard;
        const Parts parts{or_undefined(base), or_undefined(first), or_undefined(second), or_undefined(i), or_undefined(j)};
        ctx->save_for_backward({grad, parts.base, parts.first, parts.second, parts.i, parts.j, slope});
        ctx->saved_data["wanted"] = wanted;
        ctx->set_materialize_grads(false);
        variable_list found;
        for (const Tensor& x : parts.gradients(grad * slope, wanted))
            if (x.defined()) found.push_back(x);
        return found;
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& tangents) {
        const variable_list saved = ctx->get_saved_variables();
        const int64_t wanted = ctx->saved_data["wanted"].toInt();
        const Tensor &grad = saved[0], &slope = saved[6];
        const Parts parts{saved[1], saved[2], saved[3], saved[4], saved[5]};
        Parts tangent{{}, {}, {}, parts.i, parts.j};
        size_t next = 0;
        if (wanted & 1) tangent.base = tangents[next++];
        if (wanted & 2) tangent.first = tangents[next++];
        if (wanted & 4) tangent.second = tangents[next++];
        variable_list found(8);
        if (!tangent.base.defined() && !tangent.first.defined() && !tangent.second.defined()) return found;
        Tensor to_x;
        if (at::GradMode::is_enabled()) {
            const Tensor x = parts.sum(), t = tangent.sum(), density = (-0.5 * x * x).exp() * 0.39894228040143267794;
            found[0] = t * (0.5 * at::erfc(-0.70710678118654752440 * x) + x * density);
            to_x = t * grad * density * (2.0 - x * x);
        } else {
            found[0] = at::empty(slope.sizes(), slope.options()), to_x = at::empty(slope.sizes(), slope.options());
            with_scalar(slope, [&](auto scalar) {
                using T = decltype(scalar);
                Inputs in;
                gelu_double_backward(parts.shape(in, slope), tangent.values<T>(in), in.get<T>(grad), parts.values<T>(in),
                                     in.get<T>(slope), data<T>(found[0]), data<T>(to_x));
            });
        }
        const variable_list to_parts =
            parts.gradients(to_x, parts.base.defined() + 2 * parts.first.defined() + 4 * parts.second.defined());
        std::copy(to_parts.begin(), to_parts.end(), found.begin() + 1);
        return found;
    }
};

struct Gelu : torch::autograd::Function<Gelu> {
    static Tensor forward(AutogradContext* ctx, const Optional& base, const Optional& first, const Optional& second,
                          const Optional& i, const Optional& j) {
        const Guard guard;
        const Parts parts{or_undefined(base), or_undefined(first), or_undefined(second), or_undefined(i), or_undefined(j)};
        Tensor slope, out = gelu_forward(parts, &slope);
        ctx->save_for_backward({parts.base, parts.first, parts.second, parts.i, parts.j, slope});
        return out;
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const variable_list saved = ctx->get_saved_variables();
        const Parts parts{saved[0], saved[1], saved[2], saved[3], saved[4]};
        int64_t wanted = 0;
        size_t edge = 0;
        for (int part = 0; part < 3; ++part)
            if (saved[part].defined()) wanted |= int64_t(ctx->needs_input_grad(edge++)) << part;
        if (!at::GradMode::is_enabled()) {
            variable_list found = parts.gradients(grads[0] * saved[5], wanted);
            found.resize(5);
            return found;
        }
        const auto given = [](const Tensor& x) { return x.defined() ? Optional(x) : Optional(); };
        const variable_list of_wanted = GeluBackward::apply(grads[0], given(saved[0]), given(saved[1]), given(saved[2]),
                                                            given(saved[3]), given(saved[4]), saved[5], wanted);
        variable_list found(5);
        size_t next = 0;
        for (int part = 0; part < 3; ++part)
            if (wanted >> part & 1) found[part] = of_wanted[next++];
        return found;
    }
};

// ---- norm -------------------------------------------------------------------------------------------------------

NormShape shape_of(const Tensor& x, double floor) {
    const int64_t size = x.size(-1);
    return {size ? x.numel() / size : 0, size, at::get_num_threads(), floor};
}

Tensor norm_forward(const Tensor& x, const Tensor& weight, double floor) {
    Tensor out = new_like(x);
    with_scalar(x, [&](auto scalar) {
        using T = decltype(scalar);
        Inputs in;
        rms_norm(shape_of(x, floor), in.get<T>(x), in.get<T>(weight), data<T>(out));
    });
    return out;
}

variable_list norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, double floor) {
    Tensor to_x = new_like(x), to_w = new_like(weight);
    with_scalar(x, [&](auto scalar) {
        using T = decltype(scalar);
        Inputs in;
        rms_norm_backward(shape_of(x, floor), in.get<T>(grad), in.get<T>(x), in.get<T>(weight), data<T>(to_x), data<T>(to_w));
    });
    return {to_x, to_w};
}

struct NormBackward : torch::autograd::Function<NormBackward> {
    static variable_list forward(AutogradContext* ctx, const Tensor& grad, const Tensor& x, const Tensor& weight, double floor) {
        const Guard guard;
        ctx->save_for_backward({grad, x, weight});
        ctx->saved_data["floor"] = floor;
        return norm_backward(grad, x, weight, floor);
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& tangents) {
        const variable_list saved = ctx->get_saved_variables();
        const Tensor &a = tangents[0], &b = tangents[1], &g = saved[0], &x = saved[1], &w = saved[2];
        const double floor = ctx->saved_data["floor"].toDouble();
        if (at::GradMode::is_enabled()) {
            const Tensor r = (x.square().mean(-1, true) + floor).rsqrt(), cube = r.pow(3) / double(x.size(-1));
            const auto along = [](const Tensor& y) { return y.sum(-1, true); };
            const Tensor s = along(w * g * x), t = along(a * x), turned = a * w + b * x;
            const Tensor u = along(g * turned) - 3.0 * r.square() * s * t / double(x.size(-1));
            const Tensor to_w = g * (r * a - cube * t * x);
            return {r * turned - cube * t * w * x, r * b * g - cube * (s * a + t * w * g + u * x),
                    to_w.reshape({-1, x.size(-1)}).sum(0), Tensor()};
        }
        Tensor to_grad = new_like(g), to_x = new_like(x), to_w = new_like(w);
        with_scalar(x, [&](auto scalar) {
            using T = decltype(scalar);
            Inputs in;
            rms_norm_double_backward(shape_of(x, floor), in.get<T>(a), in.get<T>(b), in.get<T>(g), in.get<T>(x), in.get<T>(w),
                                     data<T>(to_grad), data<T>(to_x), data<T>(to_w));
        });
        return {to_grad, to_x, to_w, Tensor()};
    }
};

struct Norm : torch::autograd::Function<Norm> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, double floor) {
        const Guard guard;
        ctx->save_for_backward({x, weight});
        ctx->saved_data["floor"] = floor;
        return norm_forward(x, weight, floor);
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const variable_list saved = ctx->get_saved_variables();
        const double floor = ctx->saved_data["floor"].toDouble();
        variable_list found = at::GradMode::is_enabled() ? NormBackward::apply(grads[0], saved[0], saved[1], floor)
                                                         : norm_backward(grads[0], saved[0], saved[1], floor);
        found.resize(3);
        return found;
    }
};

Tensor gelu_kernel(const Optional& base, const Optional& first, const Optional& second, const Optional& i, const Optional& j) {
    return gelu_forward({or_undefined(base), or_undefined(first), or_undefined(second), or_undefined(i), or_undefined(j)},
                        nullptr);
}
Tensor gelu_autograd(const Optional& base, const Optional& first, const Optional& second, const Optional& i, const Optional& j) {
    return Gelu::apply(base, first, second, i, j);
}
Tensor norm_autograd(const Tensor& x, const Tensor& weight, double floor) { return Norm::apply(x, weight, floor); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(escaip, m) {
    m.def("gelu(Tensor? base, Tensor? first, Tensor? second, Tensor? i, Tensor? j) -> Tensor");
    m.def("rms_norm(Tensor x, Tensor weight, float floor) -> Tensor");
}
TORCH_LIBRARY_IMPL(escaip, CPU, m) {
    m.impl("gelu", gelu_kernel);
    m.impl("rms_norm", norm_forward);
}
TORCH_LIBRARY_IMPL(escaip, AutogradCPU, m) {
    m.impl("gelu", gelu_autograd);
    m.impl("rms_norm", norm_autograd);
}

}  // namespace escaip
