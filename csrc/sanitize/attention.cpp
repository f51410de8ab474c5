// Attention forward and backward, over ragged sizes and every option that moves a pointer or bounds a loop.
#include <cmath>
#include <optional>
#include <sstream>
#include <vector>

#include "sanitize/buffers.h"
#include "sanitize/run.h"

namespace sightline::sanitize {
namespace {

struct Heads {
  int64_t query, key;
};

// What a case draws from; lists hold the sizes at which tiles, vectors and pairs end, one below and one above.
struct Choices {
  Deck<int64_t> queries{{0, 1, 2, 3, 15, 17, 31, 63, 64, 65, 130, 200}};
  Deck<int64_t> keys{{0, 1, 2, 3, 15, 17, 48, 63, 64, 65, 128, 130, 260}};
  Deck<int64_t> widths{{1, 2, 3, 15, 16, 17, 32, 63, 64, 65, 130}};
  Deck<int64_t> value_widths{{1, 2, 3, 15, 16, 17, 48, 63, 64, 65, 130}};
  Deck<int64_t> batches{{0, 1, 1, 1, 2, 2, 3}};
  Deck<Heads> heads{{{1, 1}, {2, 2}, {2, 1}, {6, 2}, {3, 1}}};
  Deck<DType> dtypes{{DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kBFloat16}};
  Deck<Layout> layouts{{Layout::kContiguous, Layout::kRowsBeforeHeads, Layout::kGaps}};
  Deck<float> powers{{0.0f, 0.0f, 15.0f, 3.0f, 2.5f}};
  Deck<MaskKind> masks{{MaskKind::kNone, MaskKind::kNone, MaskKind::kNone, MaskKind::kBool, MaskKind::kFloat32,
                        MaskKind::kFloat16, MaskKind::kBFloat16}};
  Deck<int> threads{{1, 3}};
  Deck<bool> plain{{true, false, false, false}};
};

struct Sizes {
  int64_t batch, queries, keys, width, value_width;
  Heads heads;
  DType dtype;
};

// One call: the problem, and the memory that it points to.
class AttentionCase {
 public:
  // Plain: without options that leave keys out or change scores, as most calls are.
  AttentionCase(const Run& run, Choices& choices, const Sizes& sizes, bool plain)
      : run_(run),
        sizes_(sizes),
        threads_(choices.threads.draw(run.random)),
        query_(tensor(choices, sizes.heads.query, sizes.queries, sizes.width, Contents::kNumbers)),
        key_(tensor(choices, sizes.heads.key, sizes.keys, sizes.width, Contents::kNumbers)),
        value_(tensor(choices, sizes.heads.key, sizes.keys, sizes.value_width, Contents::kNumbers)),
        output_(tensor(choices, sizes.heads.query, sizes.queries, sizes.value_width, Contents::kUnwritten)),
        grad_output_(tensor(choices, sizes.heads.query, sizes.queries, sizes.value_width, Contents::kNumbers)),
        grad_query_(tensor(choices, sizes.heads.query, sizes.queries, sizes.width, Contents::kUnwritten)),
        grad_key_(tensor(choices, sizes.heads.key, sizes.keys, sizes.width, Contents::kUnwritten)),
        grad_value_(tensor(choices, sizes.heads.key, sizes.keys, sizes.value_width, Contents::kUnwritten)),
        log_normalizer_(rows()),
        scales_(sizes.heads.query),
        slopes_(sizes.heads.query),
        sinks_(sizes.heads.query),
        grad_scales_(sizes.heads.query),
        grad_sinks_(sizes.heads.query) {
    problem_.batch = sizes.batch;
    problem_.heads = sizes.heads.query;
    problem_.key_heads = sizes.heads.key;
    problem_.queries = sizes.queries;
    problem_.keys = sizes.keys;
    problem_.head_width = sizes.width;
    problem_.value_width = sizes.value_width;
    problem_.dtype = sizes.dtype;
    problem_.query = query_.view();
    problem_.key = key_.view();
    problem_.value = value_.view();
    problem_.output = output_.view();
    problem_.log_normalizer = log_normalizer_.get();
    draw_weighting(choices);
    if (plain) return;
    draw_extras();
    draw_visibility();
    draw_mask(choices.masks.draw(run.random));
    draw_prefix();
    poison_values();
  }

  std::string description() const {
    std::ostringstream text;
    text << "attention, " << name_of(sizes_.dtype) << ", B=" << sizes_.batch << " H=" << sizes_.heads.query
         << " Hk=" << sizes_.heads.key << " M=" << sizes_.queries << " N=" << sizes_.keys << " D=" << sizes_.width
         << " Dv=" << sizes_.value_width << ", weight function " << static_cast<int>(problem_.weight_function)
         << ", power " << problem_.reweight.power << ", causal " << problem_.causal << ", window "
         << problem_.window_left << " " << problem_.window_right << ", normalize_qk " << problem_.normalize_qk
         << ", length_scale " << problem_.length_scale << ", softcap " << problem_.softcap << ", key_lengths "
         << (problem_.key_lengths != nullptr) << ", key_mask " << (problem_.key_mask != nullptr) << ", documents "
         << problem_.documents << ", mask kind " << static_cast<int>(problem_.attn_mask.kind) << ", alibi "
         << (problem_.alibi_slopes != nullptr) << ", sinks " << (problem_.sinks != nullptr) << ", dropout "
         << problem_.dropout << ", finite " << finite_ << ", threads " << threads_;
    return text.str();
  }

  void run_forward() {
    run_.kernels.attention_forward(problem_, own_threads(threads_));
    output_.check("output", finite_);
    if (finite_) log_normalizer_.check("log_normalizer", true);
  }

  void run_backward() {
    const bool reweighted = problem_.reweight.power > 0.0f;
    Array<float> saved_rows(rows() * (reweighted ? kSavedWidthReweight : kSavedWidthPlain));
    Array<float> saved_values(reweighted ? rows() * sizes_.value_width : 0);
    problem_.saved_rows = saved_rows.get();
    problem_.saved_values = saved_values.get();
    run_forward();
    if (finite_) saved_rows.check("saved_rows");
    if (finite_) saved_values.check("saved_values");

    AttentionGradients gradients;
    gradients.grad_output = grad_output_.view();
    gradients.grad_query = grad_query_.view();
    gradients.grad_key = grad_key_.view();
    gradients.grad_value = grad_value_.view();
    Array<float> grad_log_normalizer(rows());
    grad_log_normalizer.randomize(run_.random);
    if (run_.chance(0.5)) gradients.grad_log_normalizer = grad_log_normalizer.get();
    const bool mask_gradient = problem_.attn_mask.kind > MaskKind::kBool && run_.chance(0.7);
    const bool full = mask_count_ == rows() * sizes_.keys;
    Array<float> grad_mask(mask_gradient && full ? mask_count_ : 0);
    Array<double> grad_mask_sums(mask_gradient && !full ? mask_count_ : 0);
    grad_mask.fill(0.0f);
    grad_mask_sums.fill(0.0);
    if (mask_gradient) {
      gradients.grad_mask = full ? grad_mask.get() : nullptr;
      gradients.grad_mask_sums = full ? nullptr : grad_mask_sums.get();
      std::copy(mask_gradient_strides_, mask_gradient_strides_ + 4, gradients.grad_mask_strides);
    }
    gradients.grad_scales = run_.chance(0.5) ? grad_scales_.get() : nullptr;
    gradients.grad_sinks = problem_.sinks != nullptr ? grad_sinks_.get() : nullptr;
    run_.kernels.attention_backward(problem_, gradients, own_threads(threads_));
    // A gradient of re-weighting may exceed what 16 bits hold.
    const bool finite = finite_ && !(reweighted && sizes_.dtype == DType::kFloat16);
    grad_query_.check("grad_query", finite);
    grad_key_.check("grad_key", finite);
    grad_value_.check("grad_value", finite);
    if (!finite_) return;
    grad_mask.check("grad_mask");
    grad_mask_sums.check("grad_mask, summed");
    if (gradients.grad_scales != nullptr) grad_scales_.check("grad_scales");
    if (gradients.grad_sinks != nullptr) grad_sinks_.check("grad_sinks");
  }

 private:
  const Run& run_;
  Sizes sizes_;
  int threads_;
  AttentionProblem problem_;
  HeadsTensor query_, key_, value_, output_, grad_output_, grad_query_, grad_key_, grad_value_;
  Array<float> log_normalizer_, scales_, slopes_, sinks_, grad_scales_, grad_sinks_;
  std::optional<Array<int64_t>> key_lengths_;
  std::optional<Array<uint8_t>> key_mask_;
  std::optional<Array<int32_t>> prefix_, documents_q_, documents_k_;
  std::unique_ptr<GuardedMemory> mask_;
  int64_t mask_count_ = 0;
  int64_t mask_gradient_strides_[4] = {};
  bool finite_ = true;

  int64_t rows() const { return sizes_.batch * sizes_.heads.query * sizes_.queries; }

  HeadsTensor tensor(Choices& choices, int64_t heads, int64_t rows, int64_t width, Contents contents) const {
    return HeadsTensor(sizes_.batch, heads, rows, width, sizes_.dtype, choices.layouts.draw(run_.random), contents,
                       run_.random);
  }

  void draw_weighting(Choices& choices) {
    const bool softplus = run_.chance(0.5);
    problem_.weight_function = softplus ? WeightFunction::kSoftplus : WeightFunction::kSoftmax;
    problem_.normalize_qk = run_.chance(softplus ? 0.8 : 0.3);
    problem_.length_scale = run_.chance(softplus ? 0.8 : 0.3);
    problem_.reweight.power = choices.powers.draw(run_.random);
    problem_.reweight.exempt_rows = run_.between(0, 3);
    const float width = static_cast<float>(sizes_.width);
    scales_.fill(problem_.normalize_qk ? std::log(width + 1.0f) : 1.0f / std::sqrt(width));
    problem_.scales = scales_.get();
    problem_.causal = run_.chance(0.5);
  }

  void draw_extras() {
    const bool softmax = problem_.weight_function == WeightFunction::kSoftmax;
    if (softmax && run_.chance(0.2)) problem_.softcap = 5.0f;
    // Softplus scores of a row must not all lie below -80 (MATH.md section 1), at distances up to 1000.
    slopes_.randomize(run_.random, 0.02f);
    if (run_.chance(0.25)) problem_.alibi_slopes = slopes_.get();
    sinks_.randomize(run_.random);
    if (softmax && problem_.reweight.power == 0.0f && run_.chance(0.4)) problem_.sinks = sinks_.get();
    if (!run_.chance(0.15)) return;
    problem_.dropout = true;
    problem_.dropout_threshold = 0x40000000u;
    problem_.dropout_scale = 4.0f / 3.0f;
    problem_.dropout_seed = 0x9e3779b97f4a7c15u;
  }

  void draw_visibility() {
    const auto side = [&] { return run_.chance(0.7) ? -1 : run_.chance(0.3) ? 0 : run_.between(0, 100); };
    problem_.window_left = side();
    problem_.window_right = side();
    if (run_.chance(0.3)) {
      key_mask_.emplace(sizes_.batch * sizes_.keys);
      for (int64_t index = 0; index < key_mask_->count(); ++index) (*key_mask_)[index] = run_.chance(0.8);
      problem_.key_mask = key_mask_->get();
      const bool keys_first = run_.chance(0.3);
      problem_.key_mask_strides[0] = keys_first ? 1 : sizes_.keys;
      problem_.key_mask_strides[1] = keys_first ? sizes_.batch : 1;
    }
    if (sizes_.batch == 1 && run_.chance(0.4)) {
      const int64_t documents = run_.between(0, 4);
      documents_q_.emplace(documents + 1);
      documents_k_.emplace(documents + 1);
      cut(*documents_q_, sizes_.queries);
      cut(*documents_k_, sizes_.keys);
      problem_.cu_seqlens_q = documents_q_->get();
      problem_.cu_seqlens_k = documents_k_->get();
      problem_.documents = documents;
    } else if (run_.chance(0.3)) {
      key_lengths_.emplace(sizes_.batch);
      for (int64_t batch = 0; batch < sizes_.batch; ++batch) (*key_lengths_)[batch] = run_.between(0, sizes_.keys);
      problem_.key_lengths = key_lengths_->get();
    }
  }

  // Offsets of documents, empty ones among them; now and then such as no caller should give, which kernels cut off.
  void cut(Array<int32_t>& offsets, int64_t rows) const {
    for (int64_t index = 0; index < offsets.count(); ++index)
      offsets[index] = static_cast<int32_t>(run_.between(0, rows));
    std::sort(offsets.get(), offsets.get() + offsets.count());
    if (run_.chance(0.7)) offsets[0] = 0;
    if (run_.chance(0.7)) offsets[offsets.count() - 1] = static_cast<int32_t>(rows);
    if (run_.chance(0.1)) offsets[run_.between(0, offsets.count() - 1)] = static_cast<int32_t>(2 * rows + 70);
    if (run_.chance(0.1)) offsets[run_.between(0, offsets.count() - 1)] = -3;
  }

  // Any axis may be broadcast, and the last need not be the contiguous one.
  void draw_mask(MaskKind kind) {
    problem_.attn_mask.kind = kind;
    if (kind == MaskKind::kNone) return;
    const int64_t full[4] = {sizes_.batch, sizes_.heads.query, sizes_.queries, sizes_.keys};
    int64_t size[4];
    for (int axis = 0; axis < 4; ++axis) size[axis] = run_.chance(0.4) ? 1 : full[axis];
    const bool keys_first = run_.chance(0.2);
    const int order[4] = {keys_first ? 2 : 3, keys_first ? 3 : 2, 1, 0};
    mask_count_ = 1;
    for (const int axis : order) {
      problem_.attn_mask.strides[axis] = size[axis] == 1 ? 0 : mask_count_;
      mask_count_ *= size[axis];
    }
    int64_t gradient_stride = 1;
    for (int axis = 3; axis >= 0; --axis) {
      mask_gradient_strides_[axis] = size[axis] == 1 ? 0 : gradient_stride;
      gradient_stride *= size[axis];
    }
    const int64_t bytes = kind == MaskKind::kBool ? 1 : kind == MaskKind::kFloat32 ? 4 : 2;
    mask_ = std::make_unique<GuardedMemory>(mask_count_ * bytes);
    problem_.attn_mask.data = mask_->get();
    // Some tiles of keys hide everything, or nothing: kernels leave these out and take those for unmasked.
    std::vector<double> shares(static_cast<size_t>(sizes_.keys / 64 + 1));
    for (double& share : shares) share = run_.chance(0.5) ? 0.8 : run_.chance(0.5) ? 0.0 : 1.0;
    const int64_t key_stride = problem_.attn_mask.strides[3];
    for (int64_t index = 0; index < mask_count_; ++index) {
      const int64_t key = key_stride == 0 ? 0 : index / key_stride % sizes_.keys;
      const bool visible = run_.chance(shares[static_cast<size_t>(key / 64)]);
      // Of 16 bits: 0, and minus infinity in either format.
      if (kind == MaskKind::kBool)
        reinterpret_cast<uint8_t*>(mask_->get())[index] = visible;
      else if (kind == MaskKind::kFloat32)
        reinterpret_cast<float*>(mask_->get())[index] = visible ? 0.5f : -INFINITY;
      else
        reinterpret_cast<uint16_t*>(mask_->get())[index] = visible ? 0 : kind == MaskKind::kFloat16 ? 0xfc00 : 0xff80;
    }
  }

  void draw_prefix() {
    const bool counts = problem_.length_scale || problem_.reweight.power > 0.0f;
    if (problem_.key_mask == nullptr || !counts || problem_.attn_mask.kind != MaskKind::kNone) return;
    prefix_.emplace(sizes_.batch * (sizes_.keys + 1));
    for (int64_t batch = 0; batch < sizes_.batch; ++batch) {
      int32_t* prefix = prefix_->get() + batch * (sizes_.keys + 1);
      prefix[0] = 0;
      for (int64_t key = 0; key < sizes_.keys; ++key)
        prefix[key + 1] =
            prefix[key] + problem_.key_mask[batch * problem_.key_mask_strides[0] + key * problem_.key_mask_strides[1]];
    }
    problem_.visible_prefix = prefix_->get();
  }

  // Rows that are not finite go through products of their own.
  void poison_values() {
    if (sizes_.batch * sizes_.keys == 0 || !run_.chance(0.15)) return;
    finite_ = false;
    HeadsTensor& target = run_.chance(0.5) ? value_ : key_;
    target.set(0, 0, run_.between(0, sizes_.keys - 1), 0, run_.chance(0.5) ? NAN : INFINITY);
  }
};

void run_case(const Run& run, Choices& choices, const Sizes& sizes, bool plain = false) {
  run_both_ways(AttentionCase(run, choices, sizes, plain));
}

}  // namespace

void run_attention(const Run& run) {
  Choices choices;
  for (int index = 0; index < run.cases; ++index)
    run_case(run, choices,
             {choices.batches.draw(run.random), choices.queries.draw(run.random), choices.keys.draw(run.random),
              choices.widths.draw(run.random), choices.value_widths.draw(run.random), choices.heads.draw(run.random),
              choices.dtypes.draw(run.random)},
             choices.plain.draw(run.random));
  // Sizes without a rest: kernels then read keys and values where they lie.
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
    for (int repeat = 0; repeat < 4; ++repeat) run_case(run, choices, {2, 64, 128, 64, 64, {2, 1}, dtype}, true);
  // Longer than the chunks of keys and of rows, and more tiles of rows than a unit takes.
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    run_case(run, choices, {1, 3, 4097, 17, 5, {2, 1}, dtype});
    run_case(run, choices, {1, 1061, 67, 5, 9, {2, 1}, dtype});
  }
}

void break_attention(const Run& run, const std::string& how) {
  constexpr int64_t kRows = 65, kWidth = 17;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const auto tensor = [&](Contents contents) {
      return HeadsTensor(1, 1, kRows, kWidth, dtype, Layout::kContiguous, contents, run.random);
    };
    HeadsTensor query = tensor(Contents::kNumbers), key = tensor(Contents::kNumbers),
                value = tensor(Contents::kNumbers);
    HeadsTensor output = tensor(Contents::kUnwritten);
    Array<float> log_normalizer(kRows), scales(2);
    scales.fill(1.0f);
    AttentionProblem problem;
    problem.batch = problem.heads = problem.key_heads = 1;
    problem.queries = problem.keys = kRows;
    problem.head_width = problem.value_width = kWidth;
    problem.dtype = dtype;
    problem.query = query.view();
    problem.key = key.view();
    problem.value = value.view();
    problem.output = output.view();
    problem.log_normalizer = log_normalizer.get();
    problem.scales = scales.get();
    if (how == "keys") problem.keys += 1;
    if (how == "queries") problem.queries += 1;
    if (how == "widths") problem.value_width += 1;
    if (how == "overflow") {
      problem.heads = 2;
      problem.queries = INT64_MAX;
    }
    describe_case("attention with wrong " + how);
    run.kernels.attention_forward(problem, own_threads(1));
  }
}

}  // namespace sightline::sanitize
