// Tensors and arguments as kernels of PyTorch's dispatcher get them.
//
// Written against the C interface of libtorch that its headers call stable (torch/csrc/stable/c/shim.h), declared here as
// far as it is used: no header of PyTorch is needed, nor its C++ ABI. A kernel takes its arguments from a stack of 64-bit
// values, which it owns, and puts results in their place.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace escaip {
struct Opaque;
using Handle = Opaque*;
using Value = uint64_t;
using Kernel = void (*)(Value*, uint64_t, uint64_t);
}  // namespace escaip

extern "C" {
int32_t aoti_torch_library_init_impl(const char* space, const char* key, const char* file, uint32_t line, void** made);
int32_t torch_library_impl(void* library, const char* name, escaip::Kernel kernel, uint64_t version);
int32_t torch_call_dispatcher(const char* name, const char* overload, escaip::Value* stack, uint64_t version);
int32_t aoti_torch_new_tensor_handle(escaip::Handle, escaip::Handle*);
int32_t aoti_torch_delete_tensor_object(escaip::Handle);
int32_t aoti_torch_get_data_ptr(escaip::Handle, void**);
int32_t aoti_torch_get_dim(escaip::Handle, int64_t*);
int32_t aoti_torch_get_sizes(escaip::Handle, int64_t**);
int32_t aoti_torch_get_dtype(escaip::Handle, int32_t*);
int32_t aoti_torch_is_contiguous(escaip::Handle, bool*);
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, escaip::Handle*);
int32_t aoti_torch_copy_(escaip::Handle to, escaip::Handle from, int32_t);
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_int64();
const char* torch_exception_get_what_without_backtrace();
int32_t torch_get_num_threads(uint32_t*);
int32_t torch_list_size(void*, size_t*);
int32_t torch_list_get_item(void*, size_t, escaip::Value*);
int32_t torch_delete_list(void*);
int32_t torch_string_c_str(void*, const char**);
int32_t torch_delete_string(void*);
int32_t torch_delete_stable_ivalue(escaip::Value*);
}

namespace escaip {

constexpr uint64_t VERSION = (uint64_t(2) << 56) | (uint64_t(13) << 48);  // of the interface above

inline void check(int32_t status) {
    if (status) throw std::runtime_error(torch_exception_get_what_without_backtrace());
}

inline int64_t num_threads() {
    uint32_t found = 1;
    check(torch_get_num_threads(&found));
    return found;
}

// What is computed in: doubles as such, all else in single precision.
inline int32_t computed_in(int32_t type) {
    return type == aoti_torch_dtype_float64() ? type : aoti_torch_dtype_float32();
}

// Calls f with a null pointer that has the scalar's type as its own.
template <class F>
void with_scalar(int32_t type, F&& f) {
    type == aoti_torch_dtype_float64() ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
}

class Tensor {  // owns a handle
  public:
    explicit Tensor(Handle handle) : handle_(handle) {}
    explicit Tensor(Value value) : handle_(reinterpret_cast<Handle>(value)) {}
    Tensor(Tensor&& other) noexcept : handle_(other.handle_) { other.handle_ = nullptr; }
    Tensor& operator=(Tensor&& other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~Tensor() {
        if (handle_) aoti_torch_delete_tensor_object(handle_);
    }

    static Tensor empty(const std::vector<int64_t>& sizes, int32_t type) {
        std::vector<int64_t> strides(sizes.size());
        int64_t step = 1;
        for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(1, sizes[i])) strides[i] = step;
        Handle made = nullptr;
        check(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), type,
                                       aoti_torch_device_type_cpu(), 0, &made));
        return Tensor(made);
    }

    std::vector<int64_t> sizes() const {
        int64_t dimensions = 0, *first = nullptr;
        check(aoti_torch_get_dim(handle_, &dimensions));
        check(aoti_torch_get_sizes(handle_, &first));
        return std::vector<int64_t>(first, first + dimensions);
    }
    int32_t type() const {
        int32_t found = 0;
        check(aoti_torch_get_dtype(handle_, &found));
        return found;
    }
    // The same numbers, contiguous and of that type: the same memory where they are so.
    Tensor as(int32_t wanted) const {
        bool contiguous = false;
        check(aoti_torch_is_contiguous(handle_, &contiguous));
        if (contiguous && type() == wanted) {
            Handle same = nullptr;
            check(aoti_torch_new_tensor_handle(handle_, &same));
            return Tensor(same);
        }
        Tensor copy = empty(sizes(), wanted);
        check(aoti_torch_copy_(copy.handle_, handle_, 0));
        return copy;
    }
    template <class T>
    T* data() const {
        void* pointer = nullptr;
        check(aoti_torch_get_data_ptr(handle_, &pointer));
        return static_cast<T*>(pointer);
    }
    Value release() {
        const Value value = reinterpret_cast<Value>(handle_);
        handle_ = nullptr;
        return value;
    }

  private:
    Handle handle_;
};

// A tensor that somebody else owns.
struct Borrowed : Tensor {
    using Tensor::Tensor;
    ~Borrowed() { release(); }
};

}  // namespace escaip
