// Whole calls of InfoNCE by the fused kernels: anchors are sorted by class, the kernels work on blocks of
// them, and what these find goes back to the caller's order.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu.h"
#include "half.h"

namespace pxc::cpu {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The least that scores are multiplied by: -inf times 0 would be NaN.
constexpr float kSmallestScale = 1e-37f;

// Anchors that meet the tiles of keys together. More would read a packed tile less often, but their sums
// would leave the core's cache.
constexpr int64_t kBlockAnchors = 1024;

// Packed tiles, of which each of so many threads can have its own; 1 MiB each at D = 256 in fp32.
constexpr int32_t kMostPanels = 4;

float scale_of(double temperature) { return std::max(float(kLog2E / temperature), kSmallestScale); }

template <class T>
std::unique_ptr<T[]> uninitialised(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]);
}

int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

DType multiplied(DType dtype) { return DType(fused_dtype(int(dtype))); }
int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// The anchors that have a label, sorted by it, and otherwise in their order.
std::vector<int64_t> by_class(const int32_t* labels, int64_t size) {
  std::vector<int64_t> index;
  index.reserve(size);
  for (int64_t i = 0; i < size; ++i) {
    if (labels[i] >= 0) index.push_back(i);
  }
  const auto before = [&](int64_t a, int64_t b) { return labels[a] < labels[b]; };
  if (!std::is_sorted(index.begin(), index.end(), before))
    std::stable_sort(index.begin(), index.end(), before);
  return index;
}

std::vector<float> picked(const float* values, const int64_t* index, int64_t size) {
  std::vector<float> some(values ? size : 0);
  for (int64_t i = 0; values && i < size; ++i) some[i] = values[index[i]];
  return some;
}

template <class T>
T* or_null(std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

// Some of the anchors of a call, as the kernels take them.
class Block {
 public:
  template <class Call>
  Block(const Call& call, const int64_t* index, int64_t size)
      : index(index), size(size), dtype(multiplied(call.anchors.dtype)), labels(size) {
    for (int64_t i = 0; i < size; ++i) labels[i] = call.anchor_labels[index[i]];
    if (dtype == DType::kFloat32) {
      wide_ = uninitialised<float>(size * call.channels);
      vector_kernels().widen({.source = call.anchors,
                              .indices = index,
                              .num_rows = size,
                              .channels = call.channels,
                              .rows = wide_.get(),
                              .threads = call.threads});
    } else {  // multiplied in pairs
      const int64_t stride = round_up(call.channels, 2);
      narrow_ = uninitialised<uint16_t>(size * stride);
      for (int64_t i = 0; i < size; ++i) {
        uint16_t* row = narrow_.get() + i * stride;
        row[stride - 1] = 0;
        std::memcpy(row, static_cast<const uint16_t*>(call.anchors.data) + index[i] * call.channels,
                    size_t(call.channels) * sizeof(uint16_t));
      }
    }
  }

  ConstRows rows() const {
    return {wide_ ? static_cast<const void*>(wide_.get()) : static_cast<const void*>(narrow_.get()), dtype};
  }

  const int64_t* const index;  // [size], where each is in the caller's tensors
  const int64_t size;
  const DType dtype;
  std::vector<int32_t> labels;

 private:
  std::unique_ptr<float[]> wide_;
  std::unique_ptr<uint16_t[]> narrow_;
};

// Calls work(block) for all anchors that have a label, `most` at a time.
template <class Call, class Work>
void each_block(const Call& call, int64_t most, Work work) {
  const std::vector<int64_t> index = by_class(call.anchor_labels, call.num_anchors);
  const int64_t size = int64_t(index.size());
  for (int64_t start = 0; start < size; start += most)
    work(Block(call, index.data() + start, std::min(most, size - start)));
}

std::vector<int64_t> tiles_of(const int32_t* labels, int64_t num_keys) {
  std::vector<int64_t> tiles(3 * (num_keys / kFusedBlockK * 2 + 64));
  int64_t count;
  for (;;) {
    const int64_t capacity = int64_t(tiles.size()) / 3;
    plan_tiles({.key_labels = labels,
                .num_keys = num_keys,
                .max_keys = kFusedBlockK,
                .tiles = tiles.data(),
                .capacity = capacity,
                .num_tiles = &count});
    tiles.resize(3 * count);
    if (count <= capacity) return tiles;
  }
}

// A prefix of the keys has their address, so sizes are compared too.
bool negatives_are_keys(const ContrastRows& call) {
  return call.num_negatives == call.num_keys && call.negatives.data == call.keys.data &&
         call.negative_labels == call.key_labels;
}

// The keys of a call, cut into tiles.
class Keys {
 public:
  Keys(const ContrastRows& call, bool with_gradient)
      : call_(call),
        tiles_(tiles_of(call.key_labels, call.num_keys)),
        negative_tiles_(negatives_are_keys(call) ? tiles_
                                                 : tiles_of(call.negative_labels, call.num_negatives)),
        num_panels_(std::clamp(call.threads, 2, kMostPanels)) {
    const int64_t rows = num_panels_ * (with_gradient ? 2 : 1) * kFusedBlockK;
    panels_ =
        uninitialised<char>(rows * round_up(call.channels, kPanel) * bytes_of(multiplied(call.keys.dtype)));
  }

  FusedRows with(const Block& block) const {
    return {.anchors = block.rows(),
            .num_rows = block.size,
            .channels = call_.channels,
            .anchor_labels = block.labels.data(),
            .anchor_index = call_.exclude_self ? block.index : nullptr,
            .keys = call_.keys,
            .key_labels = call_.key_labels,
            .tiles = tiles_.data(),
            .num_tiles = int64_t(tiles_.size()) / 3,
            .negative_keys = call_.negatives,
            .negative_labels = call_.negative_labels,
            .negative_tiles = negative_tiles_.data(),
            .num_negative_tiles = int64_t(negative_tiles_.size()) / 3,
            .panels = panels_.get(),
            .num_panels = num_panels_,
            .threads = call_.threads};
  }

 private:
  const ContrastRows& call_;
  const std::vector<int64_t> tiles_, negative_tiles_;
  const int64_t num_panels_;
  std::unique_ptr<char[]> panels_;
};

// The anchors as their own keys, with room for their panels.
class Symmetric {
 public:
  template <class Call>
  Symmetric(const Call& call, const Block& block, int products)
      : panels_(uninitialised<char>(products * round_up(block.size, kSymmetricTile) *
                                    round_up(call.channels, kPanel) * bytes_of(block.dtype))),
        rows_{.anchors = block.rows(),
              .num_rows = block.size,
              .channels = call.channels,
              .anchor_labels = block.labels.data(),
              .anchor_index = call.exclude_self ? block.index : nullptr,
              .panels = panels_.get(),
              .threads = call.threads} {}

  const SymmetricRows& rows() const { return rows_; }

 private:
  std::unique_ptr<char[]> panels_;
  SymmetricRows rows_;
};

bool is_symmetric(const ContrastRows& call) {
  return call.num_keys == call.num_anchors && call.keys.data == call.anchors.data &&
         call.key_labels == call.anchor_labels && negatives_are_keys(call);
}

// What rows without a label keep.
void clear(const ContrastForwardParams& p) {
  for (int64_t i = 0; i < p.num_anchors; ++i) {
    if (p.anchor_labels[i] >= 0) continue;
    p.loss[i] = p.pos_weight[i] = 0.f;
    p.neg_lse[i] = -kInfinity;
    p.pos_count[i] = 0;
    if (p.anchor_grad) std::fill_n(p.anchor_grad + i * p.channels, p.channels, 0.f);
  }
}

// The sums of a block, and its part of the call's outputs made of them.
class Sums {
 public:
  Sums(const ContrastForwardParams& call, const Block& block)
      : call_(call),
        block_(block),
        neg_min_(picked(call.neg_min, block.index, block.size)),
        pos_max_(picked(call.pos_max, block.index, block.size)),
        shift_(block.size, -kInfinity),
        sum_(block.size),
        weight_sum_(block.dtype == DType::kBFloat16 ? block.size : 0),
        sum_log2_(block.size),
        negatives_(call.anchor_grad ? block.size * call.channels : 0),
        positives_(negatives_.size()),
        loss_sum_(block.size),
        pos_weight_sum_(block.size),
        pos_counts_(block.size) {}

  ForwardSums fields() {
    return {.scale = scale_of(call_.temperature),
            .neg_min = or_null(neg_min_),
            .pos_max = or_null(pos_max_),
            .shift = shift_.data(),
            .sum = sum_.data(),
            .weight_sum = or_null(weight_sum_),
            .sum_log2 = sum_log2_.data(),
            .negatives = or_null(negatives_),
            .positives = or_null(positives_),
            .loss_sum = loss_sum_.data(),
            .pos_weight_sum = pos_weight_sum_.data(),
            .pos_counts = pos_counts_.data()};
  }

  void finish() {
    vector_kernels().finish({.num_rows = block_.size,
                             .channels = call_.channels,
                             .anchor_index = block_.index,
                             .shift = shift_.data(),
                             .sum = sum_.data(),
                             .weight_sum = weight_sum_.empty() ? sum_.data() : weight_sum_.data(),
                             .negatives = or_null(negatives_),
                             .positives = or_null(positives_),
                             .loss_sum = loss_sum_.data(),
                             .pos_weight_sum = pos_weight_sum_.data(),
                             .pos_counts = pos_counts_.data(),
                             .scale = scale_of(call_.temperature),
                             .temperature = float(call_.temperature),
                             .loss = call_.loss,
                             .neg_lse = call_.neg_lse,
                             .pos_weight = call_.pos_weight,
                             .pos_count = call_.pos_count,
                             .anchor_grad = call_.anchor_grad,
                             .threads = call_.threads});
  }

 private:
  const ContrastForwardParams& call_;
  const Block& block_;
  std::vector<float> neg_min_, pos_max_, shift_, sum_, weight_sum_, sum_log2_, negatives_, positives_;
  std::vector<double> loss_sum_, pos_weight_sum_;
  std::vector<int64_t> pos_counts_;
};

}  // namespace

void contrast_forward(const ContrastForwardParams& p) {
  clear(p);
  if (is_symmetric(p) && !p.anchor_grad) {
    each_block(p, p.num_anchors, [&](const Block& block) {
      const Symmetric symmetric(p, block, 1);
      Sums sums(p, block);
      vector_kernels().symmetric_forward({symmetric.rows(), sums.fields()});
      sums.finish();
    });
    return;
  }
  const Keys keys(p, p.anchor_grad != nullptr);
  each_block(p, kBlockAnchors, [&](const Block& block) {
    Sums sums(p, block);
    vector_kernels().fused_forward({keys.with(block), sums.fields()});
    sums.finish();
  });
}

void contrast_counts(const ContrastCountsParams& p) {
  const int64_t size = p.num_anchors * kScoreBins;
  std::fill_n(p.neg_counts, size, 0);
  std::fill_n(p.pos_counts, size, 0);
  const bool symmetric = is_symmetric(p);
  std::unique_ptr<Keys> keys;
  if (!symmetric) keys = std::make_unique<Keys>(p, false);
  each_block(p, symmetric ? p.num_anchors : kBlockAnchors, [&](const Block& block) {
    if (symmetric) {
      vector_kernels().symmetric_counts(
          {Symmetric(p, block, 1).rows(), block.index, p.neg_counts, p.pos_counts});
    } else {
      vector_kernels().fused_counts({keys->with(block), block.index, p.neg_counts, p.pos_counts});
    }
  });
}

void contrast_backward(const ContrastBackwardParams& p) {
  for (int64_t i = 0; i < p.num_anchors; ++i) {
    if (p.anchor_labels[i] < 0) std::fill_n(p.grad + i * p.channels, p.channels, 0.f);
  }
  each_block(p, p.num_anchors, [&](const Block& block) {
    const Symmetric symmetric(p, block, 2);
    std::vector<float> neg_min = picked(p.neg_min, block.index, block.size);
    std::vector<float> pos_max = picked(p.pos_max, block.index, block.size);
    std::vector<float> neg_lse_log2(block.size), push(block.size), pull(block.size), residual(block.size);
    for (int64_t i = 0; i < block.size; ++i) {
      const int64_t anchor = block.index[i];
      // Without negatives sigma is 0, which a log-sum-exp of +inf and factors of 0 give without a special
      // case.
      const bool alone = p.neg_lse[anchor] == -kInfinity;
      const float per_logit = float(double(p.grad_scale[anchor]) / p.temperature);
      neg_lse_log2[i] = alone ? kInfinity : p.neg_lse[anchor] * float(kLog2E);
      pull[i] = alone ? 0.f : per_logit;
      push[i] = alone ? 0.f : per_logit * p.pos_weight[anchor];
    }
    std::vector<float> grad(block.size * p.channels);
    vector_kernels().symmetric_backward({symmetric.rows(), scale_of(p.temperature), or_null(neg_min),
                                         or_null(pos_max), neg_lse_log2.data(), push.data(), pull.data(),
                                         residual.data(), grad.data()});
    for (int64_t i = 0; i < block.size; ++i)
      std::copy_n(grad.data() + i * p.channels, p.channels, p.grad + block.index[i] * p.channels);
  });
}

}  // namespace pxc::cpu
