// The schemas of the compiled operators, as shapo_kernels/ops/_schemas.py lists them; a test compares the two. A
// backend adds implementations in a library of its own and edits nothing here.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(shapo_kernels, m) {
  m.def(
      "gather_into(Tensor[] sources, Tensor[] indices, int[] axes, Tensor(a!)[] values, Tensor(b!) squared_norms) "
      "-> ()");
  m.def("squared_norms(Tensor[] values) -> Tensor");
  m.def("selected_squared_norms(Tensor[] sources, Tensor[] indices, int[] axes) -> Tensor");
  m.def(
      "perturbation_scale(Tensor squared_norms, Tensor rho, Tensor? weight_squared_norms, str norm, float eta) "
      "-> Tensor");
  m.def(
      "perturb_(Tensor(a!)[] weights, Tensor[] indices, int[] axes, Tensor[] directions, Tensor scale, "
      "Tensor(b!)[] backups, ScalarType? compute_dtype) -> Tensor");
  m.def("restore_(Tensor(a!)[] weights, Tensor[] indices, int[] axes, Tensor[] backups) -> ()");
  m.def("column_cosine(Tensor weight, Tensor direction, int axis) -> Tensor");
  m.def(
      "token_logps(Tensor logits, Tensor labels, int ignore_index, int shift, int first, int vocabulary, bool entropy) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "token_logps_gradient(Tensor logits, Tensor labels, Tensor logps, Tensor normalizers, Tensor grad, "
      "int ignore_index, int shift, int first) -> Tensor");
  m.def(
      "token_logps_gradient_(Tensor(a!) logits, Tensor labels, Tensor logps, Tensor normalizers, Tensor grad, "
      "int ignore_index, int shift, int first) -> ()");
}
