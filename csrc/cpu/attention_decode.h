// Decoding on the CPU: attention of the few query rows that are computed while a model generates.
#pragma once

#include "core/problem.h"

namespace sightline::SIGHTLINE_ISA_NS {

// Whether attention_decode takes the problem: few rows per key head, of widths it reads directly, without gradients.
bool is_decoding(const AttentionProblem& problem);

void attention_decode(const AttentionProblem& problem, const Parallel& parallel);

}  // namespace sightline::SIGHTLINE_ISA_NS
