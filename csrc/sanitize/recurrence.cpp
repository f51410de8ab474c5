// The additive recurrence forward and backward, over ragged sizes and every option that moves a pointer or bounds a
// loop.
#include <cmath>
#include <optional>
#include <sstream>

#include "sanitize/buffers.h"
#include "sanitize/run.h"

namespace sightline::sanitize {
namespace {

struct Heads {
  int64_t query, key;
};

struct Choices {
  Deck<int64_t> lengths{{0, 1, 1, 2, 3, 15, 16, 17, 63, 64, 65, 130, 260}};
  Deck<int64_t> widths{{1, 2, 3, 15, 16, 17, 63, 64, 65, 130}};
  Deck<int64_t> value_widths{{1, 2, 3, 15, 16, 17, 63, 64, 65, 130, 300}};
  Deck<int64_t> batches{{0, 1, 1, 1, 2, 2, 3}};
  Deck<Heads> heads{{{1, 1}, {2, 2}, {2, 1}, {6, 2}, {5, 1}}};
  Deck<DType> dtypes{{DType::kFloat32, DType::kFloat16, DType::kBFloat16}};
  Deck<DType> gain_dtypes{{DType::kFloat32, DType::kFloat16, DType::kBFloat16}};
  Deck<Layout> layouts{{Layout::kContiguous, Layout::kRowsBeforeHeads, Layout::kGaps}};
  Deck<float> steepness{{1.0f, 1.0f, 60.0f}};  // keys that climb cut their chunks short
  Deck<int> threads{{1, 3}};
};

struct Sizes {
  int64_t batch, length, width, value_width;
  Heads heads;
  DType dtype;
};

class RecurrenceCase {
 public:
  // Plain: causal, one document, without a mask.
  RecurrenceCase(const Run& run, Choices& choices, const Sizes& sizes, bool plain)
      : run_(run),
        sizes_(sizes),
        threads_(choices.threads.draw(run.random)),
        gain_dtype_(choices.gain_dtypes.draw(run.random)),
        documents_(plain ? 0 : draw_documents()),
        query_(tensor(choices, sizes.heads.query, sizes.width, sizes.dtype, Contents::kNumbers)),
        key_(tensor(choices, sizes.heads.key, sizes.width, sizes.dtype, Contents::kNumbers,
                    choices.steepness.draw(run.random))),
        value_(tensor(choices, sizes.heads.key, sizes.value_width, sizes.dtype, Contents::kNumbers)),
        gain_(tensor(choices, sizes.heads.key, sizes.width, gain_dtype_, Contents::kNumbers)),
        output_(result(choices, sizes.heads.query, sizes.value_width, sizes.dtype)),
        grad_output_(tensor(choices, sizes.heads.query, sizes.value_width, sizes.dtype, Contents::kNumbers)),
        grad_query_(result(choices, sizes.heads.query, sizes.width, sizes.dtype)),
        grad_key_(result(choices, sizes.heads.key, sizes.width, sizes.dtype)),
        grad_value_(result(choices, sizes.heads.key, sizes.value_width, sizes.dtype)),
        grad_gain_(result(choices, sizes.heads.key, sizes.width, gain_dtype_)),
        initial_log_normalizer_(channels()),
        initial_memory_(channels() * sizes.value_width),
        final_log_normalizer_(channels()),
        final_memory_(channels() * sizes.value_width) {
    problem_.batch = sizes.batch;
    problem_.heads = sizes.heads.query;
    problem_.key_heads = sizes.heads.key;
    problem_.length = sizes.length;
    problem_.key_width = sizes.width;
    problem_.value_width = sizes.value_width;
    problem_.dtype = sizes.dtype;
    problem_.query = query_.view();
    problem_.key = key_.view();
    problem_.value = value_.view();
    problem_.output = output_.view();
    problem_.causal = plain || run.chance(0.6);
    problem_.scale = 0.7f;
    if (run.chance(0.4)) {
      problem_.key_gain = gain_.view();
      problem_.gain_dtype = gain_dtype_;
    }
    if (cuts_) {
      problem_.cuts = cuts_->get();
      problem_.documents = documents_;
    }
    if (!plain) draw_mask();
    draw_states();
    if (sizes.batch * sizes.length > 0 && run.chance(0.1)) {
      finite_ = false;
      value_.set(0, 0, run.between(0, sizes.length - 1), 0, NAN);
    }
  }

  std::string description() const {
    std::ostringstream text;
    text << "recurrence, " << name_of(sizes_.dtype) << ", B=" << sizes_.batch << " H=" << sizes_.heads.query
         << " Hk=" << sizes_.heads.key << " N=" << sizes_.length << " Dk=" << sizes_.width
         << " Dv=" << sizes_.value_width << ", causal " << problem_.causal << ", gain "
         << (problem_.key_gain.data == nullptr ? "none" : name_of(gain_dtype_)) << ", key_mask "
         << (problem_.key_mask != nullptr) << ", documents " << problem_.documents << ", initial state "
         << (problem_.initial_memory != nullptr) << ", final state " << (problem_.final_memory != nullptr)
         << ", finite " << finite_ << ", threads " << threads_;
    return text.str();
  }

  void run_forward() {
    run_.kernels.recurrence_forward(problem_, own_threads(threads_));
    output_.check("output", finite_);
    if (problem_.final_memory == nullptr || !finite_) return;
    final_log_normalizer_.check("final log_normalizer", true);
    final_memory_.check("final memory");
  }

  void run_backward() {
    RecurrenceGradients gradients;
    gradients.grad_output = grad_output_.view();
    gradients.grad_query = grad_query_.view();
    gradients.grad_key = grad_key_.view();
    gradients.grad_value = grad_value_.view();
    if (problem_.key_gain.data != nullptr) gradients.grad_gain = grad_gain_.view();
    Array<float> grad_log_normalizer(channels()), grad_memory(channels() * sizes_.value_width);
    grad_log_normalizer.randomize(run_.random);
    grad_memory.randomize(run_.random);
    if (run_.chance(0.5)) gradients.grad_log_normalizer = grad_log_normalizer.get();
    if (run_.chance(0.5)) gradients.grad_memory = grad_memory.get();
    const bool initial = problem_.initial_memory != nullptr;
    Array<float> initial_log_normalizer(initial ? channels() : 0);
    Array<float> initial_memory(initial ? channels() * sizes_.value_width : 0);
    gradients.grad_initial_log_normalizer = initial_log_normalizer.get();
    gradients.grad_initial_memory = initial_memory.get();
    run_.kernels.recurrence_backward(problem_, gradients, own_threads(threads_));
    grad_query_.check("grad_query", finite_);
    grad_key_.check("grad_key", finite_);
    grad_value_.check("grad_value", finite_);
    if (problem_.key_gain.data != nullptr) grad_gain_.check("grad_gain", finite_);
    if (!finite_) return;
    initial_log_normalizer.check("gradient of the initial log_normalizer");
    initial_memory.check("gradient of the initial memory");
  }

 private:
  const Run& run_;
  Sizes sizes_;
  int threads_;
  DType gain_dtype_;
  std::optional<Array<int64_t>> cuts_;
  bool covered_ = true;
  int64_t documents_;
  RecurrenceProblem problem_;
  HeadsTensor query_, key_, value_, gain_, output_, grad_output_, grad_query_, grad_key_, grad_value_, grad_gain_;
  Array<float> initial_log_normalizer_, initial_memory_, final_log_normalizer_, final_memory_;
  std::optional<Array<uint8_t>> key_mask_;
  bool finite_ = true;

  int64_t channels() const { return (cuts_ ? documents_ : sizes_.batch) * sizes_.heads.key * sizes_.width; }

  HeadsTensor tensor(Choices& choices, int64_t heads, int64_t width, DType dtype, Contents contents,
                     float deviation = 1.0f) const {
    return HeadsTensor(sizes_.batch, heads, sizes_.length, width, dtype, choices.layouts.draw(run_.random), contents,
                       run_.random, deviation);
  }

  // Rows outside of all documents are the caller's to clear.
  HeadsTensor result(Choices& choices, int64_t heads, int64_t width, DType dtype) const {
    return tensor(choices, heads, width, dtype, covered_ ? Contents::kUnwritten : Contents::kNumbers);
  }

  int64_t draw_documents() {
    if (sizes_.batch != 1 || !run_.chance(0.4)) return 0;
    const int64_t documents = run_.between(0, 4);
    cuts_.emplace(documents + 1);
    Array<int64_t>& cuts = *cuts_;
    for (int64_t index = 0; index <= documents; ++index) cuts[index] = run_.between(0, sizes_.length);
    std::sort(cuts.get(), cuts.get() + cuts.count());
    if (run_.chance(0.7)) {
      cuts[0] = 0;
      cuts[documents] = sizes_.length;
    }
    covered_ = cuts[0] == 0 && cuts[documents] == sizes_.length;
    return documents;
  }

  void draw_mask() {
    if (!run_.chance(0.3)) return;
    key_mask_.emplace(sizes_.batch * sizes_.length);
    for (int64_t index = 0; index < key_mask_->count(); ++index) (*key_mask_)[index] = run_.chance(0.7);
    problem_.key_mask = key_mask_->get();
    const bool keys_first = run_.chance(0.3);
    problem_.key_mask_strides[0] = keys_first ? 1 : sizes_.length;
    problem_.key_mask_strides[1] = keys_first ? sizes_.batch : 1;
  }

  void draw_states() {
    initial_log_normalizer_.randomize(run_.random, 3.0f);
    initial_memory_.randomize(run_.random);
    // A channel that has met no key.
    if (channels() > 0 && run_.chance(0.5)) initial_log_normalizer_[run_.between(0, channels() - 1)] = -INFINITY;
    if (run_.chance(0.5)) {
      problem_.initial_log_normalizer = initial_log_normalizer_.get();
      problem_.initial_memory = initial_memory_.get();
    }
    if (run_.chance(0.5)) {
      problem_.final_log_normalizer = final_log_normalizer_.get();
      problem_.final_memory = final_memory_.get();
    }
  }
};

void run_case(const Run& run, Choices& choices, const Sizes& sizes, bool plain = false) {
  run_both_ways(RecurrenceCase(run, choices, sizes, plain));
}

}  // namespace

void run_recurrence(const Run& run) {
  Choices choices;
  for (int index = 0; index < run.cases; ++index)
    run_case(run, choices,
             {choices.batches.draw(run.random), choices.lengths.draw(run.random), choices.widths.draw(run.random),
              choices.value_widths.draw(run.random), choices.heads.draw(run.random), choices.dtypes.draw(run.random)});
  run_case(run, choices, {1, 16500, 3, 2, {1, 1}, DType::kFloat32}, true);  // two segments of the backward pass
  // Windows of chunks that threads share, where there are several; segments where there is no order.
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    for (int turn = 0; turn < 4; ++turn) run_case(run, choices, {1, 4200, 70, 37, {2, 1}, dtype}, turn < 2);
}

}  // namespace sightline::sanitize
