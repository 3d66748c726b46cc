// Ops that others consist of.
#pragma once
#include "common.h"

namespace gemma2 {

// add_rms_norm.cpp
void add_rms_norm_out(const Tensor& x, const Tensor& residual, const Tensor& post_weight,
                      const Tensor& pre_weight, double eps, Tensor residual_out, Tensor out);

// linear.cpp
void linear_out(const Tensor& x, const Tensor& weight, Tensor out);
void linear_geglu_out(const Tensor& x, const Tensor& weight, Tensor out);

}  // namespace gemma2
