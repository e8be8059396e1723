// The attention room on the device. A mod (expr.cuh) says what programs do to scores and elements.
//
//   problem.cuh   the kernel argument: arrays, rules, and which rows and columns a block works on
//   tile.cuh      products of tiles in shared memory, by warps
//   warpgroup.cuh the same by warpgroups (sm_90a)
//   element.cuh   what happens to one element of the score matrix
//   forward.cuh   result and lse; also of a part of the keys (decode)
//   combine.cuh   parts of a row put together
//   delta.cuh     what the backward pass knows of a row beforehand; gradients of sinks
//   blocks.cuh    lists of key blocks turned into lists of query blocks
//   backward.cuh  gradients of queries, keys, values and captures
//
// Templates over raw pointers. A kernel is one INSTANTIATE_ATTENTION_* line of a stub, which names an instantiation.
#pragma once

#include "attention/backward.cuh"
#include "attention/blocks.cuh"
#include "attention/combine.cuh"
#include "attention/delta.cuh"
#include "attention/forward.cuh"
