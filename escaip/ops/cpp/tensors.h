// Tensors of PyTorch as arrays for kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <vector>

namespace escaip {

using at::Tensor;
using Optional = std::optional<Tensor>;

// Doubles are computed in double precision, all other types in single precision.
inline at::ScalarType computed_in(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Calls f with a value of the type that tensors like x are computed in.
template <class F>
auto with_scalar(const Tensor& x, const F& f) {
    return computed_in(x) == at::kDouble ? f(double()) : f(float());
}

inline Tensor new_like(const Tensor& x) { return at::empty(x.sizes(), x.options().dtype(computed_in(x))); }

// The inputs of a call, contiguous and in the type that is computed in, for as long as it lasts.
class Inputs {
  public:
    template <class T>
    const T* get(const Tensor& x) {
        held_.push_back(x.to(c10::CppTypeToScalarType<T>::value).contiguous());
        return held_.back().const_data_ptr<T>();
    }
    template <class T>
    const T* get(const Optional& x) {
        return x ? get<T>(*x) : nullptr;
    }

  private:
    std::vector<Tensor> held_;
};

template <class T>
T* data(const Tensor& x) {
    return x.defined() && x.numel() ? x.mutable_data_ptr<T>() : nullptr;
}

}  // namespace escaip
