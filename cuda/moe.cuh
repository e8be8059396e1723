// The moe room on the device: choose experts, run them, add their outputs up; and the way back.
//
//   route.cuh       logits to expert ids and weights
//   sorting.cuh    ids to rows grouped by expert, and the list of row tiles (a stable counting sort)
//   activation.cuh  the ten activations and their slopes
//   rows.cuh        products whose rows are an expert's rows: up, down, and their gradients
//   weights.cuh     products along an expert's rows: gradients of the weights
//   reduce.cuh      gradients of scores and biases
//   aggregate.cuh   each token sums the rows of its experts
//
// Templates over raw pointers. A kernel is one INSTANTIATE_MOE_* line of a stub, which names an instantiation.
#pragma once

#include "moe/aggregate.cuh"
#include "moe/sorting.cuh"
#include "moe/reduce.cuh"
#include "moe/route.cuh"
#include "moe/rows.cuh"
#include "moe/weights.cuh"
