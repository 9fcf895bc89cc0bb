// How the work of an operator is cut into blocks and shared among threads.
//
// Blocks depend on shapes alone and threads take them as they come; what a block sums is stored under the block's
// number and added in that order, so that results depend neither on the number of threads nor on their timing.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "../layers.h"

namespace shapo::cpu {

// Elements in a block: about 100 us of work for scattered columns, and at most 4096 blocks in a layer.
constexpr int64_t BLOCK_ELEMENTS = 8192;
constexpr int64_t MAX_BLOCKS = 4096;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls work(0), ..., work(tasks - 1) on all threads; a call with too few elements to share stays on this one.
template <class F>
void share(int64_t tasks, int64_t elements, const F& work) {
  const int64_t threads =
      elements < 2 * BLOCK_ELEMENTS ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) work(task);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker)
      for (int64_t task = next++; task < tasks; task = next++) work(task);
  });
}

// A rectangle of a layer's compact form.
struct Block {
  size_t layer;
  int64_t number;
  int64_t outer_begin, outer_end, inner_begin, inner_end;
};

class Blocks {
 public:
  explicit Blocks(const std::vector<Layer>& layers) {
    cuts_.reserve(layers.size());
    for (const Layer& layer : layers) {
      const int64_t outer = layer.outer(), inner = layer.inner(), elements = outer * inner;
      Cut cut{total_, outer, inner, 1, 1, 1};
      if (elements > 0) {
        const int64_t size = std::max(BLOCK_ELEMENTS, ceil_div(elements, MAX_BLOCKS));
        cut.inner_step = std::min(inner, size);
        cut.outer_step = std::min(outer, std::max<int64_t>(1, size / cut.inner_step));
        cut.across = ceil_div(inner, cut.inner_step);
        total_ += cut.across * ceil_div(outer, cut.outer_step);
      }
      elements_ += elements;
      cuts_.push_back(cut);
    }
  }

  int64_t count() const { return total_; }
  int64_t begin(size_t layer) const { return cuts_[layer].first; }
  int64_t end(size_t layer) const { return layer + 1 < cuts_.size() ? cuts_[layer + 1].first : total_; }

  Block operator[](int64_t number) const {
    const auto after = std::upper_bound(cuts_.begin(), cuts_.end(), number,
                                        [](int64_t wanted, const Cut& cut) { return wanted < cut.first; });
    const Cut& cut = *(after - 1);
    const int64_t local = number - cut.first;
    const int64_t outer = local / cut.across * cut.outer_step, inner = local % cut.across * cut.inner_step;
    return Block{static_cast<size_t>(after - cuts_.begin()) - 1, number, outer,
                 std::min(outer + cut.outer_step, cut.outer),    inner,  std::min(inner + cut.inner_step, cut.inner)};
  }

  // Calls work(block) for every block.
  template <class F>
  void for_each(const F& work) const {
    share(total_, elements_, [&](int64_t number) { work((*this)[number]); });
  }

 private:
  struct Cut {
    int64_t first;
    int64_t outer, inner;
    int64_t outer_step, inner_step;
    int64_t across;
  };
  std::vector<Cut> cuts_;
  int64_t total_ = 0;
  int64_t elements_ = 0;
};

}  // namespace shapo::cpu
