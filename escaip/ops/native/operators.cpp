// Operators that compiled evaluations call, as kernels of PyTorch's dispatcher: without them each call goes through
// Python, which for a small structure takes longer than what it computes.
#include "dispatcher.h"
#include "parallel.h"
#include "problem.h"

namespace escaip {
namespace {

// Kernels of the other sources, for each scalar, as Python hands them over.
template <class T>
struct Kernels {
    void (*spline_values)(const T*, const T*, int64_t, int64_t, int64_t, int64_t, int64_t, T*);
    void (*spline_products)(const T*, const T*, const T*, int64_t, int64_t, int64_t, int64_t, int64_t, T*);
    void (*orientation)(const T*, const T*, const int64_t*, int64_t, int64_t, int64_t, T*);
    void (*orientation_backward)(const T*, const T*, const T*, const int64_t*, int64_t, int64_t, int64_t, T*, T*);
    int (*attention)(const Problem<T>*);
    int (*attention_backward)(const Problem<T>*);
};
Kernels<float> single_kernels;
Kernels<double> double_kernels;
const Kernels<float>& kernels(float*) { return single_kernels; }
const Kernels<double>& kernels(double*) { return double_kernels; }

// Whether a kernel serves the type of a tensor; `pick` takes it from the table.
template <class Pick>
bool serves(Value tensor, const Pick& pick) {
    bool found = false;
    with_scalar(computed_in(Borrowed(tensor).type()), [&](auto* scalar) { found = pick(kernels(scalar)) != nullptr; });
    return found;
}

// What other families serve, scalars without kernels, and what is wrong, goes to Python.
void in_python(const char* name, Value* stack) { check(torch_call_dispatcher(name, "", stack, VERSION)); }

constexpr int64_t COLUMNS = 16;       // of a task at least
constexpr int64_t SERIAL = 1 << 15;   // elements below which threads cost more than they save

// sum_rows(x (T, ...), index (T), num_rows): rows in order, so that the sums have one order.
void sum_rows(Value* stack, uint64_t, uint64_t) {
    Tensor x(stack[0]), index(stack[1]);
    std::vector<int64_t> sizes = x.sizes();
    const int64_t rows = sizes[0];
    sizes[0] = int64_t(stack[2]);
    const int32_t type = x.type(), inner = computed_in(type);
    x = x.as(inner);
    index = index.as(aoti_torch_dtype_int64());
    Tensor out = Tensor::empty(sizes, inner);
    int64_t width = 1;
    for (size_t i = 1; i < sizes.size(); ++i) width *= sizes[i];
    with_scalar(inner, [&](auto* scalar) {
        using T = std::remove_pointer_t<decltype(scalar)>;
        const T* __restrict from = x.data<const T>();
        const int64_t* place = index.data<const int64_t>();
        T* __restrict to = out.data<T>();
        std::memset(to, 0, sizeof(T) * size_t(sizes[0] * width));
        const int64_t tasks = rows * width < SERIAL ? 1 : std::min(num_threads(), std::max<int64_t>(1, width / COLUMNS));
        const int64_t part = (width + tasks - 1) / tasks;
        in_parallel(tasks, tasks, [&](int64_t task) {
            const int64_t first = task * part, end = std::min(width, first + part);
            for (int64_t t = 0; t < rows; ++t) {
                T* sum = to + place[t] * width;
                const T* term = from + t * width;
                for (int64_t i = first; i < end; ++i) sum[i] += term[i];
            }
        });
    });
    stack[0] = out.as(type).release();
}

// spline_values(table (rows, H), point (T), order)
void spline_values(Value* stack, uint64_t, uint64_t) {
    if (!serves(stack[0], [](const auto& k) { return k.spline_values; })) {
        return in_python("escaip::spline_values_in_python", stack);
    }
    Tensor table(stack[0]), point(stack[1]);
    const int32_t type = table.type(), inner = computed_in(type);
    table = table.as(inner), point = point.as(inner);
    const std::vector<int64_t> shape = table.sizes();
    const int64_t points = point.sizes()[0];
    Tensor out = Tensor::empty({points, shape[1]}, inner);
    with_scalar(inner, [&](auto* scalar) {
        using T = std::remove_pointer_t<decltype(scalar)>;
        kernels(scalar).spline_values(table.data<T>(), point.data<T>(), int64_t(stack[2]), shape[0], shape[1], points,
                                      num_threads(), out.data<T>());
    });
    stack[0] = out.as(type).release();
}

// spline_products(cotangent (T, H), table (rows, H), point (T), order)
void spline_products(Value* stack, uint64_t, uint64_t) {
    if (!serves(stack[1], [](const auto& k) { return k.spline_products; })) {
        return in_python("escaip::spline_products_in_python", stack);
    }
    Tensor cotangent(stack[0]), table(stack[1]), point(stack[2]);
    const int32_t type = table.type(), inner = computed_in(type);
    cotangent = cotangent.as(inner), table = table.as(inner), point = point.as(inner);
    const std::vector<int64_t> shape = table.sizes();
    const int64_t points = point.sizes()[0];
    Tensor out = Tensor::empty({points}, inner);
    with_scalar(inner, [&](auto* scalar) {
        using T = std::remove_pointer_t<decltype(scalar)>;
        kernels(scalar).spline_products(cotangent.data<T>(), table.data<T>(), point.data<T>(), int64_t(stack[3]),
                                        shape[0], shape[1], points, num_threads(), out.data<T>());
    });
    stack[0] = out.as(type).release();
}

// orientation(direction (T, 3), weight (T), offsets (N + 1), l_max)
void orientation(Value* stack, uint64_t, uint64_t) {
    if (!serves(stack[0], [](const auto& k) { return k.orientation; })) {
        return in_python("escaip::orientation_in_python", stack);
    }
    Tensor direction(stack[0]), weight(stack[1]), offsets(stack[2]);
    const int32_t type = direction.type(), inner = computed_in(type);
    direction = direction.as(inner), weight = weight.as(inner);
    offsets = offsets.as(aoti_torch_dtype_int64());
    const int64_t atoms = offsets.sizes()[0] - 1, size = int64_t(stack[3]) + 1;
    Tensor out = Tensor::empty({atoms, size}, inner);
    with_scalar(inner, [&](auto* scalar) {
        using T = std::remove_pointer_t<decltype(scalar)>;
        kernels(scalar).orientation(direction.data<T>(), weight.data<T>(), offsets.data<int64_t>(), atoms, size,
                                    num_threads(), out.data<T>());
    });
    stack[0] = out.as(type).release();
}

// orientation_backward(grad (N, l_max + 1), direction, weight, offsets): two results
void orientation_backward(Value* stack, uint64_t, uint64_t) {
    if (!serves(stack[1], [](const auto& k) { return k.orientation_backward; })) {
        return in_python("escaip::orientation_backward_in_python", stack);
    }
    Tensor grad(stack[0]), direction(stack[1]), weight(stack[2]), offsets(stack[3]);
    const int32_t type = direction.type(), inner = computed_in(type);
    grad = grad.as(inner), direction = direction.as(inner), weight = weight.as(inner);
    offsets = offsets.as(aoti_torch_dtype_int64());
    const std::vector<int64_t> shape = grad.sizes();
    Tensor to_direction = Tensor::empty(direction.sizes(), inner), to_weight = Tensor::empty(weight.sizes(), inner);
    with_scalar(inner, [&](auto* scalar) {
        using T = std::remove_pointer_t<decltype(scalar)>;
        kernels(scalar).orientation_backward(grad.data<T>(), direction.data<T>(), weight.data<T>(),
                                             offsets.data<int64_t>(), shape[0], shape[1], num_threads(),
                                             to_direction.data<T>(), to_weight.data<T>());
    });
    stack[0] = to_direction.as(type).release();
    stack[1] = to_weight.as(type).release();
}

// Arguments of attention: `inputs` tensors, then the widths, the scale, the family, and a flag. They stay on the stack
// until it is clear that these kernels serve the call, so that it can be passed on.
class AttentionCall {
  public:
    AttentionCall(Value* stack, size_t inputs, std::vector<size_t> optional)
        : stack_(stack), inputs_(inputs), optional_(std::move(optional)) {
        held_.reserve(inputs);
    }

    bool is_native() const {
        const char* family = nullptr;
        check(torch_string_c_str(reinterpret_cast<void*>(stack_[inputs_ + 2]), &family));
        return std::strcmp(family, "native") == 0;
    }
    bool flag() const { return (stack_[inputs_ + 3] & 1) != 0; }
    bool has(size_t place) const { return stack_[place] != 0; }
    Borrowed at(size_t place) const {
        return Borrowed(is_optional(place) ? *reinterpret_cast<Value*>(stack_[place]) : stack_[place]);
    }
    // An input in that type, held until the end of the call; null where there is none.
    template <class T>
    const T* input(size_t place, int32_t wanted) {
        if (!has(place)) return nullptr;
        held_.push_back(at(place).as(wanted));
        return held_.back().data<const T>();
    }

    // What value and derivative have in common; `first`: place of q, followed by k, v, envelope, direction and offsets.
    template <class T>
    Problem<T> problem(size_t first, int32_t inner) {
        Problem<T> p{};
        const T** pointers[] = {&p.q, &p.k, &p.v, &p.log_envelope, &p.direction};
        for (size_t i = 0; i < 5; ++i) *pointers[i] = input<T>(first + i, inner);
        p.query_offsets = input<int64_t>(first + 5, aoti_torch_dtype_int64());
        p.key_offsets = input<int64_t>(first + 6, aoti_torch_dtype_int64());
        const std::vector<int64_t> q = at(first).sizes();
        p.neighborhoods = at(first + 5).sizes()[0] - 1;
        p.queries = q[0], p.heads = q[1], p.head_size = q[2], p.tokens = at(first + 1).sizes()[0];
        void* list = reinterpret_cast<void*>(stack_[inputs_]);
        size_t groups = 0;
        check(torch_list_size(list, &groups));
        p.groups = int64_t(groups);
        for (size_t i = 0; i < std::min<size_t>(groups, MOST_GROUPS); ++i) {
            Value width = 0;
            check(torch_list_get_item(list, i, &width));
            p.widths[i] = int64_t(width);
        }
        std::memcpy(&p.scale, &stack_[inputs_ + 1], sizeof(double));
        p.threads = num_threads();
        return p;
    }

    // Frees the arguments and puts results in their place.
    void finish(std::vector<Tensor> results) {
        held_.clear();
        for (size_t place = 0; place < inputs_; ++place) {
            if (!has(place)) continue;
            { Tensor freed(is_optional(place) ? *reinterpret_cast<Value*>(stack_[place]) : stack_[place]); }
            if (is_optional(place)) check(torch_delete_stable_ivalue(reinterpret_cast<Value*>(stack_[place])));
        }
        check(torch_delete_list(reinterpret_cast<void*>(stack_[inputs_])));
        check(torch_delete_string(reinterpret_cast<void*>(stack_[inputs_ + 2])));
        for (size_t i = 0; i < results.size(); ++i) stack_[i] = results[i].release();
    }

  private:
    bool is_optional(size_t place) const {
        return std::find(optional_.begin(), optional_.end(), place) != optional_.end();
    }

    Value* stack_;
    size_t inputs_;
    std::vector<size_t> optional_;
    std::vector<Tensor> held_;
};

// attention(q, k, v, envelope?, direction?, query_offsets, key_offsets, widths, scale, family): out, lse
bool attend(Value* stack) {
    AttentionCall call(stack, 7, {3, 4});
    if (!call.is_native() || !serves(stack[0], [](const auto& k) { return k.attention; })) return false;
    const int32_t type = call.at(0).type(), inner = computed_in(type);
    const std::vector<int64_t> shape = call.at(0).sizes();
    Tensor out = Tensor::empty(shape, inner), lse = Tensor::empty({shape[0], shape[1]}, inner);
    int status = 0;
    with_scalar(inner, [&](auto* scalar) {
        using T = std::remove_pointer_t<decltype(scalar)>;
        Problem<T> p = call.problem<T>(0, inner);
        p.to_out = out.data<T>(), p.to_lse = lse.data<T>();
        status = kernels(scalar).attention(&p);
    });
    if (status) return false;
    std::vector<Tensor> results;
    results.push_back(out.as(type)), results.push_back(std::move(lse));
    call.finish(std::move(results));
    return true;
}

// attention_backward(grad_out, those of attention up to the offsets, out, lse, widths, scale, family, with_direction):
// gradients of q, k, v, envelope and direction, empty where there is none
bool attend_backward(Value* stack) {
    AttentionCall call(stack, 10, {4, 5});
    if (!call.is_native() || !serves(stack[1], [](const auto& k) { return k.attention_backward; })) return false;
    const int32_t type = call.at(1).type(), inner = computed_in(type);
    std::vector<Tensor> results;
    for (size_t place = 1; place < 6; ++place) {
        const bool wanted = call.has(place) && (place < 5 || call.flag());
        results.push_back(wanted ? Tensor::empty(call.at(place).sizes(), inner) : Tensor::empty({0}, type));
    }
    int status = 0;
    with_scalar(inner, [&](auto* scalar) {
        using T = std::remove_pointer_t<decltype(scalar)>;
        Problem<T> p = call.problem<T>(1, inner);
        p.grad_out = call.input<T>(0, inner), p.out = call.input<T>(8, inner), p.lse = call.input<T>(9, inner);
        p.to_q = results[0].data<T>(), p.to_k = results[1].data<T>(), p.to_v = results[2].data<T>();
        p.to_b = call.has(4) ? results[3].data<T>() : nullptr;
        p.to_n = call.has(5) && call.flag() ? results[4].data<T>() : nullptr;
        status = kernels(scalar).attention_backward(&p);
    });
    if (status) return false;
    for (size_t i = 0; i < 3; ++i) results[i] = results[i].as(type);
    call.finish(std::move(results));
    return true;
}

void attention(Value* stack, uint64_t, uint64_t) {
    if (!attend(stack)) in_python("escaip::attention_in_python", stack);
}

void attention_backward(Value* stack, uint64_t, uint64_t) {
    if (!attend_backward(stack)) in_python("escaip::attention_backward_in_python", stack);
}

}  // namespace
}  // namespace escaip

extern "C" {

// Tables of the kernels that serve a scalar, from then on.
void escaip_serve_float(const escaip::Kernels<float>* table) { escaip::single_kernels = *table; }
void escaip_serve_double(const escaip::Kernels<double>* table) { escaip::double_kernels = *table; }

// Registers the operators for the CPU, once and for as long as the process lives; 0, or what PyTorch's interface says.
int escaip_register() {
    using namespace escaip;
    const std::pair<const char*, Kernel> named[] = {
        {"sum_rows", sum_rows},
        {"spline_values", spline_values},
        {"spline_products", spline_products},
        {"orientation", orientation},
        {"orientation_backward", orientation_backward},
        {"attention", attention},
        {"attention_backward", attention_backward},
    };
    void* library = nullptr;
    int32_t status = aoti_torch_library_init_impl("escaip", "CPU", "operators.cpp", 0, &library);
    for (const auto& [name, kernel] : named) {
        if (!status) status = torch_library_impl(library, name, kernel, VERSION);
    }
    return status;
}

}  // extern "C"
