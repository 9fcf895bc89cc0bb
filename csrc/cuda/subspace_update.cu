// The subspace update on NVIDIA GPUs: gather with squared norms, scale, perturb in place, restore.
//
// Every operator takes all layers and dtypes in one launch (table.h), and one more for its sums. What a block sums is
// written out under its number and a second kernel adds those numbers in their order: atomics would make a norm, and
// through it every weight, differ from run to run. Nothing waits for the device.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <vector>

#include "../layers.h"
#include "launch.h"
#include "subspace_kernels.cuh"
#include "table.h"

namespace shapo::cuda {
namespace {

// The sums of a kernel that has written its partials: sums[layer, c].
void add_partials(std::vector<Row>& rows, const Tensor& partials, int columns, double* sums, cudaStream_t stream) {
  const int64_t all_blocks = count_blocks(rows);
  for_each_table(rows, [&](const auto& table, size_t layer, int64_t block) {
    add_kernel<<<table.layers, SUM_THREADS, 0, stream>>>(table, doubles(partials), all_blocks, block,
                                                         static_cast<int64_t>(layer), columns, sums);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

Tensor gather_partials(std::vector<Row>& rows, const Tensor& like, cudaStream_t stream) {
  Tensor partials = new_doubles(like, count_blocks(rows));
  for_each_table(rows, [&](const auto& table, size_t, int64_t block) {
    if (table.blocks == 0) return;
    gather_kernel<<<table.blocks, THREADS, 0, stream>>>(table, doubles(partials) + block);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return partials;
}

void gather_into(std::vector<Tensor> sources, std::vector<Tensor> indices, std::vector<int64_t> axes,
                 std::vector<Tensor> values, Tensor squared_norms) {
  const std::vector<Layer> layers = describe_layers("sources", sources, indices, axes);
  const std::vector<void*> compact = describe_compact("values", values, layers, true);
  if (layers.empty()) return;
  check_float64_vector("squared_norms", squared_norms, layers.size(), sources[0]);
  const OnDeviceOf device(sources[0]);
  std::vector<Row> rows = describe_rows(layers, &compact, nullptr);
  const Tensor partials = gather_partials(rows, squared_norms, device.stream());
  add_partials(rows, partials, 1, doubles(squared_norms), device.stream());
}

Tensor selected_squared_norms(std::vector<Tensor> sources, std::vector<Tensor> indices, std::vector<int64_t> axes) {
  const std::vector<Layer> layers = describe_layers("sources", sources, indices, axes);
  const OnDeviceOf device(sources.at(0));
  std::vector<Row> rows = describe_rows(layers, nullptr, nullptr);
  Tensor result = new_doubles(sources[0], static_cast<int64_t>(layers.size()));
  add_partials(rows, gather_partials(rows, result, device.stream()), 1, doubles(result), device.stream());
  return result;
}

// Rows of whole tensors; those that are not contiguous are replaced by copies.
std::vector<Row> describe_whole(std::vector<Tensor>& values) {
  std::vector<Row> rows;
  for (size_t l = 0; l < values.size(); ++l) {
    const ScalarType dtype = values[l].scalar_type();
    STD_TORCH_CHECK(is_floating(dtype), "values[", l, "] is ", dtype, ": expected a floating-point dtype");
    check_same_device("values", l, values[l], values[0]);
    if (!values[l].is_contiguous()) values[l] = torch::stable::contiguous(values[l]);
    Row row{};
    row.data = values[l].data_ptr();
    row.inner = values[l].numel();
    row.kind = kind_of(dtype);
    row.path = WHOLE;
    rows.push_back(row);
  }
  return rows;
}

Tensor squared_norms(std::vector<Tensor> values) {
  const OnDeviceOf device(values.at(0));
  std::vector<Row> rows = describe_whole(values);
  Tensor result = new_doubles(values[0], static_cast<int64_t>(values.size()));
  add_partials(rows, gather_partials(rows, result, device.stream()), 1, doubles(result), device.stream());
  return result;
}

ScaleOf describe_scale(Tensor& rho, std::optional<Tensor>& weight_squared_norms, const std::string& norm, double eta,
                       size_t layers, const Tensor& like) {
  STD_TORCH_CHECK(norm == "global" || norm == "layer" || norm == "none", "norm is \"", norm,
                  "\": expected \"global\", \"layer\" or \"none\"");
  check_float64_vector("rho", rho, layers, like);
  if (weight_squared_norms) check_float64_vector("weight_squared_norms", *weight_squared_norms, layers, like);
  return ScaleOf{doubles(rho), weight_squared_norms ? doubles(*weight_squared_norms) : nullptr, eta,
                 static_cast<int64_t>(layers),
                 norm == "global"  ? 0
                 : norm == "layer" ? 1
                                   : 2};
}

Tensor perturbation_scale(Tensor squared_norms, Tensor rho, std::optional<Tensor> weight_squared_norms,
                          std::string norm, double eta) {
  const int64_t layers = squared_norms.numel();
  check_float64_vector("squared_norms", squared_norms, static_cast<size_t>(layers), squared_norms);
  const ScaleOf scale_of =
      describe_scale(rho, weight_squared_norms, norm, eta, static_cast<size_t>(layers), squared_norms);
  const OnDeviceOf device(squared_norms);
  Tensor scale = new_doubles(squared_norms, layers);
  if (layers == 0) return scale;
  scale_kernel<<<grid_size(layers), SUM_THREADS, 0, device.stream()>>>(doubles(squared_norms), scale_of,
                                                                       doubles(scale));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return scale;
}

Tensor perturb_(std::vector<Tensor> weights, std::vector<Tensor> indices, std::vector<int64_t> axes,
                std::vector<Tensor> directions, Tensor scale, std::vector<Tensor> backups,
                std::optional<ScalarType> compute_dtype) {
  const std::vector<Layer> layers = describe_layers("weights", weights, indices, axes);
  const std::vector<void*> steps = describe_compact("directions", directions, layers, true);
  const std::vector<void*> kept = describe_compact("backups", backups, layers, false);
  check_float64_vector("scale", scale, layers.size(), layers.empty() ? scale : weights[0]);
  STD_TORCH_CHECK(!compute_dtype || is_floating(*compute_dtype), "compute_dtype is ", *compute_dtype,
                  ": expected float32, bfloat16, float16 or float64");
  const OnDeviceOf device(scale);
  std::vector<Row> rows = describe_rows(layers, &steps, &kept);
  const int64_t blocks = count_blocks(rows);
  const int rounding = compute_dtype && *compute_dtype != ScalarType::Double ? kind_of(*compute_dtype) : KEEP;
  Tensor partials = new_doubles(scale, 3 * blocks);
  for_each_table(rows, [&](const auto& table, size_t layer, int64_t block) {
    if (table.blocks == 0) return;
    perturb_kernel<<<table.blocks, THREADS, 0, device.stream()>>>(table, doubles(scale) + layer, rounding,
                                                                  doubles(partials) + block, blocks);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  const auto count = static_cast<int64_t>(layers.size());
  Tensor result = torch::stable::new_empty(scale, {count, 3}, ScalarType::Double);
  add_partials(rows, partials, 3, doubles(result), device.stream());
  return result;
}

void restore_(std::vector<Tensor> weights, std::vector<Tensor> indices, std::vector<int64_t> axes,
              std::vector<Tensor> backups) {
  const std::vector<Layer> layers = describe_layers("weights", weights, indices, axes);
  const std::vector<void*> kept = describe_compact("backups", backups, layers, false);
  if (layers.empty()) return;
  const OnDeviceOf device(weights[0]);
  std::vector<Row> rows = describe_rows(layers, nullptr, &kept);
  for_each_table(rows, [&](const auto& table, size_t, int64_t) {
    if (table.blocks == 0) return;
    restore_kernel<<<table.blocks, THREADS, 0, device.stream()>>>(table);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(shapo_kernels, CUDA, m) {
  m.impl("gather_into", TORCH_BOX(&gather_into));
  m.impl("squared_norms", TORCH_BOX(&squared_norms));
  m.impl("selected_squared_norms", TORCH_BOX(&selected_squared_norms));
  m.impl("perturbation_scale", TORCH_BOX(&perturbation_scale));
  m.impl("perturb_", TORCH_BOX(&perturb_));
  m.impl("restore_", TORCH_BOX(&restore_));
}

}  // namespace shapo::cuda
