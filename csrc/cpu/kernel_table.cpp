// The kernel table of one instruction set.
#include "cpu/kernel_table.h"

#include "cpu/vec.h"

namespace sightline::SIGHTLINE_ISA_NS {

void attention_forward(const AttentionProblem&, const Parallel&);
void attention_backward(const AttentionProblem&, const AttentionGradients&, const Parallel&);
void recurrence_forward(const RecurrenceProblem&, const Parallel&);
void recurrence_backward(const RecurrenceProblem&, const RecurrenceGradients&, const Parallel&);
void exp2_array(const float*, float*, int64_t);
void log2_one_plus_array(const float*, float*, int64_t);
void exp2_short_array(const float*, float*, int64_t);
void log2_one_plus_short_array(const float*, float*, int64_t);
void tanh_array(const float*, float*, int64_t);
void softplus_array(const float*, float*, float*, int64_t);
void power_array(const float*, float, float*, int64_t);
void attention_parts(const AttentionProblem&, int, AttentionParts&);
double multiply_rate(bool, double);
void read_floats(const float*, int64_t);
double vector_seconds(int64_t, bool, double);

extern const KernelTable kTable;
const KernelTable kTable = {kIsaName,
                            attention_forward,
                            attention_backward,
                            recurrence_forward,
                            recurrence_backward,
                            exp2_array,
                            log2_one_plus_array,
                            exp2_short_array,
                            log2_one_plus_short_array,
                            tanh_array,
                            softplus_array,
                            power_array,
                            attention_parts,
                            multiply_rate,
                            read_floats,
                            vector_seconds};

}  // namespace sightline::SIGHTLINE_ISA_NS
