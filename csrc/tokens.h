// What the operators on token log-probabilities are given, and the checks that every backend owes its callers.
//
// Nothing here reads device memory; label values are checked by the backends.

#pragma once

#include <tuple>

#include "layers.h"

namespace shapo {

// Tokens [rows, length], each with its logits and, `shift` to the right, its label.
struct Tokens {
  char* logits;
  ScalarType dtype;
  int64_t element_bytes;
  int64_t rows, length, vocabulary;
  int64_t row_stride, token_stride, stride;  // in elements
  const int64_t* labels;
  int64_t label_row_stride, label_stride;
  int64_t ignore_index, shift, first;

  int64_t count() const { return rows * length; }
  char* at(int64_t token) const {
    return logits + (token / length * row_stride + token % length * token_stride) * element_bytes;
  }
  // The label's position among these logits; a token without a label has none.
  bool labelled(int64_t token, int64_t* label) const {
    const int64_t position = token % length + shift;
    if (position >= length) return false;
    const int64_t value = labels[token / length * label_row_stride + position * label_stride];
    *label = value - first;
    return value != ignore_index;
  }
  bool holds(int64_t label) const { return label >= 0 && label < vocabulary; }
};

inline Tokens describe_tokens(const Tensor& logits, const Tensor& labels, int64_t ignore_index, int64_t shift,
                              int64_t first) {
  STD_TORCH_CHECK(logits.dim() == 3 && is_floating(logits.scalar_type()), "logits is ", logits.scalar_type(), " ",
                  describe_shape(logits), ": expected a floating-point [rows, tokens, vocabulary]");
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.dim() == 2 && labels.size(0) == logits.size(0) &&
                      labels.size(1) == logits.size(1),
                  "labels is ", labels.scalar_type(), " ", describe_shape(labels), ": expected int64 [", logits.size(0),
                  ", ", logits.size(1), "]");
  STD_TORCH_CHECK(shift >= 0, "shift is ", shift, ": expected 0 or more");
  check_same_device("labels", 0, labels, logits);
  return Tokens{static_cast<char*>(logits.data_ptr()),
                logits.scalar_type(),
                bytes_of(logits.scalar_type()),
                logits.size(0),
                logits.size(1),
                logits.size(2),
                logits.stride(0),
                logits.stride(1),
                logits.stride(2),
                static_cast<const int64_t*>(labels.data_ptr()),
                labels.stride(0),
                labels.stride(1),
                ignore_index,
                shift,
                first};
}

// Checks what token_logps has returned, and the gradient of it: `elements` of each token in the compute dtype.
inline void check_per_token(const char* name, const Tensor& tensor, const Tokens& tokens, int64_t elements) {
  const ScalarType dtype = compute_dtype_of(tokens.dtype);
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype && tensor.numel() == elements * tokens.count() && tensor.is_contiguous(), name,
      " is ", tensor.scalar_type(), " ", describe_shape(tensor), ": expected a contiguous ", dtype, " of ",
      elements * tokens.count(), " elements, as token_logps returns");
}

}  // namespace shapo
